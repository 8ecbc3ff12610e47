"""Llama 4: its table, its config, and params.json."""
