"""Mixtral: ``table`` has the mappings; its config.json, and its params.json."""
