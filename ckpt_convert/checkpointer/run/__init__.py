"""The output directory of a run: its saved steps, their names, which are due and which are kept."""
