"""What two checkpoints compute, through transformers."""
