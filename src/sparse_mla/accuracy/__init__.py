"""The gate: real bugs as inputs, a float64 oracle, budgets with a derivation, named faults."""
