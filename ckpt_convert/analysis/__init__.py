"""Looking into checkpoints: checks, differences, logits and statistics."""
