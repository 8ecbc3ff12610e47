"""Statistics of tensors, and of the difference between two."""
