"""Proteins that two splits share are those that sets of their texts share, in blocks of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data import overlap
from esm2mega.data.labels.dataset import LabelledProteins, proteins_of_sequences
from esm2mega.data.overlap import KnownSequences, check_overlap, find_overlap
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from esm2mega.finetune.run import UserParts, read_splits

ENDS = "MKTAYIAKQRLAGVSERT"


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_shared_proteins_are_those_of_sets(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Short ones, repeats, and long ones that differ in the middle alone."""
    monkeypatch.setattr(overlap, "_BLOCK", block)
    rng = np.random.default_rng(5)

    def some(count: int) -> list[str]:
        short = ["".join(rng.choice(list("LAG"), n)) for n in rng.integers(1, 5, count)]
        middles = ["".join(rng.choice(list("WY"), 3)) for _ in range(count)]
        return rng.permutation([*short, *(f"{ENDS}{x}{ENDS}" for x in middles)]).tolist()

    for count in (1, 3, 12, 40):
        held, others = some(count), some(30)
        expected = [row for row, text in enumerate(held) if text in set(others)]
        found = find_overlap(proteins_of_sequences(held), proteins_of_sequences(others))
        known = KnownSequences(map(proteins_of_sequences, (others[:11], others[11:])))
        for rows in (range(count), range(count // 2, count)):
            contained = known.contains(proteins_of_sequences(held), rows)
            assert [row for row in rows if contained[row - rows.start]] == [r for r in expected if r in rows]
        if not expected:
            assert found is None
            continue
        assert found is not None
        assert (found.count, found.row) == (len(expected), expected[0])
        assert others[found.other_row] == held[found.row]


def test_splits_of_stores_and_of_files(tmp_path: Path) -> None:
    """Between any two splits, of several training stores too; labels and ids do not matter."""
    sets = {"a": "MKTAY LAGVS", "b": "WYRQP", "c": "KKKK WYRQP LLLL", "d": "GGGG LLLL"}
    stores = {}
    for name, texts in sets.items():
        fasta = tmp_path / f"{name}.fasta"
        fasta.write_text("".join(f">{name}{n}\n{text}\n" for n, text in enumerate(texts.split())))
        prepare_fasta([fasta], tmp_path / name)
        stores[name] = TokenStore(tmp_path / name / "train")
    splits = {
        "data.train": [stores["a"], stores["b"]],
        "data.valid": [stores["c"]],
        "data.test": [stores["d"]],
    }
    with pytest.raises(
        UserError, match="valid=.*c/train: 1 of 3 proteins are also in data.train=.*b/train, the"
    ):
        check_overlap(splits, allowed=False)
    lines = check_overlap(splits, allowed=True)
    assert [line.split(":")[1] for line in lines] == [
        f" {share} proteins are also in data.{key}={tmp_path}/{name}/train, which "
        "data.allow_overlap=true allows"
        for share, key, name in (("1 of 3", "train", "b"), ("1 of 2", "valid", "c"))
    ]
    assert check_overlap({"data.train": [stores["a"], stores["a"]], "data.test": [stores["d"]]}, False) == []


def test_labelled_splits_are_compared_by_sequence_alone() -> None:
    data, task = DataConfig(), TaskConfig(kind="regression")
    pairs = {"train": [("MK", 1.0), ("LA", 4.0)], "valid": [("WY", 7.0)], "test": [("GG", 1.0), ("LA", 9.0)]}
    message = (
        "data.test: 1 of 2 proteins are also in data.train, the first is '1' .there '1'.*allow_overlap=true"
    )
    with pytest.raises(UserError, match=message):
        read_splits(data, task, UserParts(pairs))
    data.allow_overlap = True
    splits = read_splits(data, task, UserParts(pairs))
    assert splits.notes == [
        "data.test: 1 of 2 proteins are also in data.train, which data.allow_overlap=true allows"
    ]


def test_a_protein_of_no_residues_is_equal_to_another_one_alone() -> None:
    none, one = (
        LabelledProteins(Path(name), ["a"], np.array(tokens, dtype=np.uint8), np.array([0, len(tokens)]))
        for name, tokens in (("none", [5]), ("one", [5, 6]))
    )
    empty = LabelledProteins(
        Path("e"), ["a", "b"], np.array([5], dtype=np.uint8), np.array([0, 0, 1], dtype=np.int64)
    )
    assert find_overlap(empty, none) == overlap.Overlap(1, 1, 0)
    assert find_overlap(empty, one) is None
    assert find_overlap(empty, empty) == overlap.Overlap(2, 0, 0)
