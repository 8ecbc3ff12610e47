"""Pickles read without running anything: the tensors that they rebuild, and what they may name."""
