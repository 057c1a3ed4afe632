"""Accuracy as users feel it: problems answered by a model whose attention runs through our ops."""
