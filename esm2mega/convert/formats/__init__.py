"""Holds one module with a name table for each checkpoint format; `registry` finds the format of a path."""
