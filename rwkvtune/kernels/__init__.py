"""Numerical kernels: tensors in, tensors out; no config, no model."""
