"""What a training run has beside its weights, and how that is written and restored."""
