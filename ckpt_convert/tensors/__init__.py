"""Tensors that are described, not held: what a file stores, lazy views of it, and how their bytes are read."""
