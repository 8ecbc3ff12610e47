"""Rows that the tables of several families share."""
