"""Dense decode: query tokens over all tokens of their sequences. Start at interface.py."""
