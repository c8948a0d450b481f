"""Measures a model during its pretraining: frozen embeddings of benchmark proteins, and a small head on them."""
