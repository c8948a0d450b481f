"""Compares a conversion with its source by a second, independent implementation.

The layouts of the weights and the forward passes are written down here a second time on purpose: they share
no code with `esm2mega.convert.formats` and `esm2mega.model`, so that a mistake there cannot hide itself.
"""
