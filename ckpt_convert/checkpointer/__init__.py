"""The training side: saving a model in the format that it came from at every step that is due, and resuming exactly."""
