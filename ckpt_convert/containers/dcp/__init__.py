"""torch.distributed.checkpoint's directories."""
