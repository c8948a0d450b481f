"""A model in each foreign format, converted, gives the logits of fair-esm; and back again, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.store import load_weights
from esm2mega.config.schema import ParallelConfig
from esm2mega.convert.convert import convert
from esm2mega.convert.formats import open_weights
from esm2mega.model.build import build_model
from esm2mega.model.packed import pack, unpack
from esm2mega.parallel.initialize import process_groups
from tests import foreign
from tests.parity import references
from tests.parity.test_esm2_parity import TOLERANCE

pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


def logits_of(checkpoint: Path, precision: str, batch: references.Batch) -> Tensor:
    """Ours, ``[b, s, 33]``."""
    config = layout.read_config(checkpoint).model
    config.precision = precision
    (model,) = build_model(config, ParallelConfig(), torch.device("cpu"), seed=5)
    load_weights(checkpoint, [model])
    ids, packed = pack(batch.input_ids, batch.attention_mask)
    with torch.no_grad():
        return unpack(model(ids, packed), batch.attention_mask)


def relative(actual: Tensor, expected: Tensor, batch: references.Batch) -> float:
    keep = batch.attention_mask.bool()
    return float((actual - expected)[keep].abs().max() / expected[keep].abs().max())


CASES: dict[str, tuple[str, bool, Callable[[foreign.Truth, Path], Path]]] = {
    "hf": ("fp16", False, foreign.write_hf),
    "fair-esm": ("fp16", False, foreign.write_fair_esm),
    "te": ("formula", True, foreign.write_te),
    "te, concatenated, 64 rows": (
        "formula",
        True,
        lambda reference, folder: foreign.write_te(reference, folder, interleaved=False, rows=64),
    ),
    "cerebras": ("formula", False, foreign.write_cerebras),
    "nemo1": ("fp16", False, foreign.write_nemo1),
    "nemo1, gzip, TP2": (
        "fp16",
        False,
        lambda reference, folder: foreign.write_nemo1(reference, folder, tp=2, mode="w:gz"),
    ),
    "nemo1, TP2 x PP2": (
        "fp16",
        False,
        lambda reference, folder: foreign.write_nemo1(reference, folder, tp=2, pp=2),
    ),
    "nemo2": ("formula", True, foreign.write_nemo2),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_source(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64: every value, the frequencies and the form of GELU must be right to 1e-10. The batch has padding,
    ``<mask>`` and 700 tokens, and every tensor of the source is random.
    """
    frequencies, tanh, write = CASES[case]
    reference = foreign.truth(torch.float64, frequencies, tanh)
    path = write(reference, tmp_path)
    convert(path, tmp_path / "ours", "esm2mega")
    batch = references.batch()
    expected = foreign.run(reference, batch.input_ids, monkeypatch)
    difference = relative(logits_of(tmp_path / "ours", "fp64", batch), expected, batch)
    print(f"{case}: {difference:.1e}")
    assert difference <= TOLERANCE.fp64


@pytest.mark.parametrize("target", ["hf", "fair-esm", "te", "cerebras"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trips_are_bitwise(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    frequencies = "fp16" if target in ("hf", "fair-esm") else "formula"
    reference = foreign.truth(torch.float32, frequencies)
    convert(
        foreign.write_hf(reference, tmp_path),
        tmp_path / "first",
        "esm2mega",
        dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype],
    )
    name = {"fair-esm": "esm2_x.pt", "cerebras": "x.mdl"}.get(target, "there")
    there = convert(tmp_path / "first", tmp_path / name, target)
    convert(tmp_path / name, tmp_path / "second", "esm2mega")
    first, second = (open_weights(tmp_path / name) for name in ("first", "second"))
    lost = (
        {n for n in first.infos if n.startswith("contact_head.")} if target in ("te", "cerebras") else set()
    )
    assert len(lost) == sum(line.startswith("contact_head.") for line in there.notes.dropped)
    assert set(first.infos) - lost == set(second.infos)
    for tensor in second.infos:
        assert first.infos[tensor] == second.infos[tensor]
        assert torch.equal(first.read(tensor), second.read(tensor)), tensor


def run_transformers(path: Path, batch: references.Batch) -> Tensor:
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    with torch.no_grad():
        return model(batch.input_ids, attention_mask=batch.attention_mask).logits


def test_transformers_and_fair_esm_load_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both packages load without complaint and give the same logits and contacts as the source, frequencies
    rounded to fp16 included.
    """
    import esm
    from transformers import AutoTokenizer, EsmForMaskedLM

    reference = foreign.truth(torch.float32, "fp16")
    convert(foreign.write_fair_esm(reference, tmp_path), tmp_path / "ours", "esm2mega")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    convert(tmp_path / "ours", tmp_path / "esm2_y.pt", "fair-esm")
    batch = references.batch()
    expected = foreign.run(reference, batch.input_ids, monkeypatch)

    _, info = EsmForMaskedLM.from_pretrained(tmp_path / "hf", local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert relative(run_transformers(tmp_path / "hf", batch), expected, batch) <= TOLERANCE.fp32
    assert relative(logits_of(tmp_path / "ours", "fp32", batch), expected, batch) <= TOLERANCE.fp32

    # As fair-esm loads it: strictly, with the contact head from the file beside it.
    original = torch.load
    monkeypatch.setattr("torch.load", lambda *a, **k: original(*a, **{**k, "weights_only": False}))
    model, alphabet = esm.pretrained.load_model_and_alphabet_local(tmp_path / "esm2_y.pt")
    model.eval()
    with torch.no_grad():
        assert relative(model(batch.input_ids)["logits"], expected, batch) == 0.0
        assert torch.equal(
            model.predict_contacts(batch.input_ids), reference.model.predict_contacts(batch.input_ids)
        )

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert tokenizer("MKXBUZO.-<mask>L").input_ids == alphabet.encode("<cls>MKXBUZO.-<mask>L<eos>")
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (1, 32)


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    """5.23 stores the frequencies under a literal asterisk and LayerNorms as gamma and beta; both count."""
    from transformers import EsmForMaskedLM

    reference = foreign.truth(torch.float32, "fp16")
    first = foreign.write_hf(reference, tmp_path)
    EsmForMaskedLM.from_pretrained(first, local_files_only=True).save_pretrained(tmp_path / "saved")
    expected, actual = open_weights(first), open_weights(tmp_path / "saved")
    assert expected.infos.keys() == actual.infos.keys()
    for name in expected.infos:
        assert torch.equal(expected.read(name), actual.read(name)), name


def test_rounded_frequencies_change_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputing them would be no rounding error: it shows 1000 times above it."""
    rounded = foreign.truth(torch.float32, "fp16")
    exact = foreign.truth(torch.float32, "formula")
    batch = references.batch()
    a, b = (foreign.run(reference, batch.input_ids, monkeypatch) for reference in (rounded, exact))
    assert relative(a, b, batch) > 1000 * TOLERANCE.fp64
    folder: Any = tmp_path
    convert(foreign.write_hf(rounded, folder), folder / "ours", "esm2mega")
    ours = logits_of(folder / "ours", "fp32", batch)
    assert relative(ours, a, batch) <= TOLERANCE.fp32 < relative(ours, b, batch) / 3
