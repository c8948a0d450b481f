"""Classification models of transformers come back bit by bit, and are verified by their own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from esm2mega.checkpoint.auxiliary import read_auxiliary, write_auxiliary
from esm2mega.cli import main
from esm2mega.config.schema import ParallelConfig
from esm2mega.convert import verify
from esm2mega.convert.convert import convert
from esm2mega.convert.esm2mega import run_of
from esm2mega.convert.formats import open_weights
from esm2mega.convert.into_model import load_initial_weights
from esm2mega.errors import UserError
from esm2mega.model.build import build_model
from esm2mega.parallel.initialize import process_groups
from tests.parity import references

pytest.importorskip("transformers", reason="transformers is not installed: pip install esm2mega[dev]")

LABELS = ("helix", "strand", "coil")
KINDS = ("sequence", "token")


def write(kind: str, folder: Path) -> Path:
    """A random model with fp16-rounded frequencies, saved by transformers itself."""
    import transformers

    config = references.hugging_face(references.Shape()).config
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {name: number for number, name in enumerate(LABELS)}
    config.problem_type = "single_label_classification"
    classes: dict[str, Any] = {
        "sequence": transformers.EsmForSequenceClassification,
        "token": transformers.EsmForTokenClassification,
    }
    model = classes[kind](config).eval()
    references.randomize(model)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.half().float())
    model.save_pretrained(folder / "source")
    return folder / "source"


def run(kind: str, path: Path) -> torch.Tensor:
    """Logits of transformers, and nothing missing or too much in the directory."""
    import transformers

    auto = {
        "sequence": transformers.AutoModelForSequenceClassification,
        "token": transformers.AutoModelForTokenClassification,
    }[kind]
    model, info = auto.from_pretrained(path, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.problem_type == "single_label_classification"
    batch = references.batch()
    with torch.no_grad():
        return model.eval()(batch.input_ids, attention_mask=batch.attention_mask).logits


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    """Tensors, labels and logits; the report of the first half compares with the head of transformers."""
    source = write(kind, tmp_path)
    there = convert(source, tmp_path / "ours", "esm2mega")
    assert any(line.startswith("lm_head.*, output_layer.bias") for line in there.notes.filled)
    stored = {f"classifier.{name}" for name in ("weight", "bias")}
    if kind == "sequence":
        stored = {f"classifier.{layer}.{p}" for layer in ("dense", "out_proj") for p in ("weight", "bias")}
    assert {name for name in read_auxiliary(tmp_path / "ours") if name.startswith("classifier.")} == stored
    back = convert(tmp_path / "ours", tmp_path / "back", "hf")
    assert any("all zeros, which stands for none" in line for line in back.notes.dropped)
    first, second = open_weights(source), open_weights(tmp_path / "back")
    assert first.infos == second.infos and first.description == second.description
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.infos)
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "back/model.safetensors"))
    assert torch.equal(run(kind, source), run(kind, tmp_path / "back"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("installed", [True, False])
def test_verification_compares_the_classifier(
    kind: str, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transformers' own head and with the plain one; a change of it alone is found."""
    if not installed:
        monkeypatch.setattr(verify, "_installed", lambda package: None)
    conversion = convert(write(kind, tmp_path), tmp_path / "ours", "esm2mega")
    assert verify.verify(conversion)[0].startswith(
        "source run by transformers" if installed else "source run by plain PyTorch"
    )
    report = json.loads((tmp_path / "ours.verify.json").read_text())
    assert report["logits"]["scale"] > 0.1
    auxiliary = read_auxiliary(tmp_path / "ours")
    name = next(name for name in auxiliary if name.startswith("classifier.") and name.endswith("weight"))
    auxiliary[name][1] += 0.01
    write_auxiliary(tmp_path / "ours", auxiliary)
    with pytest.raises(verify.MachineError, match="verification failed"):
        verify.verify(conversion)


def test_a_run_starts_from_its_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classifier goes along, and what the source lacks is said."""
    source = write("sequence", tmp_path)
    weights = open_weights(source)
    config = run_of(weights.description).model
    with process_groups(ParallelConfig(), seed=1) as ranks:
        (model,) = build_model(config, ParallelConfig(), ranks.device, seed=5)
        auxiliary = load_initial_weights(source, config, [model])
        assert "classifier.out_proj.bias" in auxiliary and not model.lm_head.dense.weight.any()
        last = model.encoder.layers[2].mlp.linear_fc2.weight
        assert torch.equal(last, weights.read("encoder.layers.2.mlp.linear_fc2.weight"))
    assert "init_from filled:  lm_head.*" in capsys.readouterr().err


def test_formats_without_a_place_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write("token", tmp_path)
    for target in ("te", "esm2_x.pt"):
        to = {"te": "te", "esm2_x.pt": "fair-esm"}[target]
        assert main(["convert", str(source), str(tmp_path / target), "--to", to]) == 2
        assert "holds a token classifier, for which" in capsys.readouterr().err
    with pytest.raises(UserError, match="neither a masked-language-model head .* nor a classifier"):
        open_weights(source, drop=["classifier.*"])


def test_a_masked_language_model_with_a_classifier(tmp_path: Path) -> None:
    """A trained head of masked language modelling is said to be lost; unknown labels get numbers."""
    references.hugging_face(references.Shape()).save_pretrained(tmp_path / "mlm")
    convert(tmp_path / "mlm", tmp_path / "ours", "esm2mega")
    auxiliary = read_auxiliary(tmp_path / "ours")
    auxiliary |= {"classifier.weight": torch.randn(3, 40), "classifier.bias": torch.randn(3)}
    write_auxiliary(tmp_path / "ours", auxiliary)
    report = convert(tmp_path / "ours", tmp_path / "head", "hf")
    assert any("EsmForTokenClassification has none" in line for line in report.notes.dropped)
    assert any("names of the labels: LABEL_0" in line for line in report.notes.filled)
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["architectures"] == ["EsmForTokenClassification"]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}

    report = convert(tmp_path / "ours", tmp_path / "without", "hf", drop=["classifier.*"])
    assert any(line.endswith("classifier.bias: as asked for") for line in report.notes.dropped)
    verify.verify(report)


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = write("sequence", tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["id2label"]["3"] = "turn"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="classifier.out_proj.weight has 3 rows, id2label .* 4 labels"):
        open_weights(source)
