"""Turns token stores into micro-batches: samples, packs, masks, and a loader that builds ahead."""
