"""From files of sequences to micro-batches: readers, token stores, samples and packs, and labels."""
