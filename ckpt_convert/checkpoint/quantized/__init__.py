"""Quantized checkpoints: telling them, carrying them as they are, and reading them as the numbers that they stand for.

A quantized tensor is several stored ones: codes, and what turns them into numbers again. ``recognise`` says which
belong together. Laid out anew in their own format, they are carried bit for bit (``carry``). For everything else,
``view`` gives files in which each of them is one ordinary tensor, computed where it is read: no table of a family, no
plan and no check has to know of quantization.
"""
