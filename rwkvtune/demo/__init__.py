"""`make demo`: a small RWKV-7 trained on a bundled text, on a laptop CPU, in minutes."""
