"""Mistral: ``table`` is the mapping; its config.json, and its params.json."""
