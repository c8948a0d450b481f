"""The recipe of evaluation: masks that follow from `eval.seed` and the residues, and the hash of its name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega import vocabulary
from esm2mega.config.schema import DataConfig, EvalConfig
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.loader import EvalPacks
from esm2mega.data.stream.recipe import describe_masks, masks_recipe
from tests.unit.data.chi_square import assert_matches, assert_uniform

AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWC"
SPEC = BatchSpec(DataConfig(max_seq_length=64, pack_window=50), micro_batch_tokens=256, seed=1)
MASKS = EvalConfig()
RNG = np.random.default_rng(0)
# 60 proteins of 1 to 178 residues: a third of them are longer than a chunk.
PROTEINS = ["".join(RNG.choice(list(AMINO_ACIDS), size=1 + 3 * i)) for i in range(60)]


def write(path: Path, proteins: Sequence[str]) -> TokenStore:
    with StoreWriter(path) as writer:
        writer.append([f"p{i}" for i in range(len(proteins))], [text.encode() for text in proteins])
    return TokenStore(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write(tmp_path_factory.mktemp("recipe") / "store", PROTEINS)


Masked = dict[str, tuple[str, list[int]]]


def masked(store: TokenStore, spec: BatchSpec = SPEC, masks: EvalConfig = MASKS, dp_size: int = 1) -> Masked:
    """For each protein, put together from its chunks: what the model sees, and which tokens it predicts."""
    pieces: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for rank in range(dp_size):
        packs = EvalPacks(store, spec, masks, 0, rank, dp_size)
        planned = list(packs._packs())[rank::dp_size]
        for pack, batch in zip(planned, packs, strict=False):
            original = batch.input_ids.clone()
            original[batch.label_positions] = batch.labels
            for row, start, length, offset in zip(
                *(part.tolist() for part in (pack.pieces.rows, pack.pieces.starts, pack.pieces.lengths)),
                pack.offsets.tolist(),
                strict=True,
            ):
                span = slice(offset, offset + length)
                pieces[row, start] = batch.input_ids[span].tolist(), original[span].tolist()
    found: Masked = {}
    for row in range(len(store)):
        seen, original = (
            sum((pieces[key][part] for key in sorted(pieces) if key[0] == row), []) for part in (0, 1)
        )
        name = vocabulary.decode(np.array(original, dtype=np.uint8)[1:-1])
        result = vocabulary.decode(np.array(seen, dtype=np.uint8)), original
        assert found.setdefault(name, result) == result, "equal proteins have equal masks"
    return found


@pytest.fixture(scope="module")
def expected(store: TokenStore) -> Masked:
    found = masked(store)
    assert list(found) == PROTEINS, "every protein is there once, whole"
    assert sum(text.count("<mask>") for text, _ in found.values()) > 300
    return found


def test_masks_follow_from_the_residues_whatever_the_store(expected: Masked, tmp_path: Path) -> None:
    """Other numbers, another order, other company, duplicates."""
    others = ["".join(RNG.choice(list(AMINO_ACIDS), size=90)) for _ in range(10)]
    mixed = write(tmp_path / "mixed", [*others, *reversed(PROTEINS), PROTEINS[50], PROTEINS[3]])
    found = masked(mixed)
    assert {name: found[name] for name in PROTEINS} == expected


@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, micro_batch_tokens=64),
        replace(SPEC, seed=2),
        replace(SPEC, data=replace(SPEC.data, pack_window=7)),
        replace(SPEC, data=replace(SPEC.data, packing="bucket")),
    ],
    ids=["T", "seed", "window", "bucket"],
)
def test_masks_do_not_depend_on_packs_and_ranks(
    store: TokenStore, expected: Masked, spec: BatchSpec, dp_size: int
) -> None:
    assert masked(store, spec, dp_size=dp_size) == expected


@pytest.mark.parametrize(
    "of_training",
    [{"mlm_probability": 0.5}, {"mask_fraction": 0.2}, {"random_fraction": 0.0}, {"random_residues": "all"},
     {"crop": "start"}, {"crop": "chunk"}],
    ids=str,
)  # fmt: skip
def test_masks_do_not_depend_on_those_of_training(
    store: TokenStore, expected: Masked, of_training: dict[str, Any]
) -> None:
    assert masked(store, replace(SPEC, data=replace(SPEC.data, **of_training))) == expected


def test_chunks_are_masked_as_the_whole_protein(store: TokenStore, expected: Masked) -> None:
    """The cuts move no mask: with chunks of any length the same residues are predicted."""
    for length in (32, 100, 256):
        spec = replace(SPEC, data=replace(SPEC.data, max_seq_length=length))
        assert masked(store, spec) == expected


def test_each_key_of_the_section_changes_the_masks(store: TokenStore, expected: Masked) -> None:
    others = {"mlm_probability": 0.3, "mask_fraction": 0.5, "random_fraction": 0.2, "seed": 1}
    assert others.keys() == {field.name for field in fields(EvalConfig)}
    for key, value in others.items():
        changed = masked(store, masks=replace(MASKS, **{key: value}))
        assert changed.keys() == expected.keys() and changed != expected, key


def test_masks_are_pinned(tmp_path: Path) -> None:
    """These masks must be the same on every machine and in every later version: `_VERSION` names a change."""
    found = masked(
        write(tmp_path / "store", ["MKTLAGVSERTIDPKQNFYMHWCXBUZO.-" * 2, "ACDEFGHIKLMNPQRSTVWY" * 2])
    )
    assert [text for text, _ in found.values()] == [
        "<cls>MKTLAGVSERTIDPKQNFYMHWCXBUZO.-MKTLAGVSERT<mask>DPKQNFYMHW<mask>XBU<mask><mask>.-<eos>",
        "<cls>ACDEFG<mask>IKLMNPQRST<mask><mask>YRC<mask>EF<mask>HIKLMN<mask><mask>RS<mask>VWY<eos>",
    ]


def test_ratios_over_many_proteins(tmp_path: Path) -> None:
    """15 %, 80/10/10, residues uniform over the twenty, every place of a protein alike."""
    size, length = 2000, 300
    letters = np.frombuffer(AMINO_ACIDS.encode(), dtype=np.uint8)
    proteins = [RNG.choice(letters, size=length).tobytes().decode() for _ in range(size)]
    store = write(tmp_path / "many", proteins)
    spec = BatchSpec(DataConfig(), micro_batch_tokens=4096, seed=1)
    chosen, now, original = [], [], []
    for batch in EvalPacks(store, spec, MASKS):
        begins = np.array(batch.cu_seqlens)[:-1]
        positions = batch.label_positions.numpy()
        chosen.append(positions - begins[np.searchsorted(begins, positions, side="right") - 1])
        now.append(batch.input_ids[batch.label_positions].numpy())
        original.append(batch.labels.numpy())
    places, seen, labels = (np.concatenate(parts) for parts in (chosen, now, original))
    assert_matches([len(places), size * length - len(places)], [0.15, 0.85])
    assert_uniform(np.bincount(places, minlength=length + 2)[1:-1])
    to_mask, same = int((seen == vocabulary.MASK).sum()), int((seen == labels).sum())
    # A random residue is the old one in 1 of 20 cases.
    assert_matches([to_mask, same, len(places) - to_mask - same], [0.8, 0.105, 0.095])
    others = np.bincount(seen[(seen != vocabulary.MASK) & (seen != labels)], minlength=33)
    assert others[:4].sum() == others[24:].sum() == 0
    assert_uniform(others[4:24])


def test_the_hash_is_that_of_a_text_that_anyone_can_write() -> None:
    text = (
        '{"mask_fraction":0.8,"max_seq_length":1024,"mlm_probability":0.15,"random_fraction":0.1,'
        '"random_residues":"amino_acids","seed":0,"version":1,"what":"masks"}'
    )
    assert masks_recipe(MASKS, 1024) == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_every_key_and_the_length_change_the_hash() -> None:
    recipes = [MASKS, EvalConfig(0.2), EvalConfig(0.15, 0.7), EvalConfig(0.15, 0.8, 0.2), EvalConfig(seed=5)]
    hashes = {masks_recipe(masks, length) for masks in recipes for length in (512, 1024)}
    assert len(hashes) == 10


def test_the_recipe_in_words() -> None:
    assert describe_masks(MASKS, 512) == (
        "0.15 of the residues, of these 0.8 <mask>, 0.1 random, 0.1 kept; eval.seed=0, chunks of at most 512 "
        "tokens"
    )
