"""Reads and writes other checkpoint formats: one name table each, streamed tensors, no trust in files."""
