"""The first proteins of a store count as a store of their own, in training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig
from esm2mega.data.store.limit import limit_notes, limited
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.errors import UserError
from esm2mega.train.pretrain import pretrain
from tests.unit.conftest import TinyRun
from tests.unit.runs import tiny_run


def copy_of_first(store: TokenStore, count: int, path: Path) -> TokenStore:
    from esm2mega import vocabulary

    with StoreWriter(path) as writer:
        texts = [vocabulary.decode(store.residues(row)).encode() for row in range(count)]
        writer.append([store.id(row) for row in range(count)], texts)
    return TokenStore(path)


def test_a_view_has_what_a_store_of_these_proteins_has(finished: TinyRun, tmp_path: Path) -> None:
    store = TokenStore(finished.train)
    view, alone = limited(store, DataConfig(limit=7)), copy_of_first(store, 7, tmp_path / "s")
    assert len(view) == len(alone) == 7
    assert [view.id(row) for row in range(7)] == [alone.id(row) for row in range(7)]
    np.testing.assert_array_equal(view.lengths, alone.lengths)
    np.testing.assert_array_equal(view.token_counts, alone.token_counts)
    for row in range(7):
        np.testing.assert_array_equal(view.residues(row), alone.residues(row))
    assert view.fingerprint != store.fingerprint != limited(store, DataConfig(limit=6)).fingerprint
    with pytest.raises(IndexError):
        view.id(7)
    assert limited(store, DataConfig(limit=1000)) is store and limited(store, DataConfig()) is store
    assert list(limit_notes({"data.train": [view, store]}, DataConfig(limit=7))) == [
        f"the first 7 of {len(store)} proteins of data.train are taken (data.limit=7)"
    ]


def test_clusters_are_not_cut_off(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s") as writer:
        writer.append(["a", "b", "c"], [b"MK", b"ML", b"MV"])
        writer.append_clusters(["x"], np.array([3]), np.arange(3))
    store = TokenStore(tmp_path / "s")
    with pytest.raises(UserError, match=r"data.limit=2 .* set data.sampling=sequences"):
        limited(store, DataConfig(limit=2))
    assert limited(store, DataConfig(limit=2, sampling="sequences")).clusters is None
    assert limited(store, DataConfig(limit=3)) is store


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_a_part_is_training_on_a_store_of_it(
    finished: TinyRun, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for name, count in (("train", 9), ("valid", 4)):
        copy_of_first(TokenStore(getattr(finished, name)), count, tmp_path / name)
    whole = [f"data.train={finished.train}", f"data.valid={finished.valid}"]
    parts = [f"data.train={tmp_path / 'train'}", f"data.valid={tmp_path / 'valid'}"]
    copy_of_first(TokenStore(finished.train), 4, tmp_path / "four")
    for run_dir, words in (
        ("limit", [*whole, "data.limit=4"]),
        ("alone", [f"data.train={tmp_path / 'four'}", parts[1]]),
    ):
        settings = ["train.max_steps=2", "train.eval_every=2", f"data.workers={workers}", *words]
        pretrain(tiny_run(*settings, run_dir=tmp_path / run_dir))
        records = [json.loads(line) for line in (tmp_path / run_dir / "log.jsonl").read_text().splitlines()]
        losses.append([record.get("loss", record.get("valid_loss")) for record in records])
    assert losses[0] == losses[1] and len(losses[0]) >= 3
    said = capsys.readouterr().err
    assert "proteins of data.train are taken (data.limit=4)" in said
    assert "proteins of data.valid are taken (data.limit=4)" in said


def test_an_evaluation_takes_the_part_and_a_checkpoint_says_nothing_of_it(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_of_first(TokenStore(finished.valid), 3, tmp_path / "v")
    results = []
    for data, *words in ((finished.valid, "data.limit=3"), (tmp_path / "v",), (finished.valid,)):
        out = tmp_path / "e.json"
        assert main(["evaluate", str(finished.run_dir), "--data", str(data), "--out", str(out), *words]) == 0
        results.append(json.loads(out.read_text()))
        out.unlink()
    assert results[0]["loss"] == results[1]["loss"] and results[0]["num_sequences"] == 3
    assert results[2]["num_sequences"] == len(TokenStore(finished.valid)) > 3
    command = ["embed", str(finished.run_dir), str(finished.valid), "--out", str(tmp_path / "e.h5")]
    assert main([*command, "data.limit=3"]) == 2
    assert "data.limit=3 is for training and evaluation" in capsys.readouterr().err
