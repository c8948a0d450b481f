"""Predicts benchmark tasks without a language model: what a model has to beat to be worth its cost."""
