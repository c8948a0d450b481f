"""Measures a model during its pretraining: a small head on frozen embeddings of benchmark proteins."""
