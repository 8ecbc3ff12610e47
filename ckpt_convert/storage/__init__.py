"""Where checkpoints lie: reading ranges of files, and writing a directory that appears whole or not at all."""
