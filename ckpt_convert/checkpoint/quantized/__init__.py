"""Quantized checkpoints: detecting them, passing them through, and reading them as dequantized values.

A quantized tensor is several stored tensors: codes, and the scales that turn codes into values. ``detect`` says which
belong together. Re-sharded within their own format, they pass through bit for bit (``as_stored``). For everything else
``view`` gives files in which each is one ordinary tensor that is dequantized on read, so that no table of a family, no
plan and no check deals with quantization.
"""
