"""One module for each checkpoint format, with its name table; `registry` finds the one of a path."""
