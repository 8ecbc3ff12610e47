"""The language of the tables, and what reads configs: rows, tables, their checks."""
