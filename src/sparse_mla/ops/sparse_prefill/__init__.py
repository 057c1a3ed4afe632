"""Sparse prefill: a ragged run of query tokens over one KV buffer. Start at interface.py."""
