"""The training state of a run besides its weights: taking, writing and restoring it."""
