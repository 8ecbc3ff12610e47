"""The tensors of a model in memory: reading them, and filling them from a checkpoint."""
