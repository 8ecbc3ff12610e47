"""Mistral: its table and its configs."""
