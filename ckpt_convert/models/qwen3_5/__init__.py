"""Qwen 3.5: ``table`` has the mappings; its config.json."""
