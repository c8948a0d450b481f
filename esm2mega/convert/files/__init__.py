"""Reads and writes files of other programs: pickles, sharded and per-rank weights, vocabularies.

Nothing in these files is trusted.
"""
