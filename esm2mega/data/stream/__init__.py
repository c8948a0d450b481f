"""From a token store to micro-batches: samples, packs, masks, and the loader that builds ahead."""
