"""Changing a pinned kernel with proof: compare, lock, verify, bisect, bump, report."""
