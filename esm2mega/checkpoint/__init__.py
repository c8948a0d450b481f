"""Saves and loads checkpoints, which any parallel layout can read and which are complete or absent."""
