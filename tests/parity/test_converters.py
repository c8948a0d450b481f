"""A model in each foreign format, converted, gives the logits of fair-esm; and back again, bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.store import load_weights
from esm2mega.config.schema import ParallelConfig
from esm2mega.convert.convert import convert
from esm2mega.convert.files.vocabulary import write_tokenizer
from esm2mega.convert.formats.registry import open_weights
from esm2mega.model.build import build_model
from esm2mega.parallel.initialize import process_groups
from esm2mega.vocabulary import encode_residues
from tests import foreign, foreign_bert
from tests.padded import pack, unpack
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
    "te, the older prefix": (
        "formula",
        True,
        lambda reference, folder: foreign.write_te(reference, folder, prefix="esm."),
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
    "nemo1, unpacked, TP2 x PP2": (
        "fp16",
        False,
        lambda reference, folder: foreign.unpacked(foreign.write_nemo1(reference, folder, tp=2, pp=2)),
    ),
    "nemo2": ("formula", True, foreign.write_nemo2),
}


@pytest.mark.some(4)
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


@pytest.mark.some(4)
@pytest.mark.parametrize("target", ["hf", "fair-esm", "te", "nemo2", "cerebras"])
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
        {n for n in first.infos if n.startswith("contact_head.")}
        if target in ("te", "nemo2", "cerebras")
        else set()
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
    """Recomputing or rounding them would be no rounding error: it shows 1000 times above it. Each model keeps
    its own.
    """
    batch = references.batch()
    expected, actual = {}, {}
    for frequencies in ("fp16", "formula"):
        reference = foreign.truth(torch.float32, frequencies)
        folder = tmp_path / frequencies
        folder.mkdir()
        convert(foreign.write_hf(reference, folder), folder / "ours", "esm2mega")
        expected[frequencies] = foreign.run(reference, batch.input_ids, monkeypatch)
        actual[frequencies] = logits_of(folder / "ours", "fp32", batch)
    assert relative(expected["fp16"], expected["formula"], batch) > 1000 * TOLERANCE.fp64
    for mine, other in (("fp16", "formula"), ("formula", "fp16")):
        assert relative(actual[mine], expected[mine], batch) <= TOLERANCE.fp32
        assert relative(actual[mine], expected[other], batch) > 3 * TOLERANCE.fp32


def test_vocabulary_padding_takes_no_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 rows in the file, whose bias of 0 would have a share of the softmax."""
    reference = foreign.truth(torch.float64, "formula", tanh=True)
    convert(foreign.write_nemo2(reference, tmp_path), tmp_path / "ours", "esm2mega")
    batch = references.batch()
    expected = foreign.run(reference, batch.input_ids, monkeypatch)
    logits = logits_of(tmp_path / "ours", "fp64", batch)
    assert logits.shape[-1] == 33
    difference = relative(logits.log_softmax(-1), expected.log_softmax(-1), batch)
    assert difference <= TOLERANCE.fp64
    padded = torch.cat((expected, expected.new_zeros(*expected.shape[:-1], 128 - 33)), dim=-1)
    assert relative(padded.log_softmax(-1)[..., :33], expected.log_softmax(-1), batch) > 0.01


def test_a_reference_without_a_mask_is_another_model(tmp_path: Path) -> None:
    """Padding that takes part changes what transformers computes; ours equals it with the mask."""
    reference = foreign.truth(torch.float32)
    source = foreign.write_hf(reference, tmp_path)
    convert(source, tmp_path / "ours", "esm2mega")
    batch = references.batch()
    ours = logits_of(tmp_path / "ours", "fp32", batch)
    assert relative(ours, run_transformers(source, batch), batch) <= TOLERANCE.fp32
    unmasked = references.Batch(batch.input_ids, torch.ones_like(batch.input_ids), batch.labels)
    assert relative(ours, run_transformers(source, unmasked), batch) > 100 * TOLERANCE.fp32


def test_tokenizers_differ_in_runs_of_unknown_residues(tmp_path: Path) -> None:
    """The tokenizer that is written is the one of transformers: J and J become one token, here they stay two,
    so residues and vectors keep their places.
    """
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(foreign.HF_CONFIG))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    known = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
    assert tokenizer(known, add_special_tokens=False).input_ids == encode_residues(known).tolist()
    assert tokenizer("MJJK", add_special_tokens=False).input_ids == [20, 3, 15]
    assert encode_residues("MJJK").tolist() == [20, 3, 3, 15]


def test_references_show_every_mistake() -> None:
    """No tensor is trivial or the twin of another, so a swap or a loss of any of them moves the logits."""
    pytest.importorskip("tape", reason="tape-proteins is not installed: pip install esm2mega[dev]")
    batch = references.batch()
    assert (batch.attention_mask == 0).any() and (batch.input_ids == 32).any()
    assert batch.attention_mask.sum(-1).max() > 256
    for module in (foreign, foreign_bert):
        assert len({module.L, module.H, module.A, module.F, module.H // module.A}) == 5
        assert module.A >= 2 and module.H // module.A >= 4
        parameters = dict(module.truth(torch.float32).model.named_parameters())
        assert len(parameters) > 60
        for name, value in parameters.items():
            assert value.numel() == 1 or value.std() > 0.01, name
        assert len({value.double().sum().item() for value in parameters.values()}) == len(parameters)


_LOAD_WITH_4 = """
import sys, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, out = sys.argv[1:]
model, info = AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
batch = tokenizer("MKXBUZO.-<mask>LAGVS", return_tensors="pt")
torch.save({"ids": batch.input_ids, "logits": model.eval()(**batch).logits.detach()}, out)
"""


def test_transformers_4_loads_what_is_written(tmp_path: Path) -> None:
    """The last release of the older line, in an environment of its own that this variable names."""
    python = os.environ.get("ESM2MEGA_TRANSFORMERS_4")
    if python is None:
        pytest.skip("ESM2MEGA_TRANSFORMERS_4 names no Python with transformers 4.57")
    reference = foreign.truth(torch.float32, "fp16")
    convert(foreign.write_fair_esm(reference, tmp_path), tmp_path / "ours", "esm2mega")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    command = [python, "-c", _LOAD_WITH_4, tmp_path / "hf", tmp_path / "logits.pt"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, timeout=250, env={**environment, "HF_HUB_OFFLINE": "1"})
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    batch = references.Batch(found["ids"], torch.ones_like(found["ids"]), found["ids"])
    assert found["ids"].shape == (1, 17)
    assert relative(found["logits"], logits_of(tmp_path / "ours", "fp32", batch), batch) <= TOLERANCE.fp32
