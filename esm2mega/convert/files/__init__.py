"""Files as other programs write them: archives, pickles, sharded and per-rank weights, vocabularies.

Nothing in them is trusted.
"""
