"""RWKV-6 "Finch" (x060): configuration and model."""
