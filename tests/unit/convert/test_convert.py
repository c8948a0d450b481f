"""A conversion is whole or not there, says what it did, and the target is what its name says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.tensors import TensorReader
from esm2mega.cli.app import main
from esm2mega.config.load import load_run_over
from esm2mega.convert.convert import convert
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.formats import esm2mega as own
from esm2mega.convert.formats import hf
from esm2mega.convert.formats.registry import detect, open_weights
from esm2mega.convert.into_model import load_initial_weights
from esm2mega.convert.start_point import read_start
from esm2mega.errors import UserError
from esm2mega.inspect import inspect_path
from tests import foreign
from tests.unit.conftest import TinyRun

pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every format, as files of other packages; read only."""
    folder = tmp_path_factory.mktemp("sources")
    reference = foreign.truth(torch.float32, "fp16")
    for write in (foreign.write_hf, foreign.write_fair_esm, foreign.write_te, foreign.write_cerebras):
        write(reference, folder)
    foreign.write_nemo1(reference, folder)
    foreign.write_nemo2(reference, folder)
    foreign.unpacked(folder / "x.nemo")
    convert(folder / "hf", folder / "ours", "esm2mega")
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf", "hf"),
        ("esm2_x.pt", "fair-esm"),
        ("te", "te"),
        ("x.mdl", "cerebras"),
        ("x.nemo", "nemo1"),
        ("unpacked", "nemo1"),
        ("nemo2", "nemo2"),
        ("ours", "esm2mega"),
    ],
)
def test_detect(sources: Path, name: str, expected: str) -> None:
    assert detect(SourceFiles(sources / name)) == expected


def test_an_unknown_file_is_named_with_what_would_be_known(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="in none of the formats esm2mega, hf, .*`esm2mega convert --from FORMAT`"
    ):
        detect(SourceFiles(tmp_path))
    with pytest.raises(UserError, match="no such file or directory"):
        open_weights(tmp_path / "nothing", "hf")


def test_checkpoint_is_as_training_writes_it(sources: Path, finished: TinyRun) -> None:
    """Same files, same tensors, one chunk for each layer, padded vocabulary of zeros."""
    run = layout.read_config(sources / "ours")
    assert run.model.size is None and run.model.num_layers == foreign.L
    assert layout.is_complete(sources / "ours")
    converted, trained = (
        TensorReader(path).index for path in (sources / "ours", layout.step_dir(finished.run_dir, 4))
    )
    assert set(converted) == {name for name in trained if not name.startswith("optimizer.")}
    assert converted["encoder.layers.mlp.linear_fc1.weight"].shape == (foreign.L, foreign.F, foreign.H)
    table = TensorReader(sources / "ours").read("embedding.word_embeddings.weight")
    assert table.shape == (40, foreign.H) and not table[33:].any() and table[32].any()
    text = inspect_path(sources / "ours")
    assert f"converted from hf {sources / 'hf'}" in text
    assert "auxiliary contact_head.regression.weight [1, 24]" in text


def test_published_sizes_keep_their_name() -> None:
    from esm2mega.config.presets import PRESETS
    from esm2mega.convert.lazy_weights import Description

    run = own.run_of(Description(PRESETS["650M"], 1e-5))
    assert run.model.size == "650M"
    with pytest.raises(UserError, match="float16 have no place in an esm2mega checkpoint"):
        own.run_of(Description(PRESETS["8M"], 1e-5, dtype=torch.float16))


def test_dtype(sources: Path, tmp_path: Path) -> None:
    """fp16 is kept where the target can hold it and becomes fp32 in ours; frequencies are never rounded."""
    convert(sources / "hf", tmp_path / "half", "hf", dtype="fp16")
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        dtypes = {name.rpartition(".")[2]: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {"weight": "F16", "bias": "F16", "inv_freq": "F32"}
    report = convert(tmp_path / "half", tmp_path / "ours", "esm2mega")
    assert report.description.dtype == torch.float32
    assert "weights from float16 to float32" in report.notes.changed


def test_contact_head_that_no_source_had_is_zero_and_said_to_be(sources: Path, tmp_path: Path) -> None:
    report = convert(sources / "te", tmp_path / "hf", "hf")
    assert "contact head: zeros, the source has none" in report.notes.filled
    assert "feed-forward GELU: tanh in the source, erf in EsmForMaskedLM" in report.notes.changed
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert not file.get_tensor("esm.contact_head.regression.weight").any()


def test_lost_frequencies_are_a_change(sources: Path, tmp_path: Path) -> None:
    report = convert(sources / "hf", tmp_path / "te", "te")
    assert any(
        line.startswith("rotary frequencies: the formula rounded to fp16; this format has no place")
        for line in report.notes.changed
    )


def test_fair_esm_refuses_what_it_cannot_hold(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only if the name begins with 'esm2'"):
        convert(sources / "hf", tmp_path / "mine.pt", "fair-esm")
    weights = open_weights(sources / "hf")
    config = hf.config_of(weights.description)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-12}))
    (tmp_path / "hf" / "model.safetensors").symlink_to(sources / "hf" / "model.safetensors")
    with pytest.raises(UserError, match="epsilon of 1e-05, this model of 1e-12"):
        convert(tmp_path / "hf", tmp_path / "esm2_x.pt", "fair-esm")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_nothing_is_overwritten(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: exists; choose another name"):
        convert(sources / "hf", tmp_path / "there", "hf")
    (tmp_path / "esm2_x-contact-regression.pt").write_text("mine")
    with pytest.raises(UserError, match="esm2_x-contact-regression.pt: exists"):
        convert(sources / "hf", tmp_path / "esm2_x.pt", "fair-esm")
    assert (tmp_path / "esm2_x-contact-regression.pt").read_text() == "mine"
    assert not (tmp_path / "esm2_x.pt").exists()


def test_what_exists_beside_the_target_is_found_before_the_source_is_read(tmp_path: Path) -> None:
    """There is no source."""
    for target, other, to in (
        ("esm2_x.pt", "esm2_x-contact-regression.pt", "fair-esm"),
        ("x.mdl", "x.yaml", "cerebras"),
    ):
        (tmp_path / other).write_text("mine")
        with pytest.raises(UserError, match=f"{other}: exists; choose another name"):
            convert(tmp_path / "absent", tmp_path / target, to)


def test_a_failed_conversion_leaves_nothing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("esm2mega.checkpoint.layout.write_description", full)
    assert main(["convert", str(sources / "hf"), str(tmp_path / "x"), "--to", "esm2mega"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_numerics_cannot_be_a_start(sources: Path, world: None) -> None:
    """The tanh form of GELU and another epsilon do not show in any shape."""
    run = layout.read_config(sources / "ours")
    for source, change, message in (
        ("te", "model.activation=gelu", "set model.activation=gelu_tanh"),
        ("hf", "model.layernorm_epsilon=1e-6", "set model.layernorm_epsilon=1e-05"),
        ("ours", "model.num_layers=3", "holds a model of 4 layers"),
    ):
        config = load_run_over(run, [change]).model
        with pytest.raises(UserError, match=message):
            load_initial_weights(read_start(sources / source), config, [])


def test_a_converted_checkpoint_is_not_resumed(sources: Path) -> None:
    from esm2mega.train.start import find_resume

    run = load_run_over(layout.read_config(sources / "ours"), [f"checkpoint.resume={sources / 'ours'}"])
    with pytest.raises(
        UserError, match="a converted checkpoint, which no training can resume; use init_from"
    ):
        find_resume(run)
