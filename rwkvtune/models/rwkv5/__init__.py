"""RWKV-5.2 "Eagle" (x052): configuration and model."""
