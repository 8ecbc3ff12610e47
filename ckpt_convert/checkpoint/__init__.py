"""A checkpoint that is there: its files, keys, family and config, and what its record says."""
