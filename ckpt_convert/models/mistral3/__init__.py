"""Mistral 3 (Mistral Small 3.1 and later, with vision): ``table``, and its config.json and params.json."""
