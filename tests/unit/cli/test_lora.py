"""Adapters on the command line, in `inspect`, and as the model of an inference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from esm2mega.cli.app import main
from esm2mega.config.schema import ParallelConfig
from esm2mega.convert.start_point import read_checkpoint
from esm2mega.infer.source import open_model
from esm2mega.inspect import inspect_path
from esm2mega.lora.base import recorded_base
from esm2mega.model.build import build_model
from esm2mega.parallel.initialize import process_groups
from tests.checkpoints import changed_weights
from tests.padded import pack, unpack
from tests.unit.checkpoint.test_digests import flip
from tests.unit.lora import adapted
from tests.unit.lora.adapted import KINDS, Base
from tests.unit.runs import CPU


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return adapted.make_base(tmp_path_factory.mktemp("base") / "hf", torch.float32)


@pytest.fixture(scope="module")
def checkpoint(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapters"
    return adapted.make_adapters(folder, base, KINDS["dora"], torch.float32)


def test_there_and_back(base: Base, checkpoint: Path, tmp_path: Path) -> None:
    """Export, import on the same base in another format, merge: the logits stay."""
    there, back, whole, ours = (str(tmp_path / name) for name in ("peft", "back", "whole", "ours"))
    assert main(["convert", str(base.path), ours, "--to", "esm2mega"]) == 0
    assert main(["lora", "export", str(checkpoint), "--out", there]) == 0
    assert main(["lora", "import", there, "--base", ours, "--out", back]) == 0
    assert main(["lora", "merge", back, "--out", whole]) == 0
    # The same weights in two formats are the same base.
    assert recorded_base(read_checkpoint(back)).sha256 == recorded_base(read_checkpoint(checkpoint)).sha256
    expected = adapted.logits(checkpoint)
    assert (adapted.logits(Path(whole)) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_mistakes_are_one_line(
    base: Base, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "out")
    for arguments, words in (
        (["merge", str(tmp_path), "--out", target], "no complete checkpoint"),
        (["merge", str(checkpoint), "--out", str(checkpoint)], "exists"),
        (["import", str(tmp_path), "--base", str(base.path), "--out", target], "adapter_config.json"),
        (["import", str(tmp_path), "--base", str(checkpoint), "--out", target], "not the weights under them"),
    ):
        assert main(["lora", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error
    assert main(["lora", "export", str(checkpoint), "--out", str(tmp_path / "peft")]) == 0
    capsys.readouterr()
    assert main(["lora", "import", str(tmp_path / "peft"), "--base", str(checkpoint), "--out", target]) == 2
    assert "lora merge" in capsys.readouterr().err
    assert not Path(target).exists()


def test_a_changed_file_of_adapters_is_noticed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what `lora import` wrote, as of any checkpoint."""
    names = sorted(p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file())
    assert "digests.json" in names
    for number, name in enumerate(names):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(checkpoint, copy)
        flip(copy / name, (copy / name).stat().st_size // 2, number % 8)
        commands = (["lora", "merge"], ["lora", "export"], ["convert", "--to", "hf"], ["inspect"])
        command = [*commands[number % 4], str(copy)]
        command += [["--out", str(tmp_path / "out")], [str(tmp_path / "out")], []][max(number % 4 - 1, 0)]
        assert main(command) == 2, command
        blamed = "digests.json" if name == "COMPLETE" else name
        assert f"error: {copy / blamed}: is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_told(
    base: Base, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are exported and imported as they are, as `convert` keeps them."""
    name = "encoder.layers.self_attention.linear_q_lora.lora_A"

    def ruin(tensor: torch.Tensor) -> None:
        tensor.view(-1)[3] = float("nan")

    ruined = changed_weights(checkpoint, tmp_path / "ruined", {name: ruin})
    peft, back = str(tmp_path / "peft"), str(tmp_path / "back")
    for command in (["export", str(ruined), "--out", peft], ["import", peft, "--base", str(base.path)]):
        assert main(["lora", *command, *(["--out", back] if command[0] == "import" else [])]) == 0
        assert "kept:    1 values in 1 of" in capsys.readouterr().out


def test_a_whole_model_is_no_adapter(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(base.path), str(tmp_path / "ours"), "--to", "esm2mega"]) == 0
    for command in ("merge", "export"):
        assert main(["lora", command, str(tmp_path / "ours"), "--out", str(tmp_path / "out")]) == 2
        assert "not a checkpoint of adapters" in capsys.readouterr().err


def test_inspect_names_base_and_adapters(base: Base, checkpoint: Path) -> None:
    text = inspect_path(checkpoint)
    assert "adapters of rank 3 on linear_qkv, linear_proj, linear_fc1, linear_fc2" in text
    assert f"base {base.path}  sha256 {recorded_base(read_checkpoint(checkpoint)).sha256}" in text
    assert "encoder.layers.self_attention.linear_q_lora.lora_A" in text


def test_source_of_an_inference(base: Base, checkpoint: Path) -> None:
    source = open_model(checkpoint)
    ids, mask = adapted.batch()
    with process_groups(ParallelConfig(), seed=1):
        chunks = build_model(source.run.model, source.run.parallel, CPU, 1, has_lora=True)
        source.load(chunks)
        tokens, packed = pack(ids, mask)
        with torch.no_grad():
            logits = unpack(chunks[0].eval()(tokens, packed), mask)
    assert torch.equal(logits, adapted.logits(checkpoint))
    assert source.contact_head is not None, "that of the base"
    assert source.checksum() != open_model(base.path).checksum()
