"""Checkpoints: directories that any parallel layout can read, complete or not there at all."""
