"""Trains a model: losses, the optimizer, one step, the loop, and the runs that use them."""
