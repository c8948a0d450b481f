"""TAPE's and ProteinLM's models, converted, give the logits of TAPE's own modules; and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esm2mega.checkpoint.auxiliary import read_auxiliary
from esm2mega.config.schema import ParallelConfig
from esm2mega.convert.convert import convert
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.verify.verify import verify
from esm2mega.errors import UserError
from esm2mega.parallel.initialize import process_groups
from tests import foreign_bert
from tests.parity import references
from tests.parity.test_converters import logits_of, relative
from tests.parity.test_esm2_parity import TOLERANCE

pytest.importorskip("tape", reason="TAPE is not installed: pip install esm2mega[dev]")

KNOWN = sorted(foreign_bert.esm_order(torch.zeros(30)).isnan().logical_not().nonzero().flatten().tolist())


@pytest.fixture
def world() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


def compare(checkpoint: Path, expected: Tensor, batch: references.Batch) -> float:
    """Relative difference over the tokens that both vocabularies have; the others can take no probability."""
    logits = logits_of(checkpoint, "fp64", batch)
    keep = batch.attention_mask.bool()
    assert logits.softmax(-1)[keep][:, [29, 30, 31]].max() == 0.0
    return relative(logits[..., KNOWN], foreign_bert.esm_order(expected)[..., KNOWN], batch)


@pytest.mark.usefixtures("world")
def test_tape_equals_tape_proteins(tmp_path: Path) -> None:
    """fp64, 1e-10: LayerNorms in their shifted places, residuals from their outputs, positions from 0."""
    reference = foreign_bert.truth(torch.float64)
    convert(foreign_bert.write_tape(reference, tmp_path), tmp_path / "ours", "esm2mega")
    batch = references.batch()
    expected = foreign_bert.run_postln(reference, batch.input_ids, batch.attention_mask)
    difference = compare(tmp_path / "ours", expected, batch)
    print(f"{difference:.1e}")
    assert difference <= TOLERANCE.fp64
    # What pre-LN, or a residual before the LayerNorm, would give is far from it.
    other = foreign_bert.run_preln(reference, batch.input_ids, batch.attention_mask, final_norm=True)
    assert relative(other, expected, batch) > 0.1


Write = Callable[[foreign_bert.BertTruth, Path], Path]


@pytest.mark.some(2)
@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("tanh", "final_norm", "write"),
    [
        (False, False, foreign_bert.write_proteinlm),
        (False, True, lambda r, f: foreign_bert.write_megatron(r, f, version=None)),
        (False, True, lambda r, f: foreign_bert.write_megatron(r, f, version=1.0, tp=2)),
        (True, True, lambda r, f: foreign_bert.write_megatron(r, f, version=3.0, tp=2, pp=2, tanh=True)),
        (False, True, lambda r, f: foreign_bert.write_megatron(r, f, version=0, tp=3, pp=2)),
    ],
    ids=["ProteinLM's TAPE", "Megatron v0", "v1, TP2", "v3, TP2 x PP2, tanh", "v0, TP3 x PP2"],
)
def test_proteinlm_equals_its_definition(tmp_path: Path, tanh: bool, final_norm: bool, write: Write) -> None:
    """fp64, 1e-10: every order of fused rows, every layout, with and without the final LayerNorm."""
    reference = foreign_bert.truth(torch.float64, tanh)
    convert(write(reference, tmp_path), tmp_path / "ours", "esm2mega")
    batch = references.batch()
    expected = foreign_bert.run_preln(reference, batch.input_ids, batch.attention_mask, final_norm)
    difference = compare(tmp_path / "ours", expected, batch)
    print(f"{difference:.1e}")
    assert difference <= TOLERANCE.fp64


@pytest.mark.parametrize("name", ["tape", "proteinlm"])
def test_round_trips(name: str, tmp_path: Path) -> None:
    """Ours, theirs, ours: bit by bit; and TAPE itself loads what was written."""
    from tape.models.modeling_bert import ProteinBertForMaskedLM

    reference = foreign_bert.truth(torch.float32)
    write = {"tape": foreign_bert.write_tape, "proteinlm": foreign_bert.write_proteinlm}[name]
    convert(write(reference, tmp_path), tmp_path / "first", "esm2mega")
    kept = "pooler.dense.weight" if name == "tape" else "encoder.final_layernorm.weight"
    assert kept in read_auxiliary(tmp_path / "first")
    report = convert(tmp_path / "first", tmp_path / "back", name)
    assert any("<null_1>" in line for line in report.notes.dropped)
    convert(tmp_path / "back", tmp_path / "second", "esm2mega")
    first, second = (open_weights(tmp_path / x) for x in ("first", "second"))
    assert first.infos == second.infos
    assert all(torch.equal(first.read(x), second.read(x)) for x in first.infos)
    assert first.description == second.description
    if name == "tape":
        batch = references.batch()
        expected = foreign_bert.run_postln(reference, batch.input_ids, batch.attention_mask)
        loaded = foreign_bert.BertTruth(ProteinBertForMaskedLM.from_pretrained(tmp_path / "back").eval())
        actual = foreign_bert.run_postln(loaded, batch.input_ids, batch.attention_mask)
        assert relative(actual, expected, batch) <= TOLERANCE.fp32


@pytest.mark.parametrize("name", ["tape", "proteinlm", "megatron"])
def test_verification_passes(name: str, tmp_path: Path) -> None:
    write: Write = getattr(foreign_bert, f"write_{name}")
    source = write(foreign_bert.truth(torch.float32), tmp_path)
    lines = verify(convert(source, tmp_path / "ours", "esm2mega"))
    assert lines[0] == "source run by plain PyTorch, target by esm2mega"
    report = json.loads((tmp_path / "ours.verify.json").read_text())
    assert [layer["relative"] > 1e-5 for layer in report["hidden_states"]] == [False] * (foreign_bert.L + 1)


def test_what_the_published_converter_leaves_is_refused(tmp_path: Path) -> None:
    """Its random decoder would overwrite the converted table when TAPE loads it."""
    source = foreign_bert.write_proteinlm(foreign_bert.truth(torch.float32), tmp_path, stale_decoder=True)
    with pytest.raises(UserError, match="mlm.decoder.weight differs from the token table"):
        open_weights(source)
    weights = open_weights(source, drop=["mlm.decoder.weight"])
    assert "mlm.decoder.weight: as asked for; the token table takes its place" in weights.notes.dropped


def test_families_do_not_mix(tmp_path: Path) -> None:
    source = foreign_bert.write_tape(foreign_bert.truth(torch.float32), tmp_path)
    for target in ("hf", "proteinlm"):
        with pytest.raises(UserError, match="family proteinbert_postln; .* which compute something else"):
            convert(source, tmp_path / target, target)


def test_the_final_layernorm_that_a_reader_throws_away_is_reported(tmp_path: Path) -> None:
    source = foreign_bert.write_megatron(foreign_bert.truth(torch.float32), tmp_path)
    report = convert(source, tmp_path / "back", "proteinlm")
    assert any("thrown away by ProteinLM's reader" in line for line in report.notes.changed)


def test_a_merged_checkpoint_is_refused(tmp_path: Path) -> None:
    """It does not say in which order its rows are; the version that is assumed without one would be wrong."""
    source = foreign_bert.write_megatron(foreign_bert.truth(torch.float32), tmp_path)
    file = source / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    torch.save({"model": content["model"], "iteration": 7}, file)
    with pytest.raises(UserError, match="has no 'args'.*convert the checkpoint that was merged"):
        open_weights(source)
