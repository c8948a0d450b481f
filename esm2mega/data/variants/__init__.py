"""Reads variants of a protein, as tables write them, and makes their sequences."""
