"""Stores that are reached over a network: object stores, the Hub, web servers."""
