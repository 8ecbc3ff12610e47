"""Llama 1 to 3.3: ``table`` is the mapping; its config.json, its params.json, and what no file of a release says."""
