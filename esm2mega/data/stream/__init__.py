"""From a token store to micro-batches: samples, packs, masks, and a loader that builds ahead."""
