"""Fused pieces of a model's step: each is one autograd function with a hand-written backward.

Each piece has a plain reference beside it, which the tests hold it to, and saves memory traffic or
memory.
"""
