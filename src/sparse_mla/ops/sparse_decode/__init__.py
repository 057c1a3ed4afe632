"""Sparse decode: query tokens over selected tokens of a paged cache. Start at interface.py."""
