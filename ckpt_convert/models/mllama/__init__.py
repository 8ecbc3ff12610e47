"""Llama 3.2 with vision: its table and its configs."""
