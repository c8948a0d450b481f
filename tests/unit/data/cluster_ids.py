"""The ids of a store's clusters, read with numpy alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from esm2mega.data.store.token_store import TokenStore


def cluster_ids(store: TokenStore) -> list[str]:
    text = (store.path / "clusters.ids.bin").read_bytes()
    offsets = np.load(store.path / "clusters.ids.offsets.npy").tolist()
    assert offsets[-1] == len(text)
    return [text[first:stop].decode() for first, stop in pairwise(offsets)]
