"""Llama 4: ``table`` is the mapping; its config.json, its params.json (and rules of it), and the releases."""
