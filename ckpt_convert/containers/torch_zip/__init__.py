"""torch.save's zip files, read and laid out without torch."""
