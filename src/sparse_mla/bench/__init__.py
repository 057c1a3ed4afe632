"""Measurements: workloads, providers, timing, and the rows that tables are made from."""
