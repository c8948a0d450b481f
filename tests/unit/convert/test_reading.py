"""What does not fit the name table is named; nothing is passed over in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esm2mega.convert.files.stores import MemoryStore
from esm2mega.convert.formats import fair_esm, hf
from esm2mega.convert.lazy_weights import Description, Weights
from esm2mega.convert.name_table import our_shapes
from esm2mega.convert.reading import from_store
from esm2mega.errors import UserError
from tests import foreign

DESCRIPTION = Description(hf.describe(Path("config.json"), foreign.HF_CONFIG).shape, 1e-5)


@pytest.fixture
def state() -> dict[str, Tensor]:
    pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")
    return {name: value.clone() for name, value in foreign.hf_state(foreign.truth(torch.float32)).items()}


def read(state: dict[str, Tensor], *drop: str) -> Weights:
    return from_store(MemoryStore(Path("x"), state), hf.NAMES, DESCRIPTION, drop=drop)


def test_every_tensor_of_the_model_has_one_row() -> None:
    shape = DESCRIPTION.shape
    for table in (hf.NAMES, fair_esm.NAMES):
        entries = table.entries(shape)
        assert sorted(entry.ours for entry in entries) == sorted(our_shapes(shape))
        parts = [part for entry in entries for part in entry.theirs]
        assert len(parts) == len(set(parts))
        assert not any("{" in part for part in parts)


def lose(state: dict[str, Tensor]) -> None:
    del state["lm_head.dense.bias"]


def lose_one_of_the_frequencies(state: dict[str, Tensor]) -> None:
    del state["esm.encoder.layer.3.attention.self.rotary_embeddings.inv_freq"]


def add(state: dict[str, Tensor]) -> None:
    state["esm.encoder.layer.0.attention.self.query.lora_A"] = torch.zeros(2)


def swap_axes(state: dict[str, Tensor]) -> None:
    state["esm.encoder.layer.2.output.dense.weight"] = torch.zeros(foreign.F, foreign.H)


def pad_rows(state: dict[str, Tensor]) -> None:
    state["lm_head.bias"] = torch.zeros(64)


def stale_decoder(state: dict[str, Tensor]) -> None:
    state["lm_head.decoder.weight"] = state["esm.embeddings.word_embeddings.weight"] + 1e-3


def unequal_frequencies(state: dict[str, Tensor]) -> None:
    state["esm.encoder.layer.1.attention.self.rotary_embeddings.inv_freq"] += 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, "1 tensor is missing: lm_head.dense.bias"),
        (lose_one_of_the_frequencies, "1 tensor is missing: .*layer.3.*inv_freq"),
        (add, "1 tensor has no place in this model: .*lora_A; `esm2mega convert --drop"),
        (swap_axes, r"layer.2.output.dense.weight is float32 \[192, 48\], a model .* has \[48, 192\]"),
        (pad_rows, r"lm_head.bias is float32 \[64\], a model of this shape has \[33\]"),
        (stale_decoder, "lm_head.decoder.weight differs from the token table"),
        (unequal_frequencies, "frequencies differ between layers"),
    ],
)
def test_what_does_not_fit_is_refused(
    state: dict[str, Tensor], change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    change(state)
    with pytest.raises(UserError, match=message):
        read(state)


def test_what_is_left_out_is_listed(state: dict[str, Tensor]) -> None:
    state["esm.embeddings.position_ids"] = torch.arange(1026)
    state["lm_head.decoder.weight"] = state["esm.embeddings.word_embeddings.weight"].clone()
    state["mine.extra"] = torch.zeros(1)
    state["esm.pooler.dense.weight"] = torch.zeros(foreign.H, foreign.H)
    for name in ("weight", "bias"):
        state[f"esm.contact_head.regression.{name}"].zero_()
    weights = read(state, "mine.*")
    assert sorted(line.partition(":")[0] for line in weights.notes.dropped) == [
        "contact head",
        "esm.embeddings.position_ids",
        "esm.pooler.dense.weight",
        "lm_head.decoder.weight",
        "mine.extra",
    ]
    assert not weights.has_contact_head


def test_mixed_dtypes_meet_in_the_one_that_holds_all(state: dict[str, Tensor]) -> None:
    state["lm_head.dense.weight"] = state["lm_head.dense.weight"].bfloat16()
    state["lm_head.dense.bias"] = state["lm_head.dense.bias"].half()
    weights = read(state)
    assert weights.description.dtype == torch.float32
    assert torch.equal(weights.read("lm_head.dense.weight"), state["lm_head.dense.weight"].float())
    assert any("float16" in line and "bfloat16" in line for line in weights.notes.changed)


def test_a_cast_leaves_the_frequencies_alone(state: dict[str, Tensor]) -> None:
    weights = read(state).cast(torch.bfloat16)
    assert weights.read("rotary.inv_freq").dtype == torch.float32
    assert weights.read("lm_head.dense.weight").dtype == torch.bfloat16
    assert weights.notes.changed == ["weights from float32 to bfloat16, rounded"]


def test_absent_frequencies_are_the_formula_and_said_to_be(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if name.endswith("inv_freq")]:
        del state[name]
    weights = read(state)
    d = foreign.H // foreign.A
    expected = 10000.0 ** -(torch.arange(0, d, 2).double() / d)
    assert torch.allclose(weights.read("rotary.inv_freq").double(), expected, rtol=1e-7)
    assert weights.notes.filled == ["rotary.inv_freq: by formula, the source has none"]
