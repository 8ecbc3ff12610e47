"""Llama 3.2 with vision: ``table`` is the mapping; its config.json, its params.json, and the releases."""
