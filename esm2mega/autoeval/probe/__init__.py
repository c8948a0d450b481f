"""Trains small heads on embeddings in HDF5 files, and measures them: `probe`."""
