"""Proves, as a command, that training is the same at every parallel layout."""
