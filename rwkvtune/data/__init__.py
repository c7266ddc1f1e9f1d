"""Data: token files, the order in which they are read, and batches. Import the modules."""
