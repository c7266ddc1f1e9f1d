"""RWKV-7 "Goose" (x070): configuration and model."""
