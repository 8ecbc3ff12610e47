"""Storage: reading ranges of files, and writing directories that appear complete or not at all."""
