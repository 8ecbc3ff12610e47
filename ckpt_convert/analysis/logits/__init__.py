"""The logits that checkpoints compute, through transformers."""
