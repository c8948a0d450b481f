"""Knows the configuration keys of five earlier systems: answers them with ours, and translates files."""
