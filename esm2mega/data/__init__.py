"""Turns files of sequences into micro-batches: readers, token stores, samples and packs, and labels."""
