"""Llama 1 to 3.3: its table, its config, params.json, and the releases."""
