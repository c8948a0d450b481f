"""A store that knows lengths alone, which is all that sampling and packing look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data.store.clusters import MEMBERS, OFFSETS, Clusters


class Lengths:
    """Stands in for a `TokenStore`."""

    def __init__(self, lengths: npt.ArrayLike, clusters: Sequence[Sequence[int]] | None = None) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.path = Path("store")
        self.fingerprint = "0" * 64
        self.manifest: dict[str, Any] = {"files": {}}
        self.clusters = None
        if clusters is not None:
            ends = np.cumsum([0, *map(len, clusters)])
            self.clusters = Clusters(ends, np.concatenate([np.array(rows) for rows in clusters]))
            self.manifest["files"] = {name: {"sha256": "0" * 64} for name in (OFFSETS, MEMBERS)}

    def __len__(self) -> int:
        return len(self.lengths)

    def id(self, row: int) -> str:
        return f"p{row}"
