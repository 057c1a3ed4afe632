"""The cache's writer: quantise tokens and store them at their slots. Start at interface.py."""
