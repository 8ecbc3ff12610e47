"""Qwen 3.5: its tables and their configs."""
