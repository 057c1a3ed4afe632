"""A provider in a process of its own: other interpreter, time limits, crashes that are results."""
