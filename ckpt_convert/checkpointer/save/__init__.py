"""Saving a step: planning, writing, signals."""
