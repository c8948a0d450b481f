"""What a pass over the data side does is the work itself, not a promise of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from esm2mega.benchmark import data


def test_loading_takes_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream gives the batches of a step one by one, as they are asked for."""
    taken: list[int] = []

    class Stream:
        def __init__(self, *unused: Any) -> None: ...
        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *unused: Any) -> None: ...
        def next_step(self, count: int) -> Iterator[int]:
            for number in range(count):
                taken.append(number)
                yield number

    monkeypatch.setattr(data, "TrainStream", Stream)
    monkeypatch.setattr(data, "_planned", lambda *unused: [])
    spec: Any = SimpleNamespace(data=SimpleNamespace(workers=0))
    store: Any = None
    with data.loading(store, spec, packs=3) as work:
        assert taken == [0], "the stream has started"
        work.run()
    assert taken == [0, 0, 0, 0]
