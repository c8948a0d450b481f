"""Proves that training is the same at every parallel layout."""
