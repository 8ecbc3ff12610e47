"""Mixtral: its tables and their configs."""
