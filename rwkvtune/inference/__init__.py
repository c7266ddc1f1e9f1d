"""Inference: choosing tokens from logits, and text from a model, one token at a time."""
