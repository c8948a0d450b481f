"""Every command that reads a checkpoint says alike what a path is that holds none it can read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esm2mega.cli.app import main
from esm2mega.convert.convert import convert
from esm2mega.convert.formats.registry import open_weights
from tests import foreign

T5 = {"model_type": "t5", "vocab_size": 128}
ESM_1B = {**foreign.HF_CONFIG, "position_embedding_type": "absolute", "emb_layer_norm_before": True}


def transformers_directory(folder: Path, config: dict[str, object] | None) -> Path:
    """A directory with one tensor of no meaning."""
    path = folder / "theirs"
    path.mkdir()
    save_file({"a": torch.zeros(2)}, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def peft(folder: Path) -> Path:
    (folder / "peft").mkdir()
    (folder / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    return folder / "peft"


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "theirs.pt")
    return folder / "theirs.pt"


def directory_of_one_file(folder: Path) -> Path:
    (folder / "download").mkdir()
    return saved(folder / "download", {}).parent


WHAT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "ESM-1b": (
        lambda f: transformers_directory(f, ESM_1B),
        "ESM-1b or ESM-1v, not ESM-2: position_embedding_type is 'absolute'",
    ),
    "ProtT5": (lambda f: transformers_directory(f, T5), "is ProtT5 (model_type 't5'), not ESM-2"),
    "no config": (lambda f: transformers_directory(f, None), "model.safetensors and no config.json"),
    "MSA": (lambda f: saved(f, {"layers.0.row_self_attention.bias": torch.zeros(2)}), "is the MSA Trans"),
    "adapters": (peft, "holds adapters of PEFT, not a whole model; read them with `esm2mega lora import"),
    "one file": (directory_of_one_file, "did you mean"),
}


def commands(path: Path, folder: Path) -> dict[str, list[str]]:
    out = str(folder / "out")
    (folder / "x.fasta").write_text(">a\nMK\n")
    return {
        "convert": ["convert", str(path), out, "--to", "hf"],
        "embed": ["embed", str(path), str(folder / "x.fasta"), "--out", f"{out}.h5"],
        "score": ["score", str(path), "--sequence", "MK", "--out", f"{out}.csv"],
        "inspect": ["inspect", str(path)],
        "pretrain": ["pretrain", f"init_from={path}", f"data.train={folder / 'x.fasta'}", f"run_dir={out}"],
        "finetune": [
            *("finetune", f"init_from={path}", "task.kind=regression", "task.target_columns=[y]"),
            *(f"data.train={folder / 'x.fasta'}", f"run_dir={out}"),
        ],
        "evaluate": ["evaluate", str(path), "--data", str(folder / "x.fasta")],
        "compare": ["compare", str(path), str(path), "--data", str(folder / "x.fasta")],
        "predict": ["predict", str(path), str(folder / "x.fasta"), "--out", f"{out}.csv"],
        "lora merge": ["lora", "merge", str(path), "--out", out],
    }


@pytest.mark.parametrize("kind", WHAT)
def test_it_is_named_in_every_command(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, expected = WHAT[kind]
    path = make(tmp_path)
    settings = ["train.max_steps=1", "train.eval_every=0", "schedule.warmup_steps=0"]
    for name, arguments in commands(path, tmp_path).items():
        if name == "pretrain":
            # As the model to train; it is built before the weights are looked at.
            arguments = [*arguments, *settings, "model.size=tiny"]
        assert main(arguments) == 2, name
        error = capsys.readouterr().err.splitlines()[-1]  # before it, that the proteins were prepared
        assert error.startswith("esm2mega: error: ") and expected in error, (name, error)


def test_a_checkpoint_of_another_program_is_to_be_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a command reads those of this package alone; `inspect` describes it."""
    pytest.importorskip("esm", reason="fair-esm is not installed")
    path = foreign.write_hf(foreign.truth(torch.float32), tmp_path)
    for name in ("evaluate", "compare", "predict", "lora merge"):
        assert main(commands(path, tmp_path)[name]) == 2
        error = capsys.readouterr().err
        assert (
            "in the format hf, and this command reads those of esm2mega; make one with `esm2mega con" in error
        )
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"checkpoint {path} in the format hf" in text
    assert f"model {foreign.L} layers, hidden {foreign.H}, {foreign.A} heads" in text
    assert "  embedding.word_embeddings.weight " in text


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model."])
def test_a_prefix_of_all_tensors_is_taken_off_with_a_note(tmp_path: Path, wrapper: str) -> None:
    pytest.importorskip("esm", reason="fair-esm is not installed")
    truth = foreign.truth(torch.float32)
    path = foreign.write_hf(truth, tmp_path)
    weights = open_weights(path)
    expected = {name: weights.read(name) for name in weights.infos}
    state = {f"{wrapper}{name}": value for name, value in foreign.hf_state(truth).items()}
    save_file(state, path / "model.safetensors")
    report = convert(path, tmp_path / "ours", "esm2mega")
    assert f"{wrapper}: the prefix of the names of all tensors" in report.notes.dropped
    found = open_weights(path)
    assert found.infos == weights.infos
    # A single file beside its config.json is read as its directory is.
    single = open_weights(path / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(found.read(name), value) and torch.equal(single.read(name), value), name


def test_a_shard_alone_is_not_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = transformers_directory(tmp_path, dict(foreign.HF_CONFIG))
    shard = (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    assert main(["convert", str(shard), str(tmp_path / "x"), "--to", "hf"]) == 2
    assert f"is one shard of a model; give the directory of all of them, {path}" in capsys.readouterr().err
