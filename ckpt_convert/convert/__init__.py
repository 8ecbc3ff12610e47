"""Conversion: the plan of an output, its execution, publishing, and the same for state dicts in memory."""
