"""Classifiers of Model Zoo and fine-tuned checkpoints: each becomes the other; PyTorch computes the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from esm2mega.checkpoint import layout
from esm2mega.cli.app import main
from esm2mega.config.schema import TaskConfig
from esm2mega.convert.convert import convert
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.heads.cerebras_classifier import parameters_of
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.vocabulary import CLS, EOS, encode_residues
from tests import foreign

pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")

PROTEIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEG"
POOLER = "bert_pooler.pooler.ffn.0.linear_layer."


@pytest.fixture(scope="module")
def truth() -> foreign.Truth:
    return foreign.truth(torch.float32)


def head_state(outputs: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    h = foreign.H
    shapes = {f"{POOLER}weight": (h, h), f"{POOLER}bias": (h,)}
    shapes |= {"classifier.weight": (outputs, h), "classifier.bias": (outputs,)}
    return {name: torch.randn(shape, generator=draw) / 5 for name, shape in shapes.items()}


def write_classifier(truth: foreign.Truth, folder: Path, form: str = "wrapped", **parameters: Any) -> Path:
    """A ``.mdl`` of a classifier.

    Args:
        truth: The encoder.
        folder: Where to write.
        form: ``wrapped`` with the names of Model Zoo's class: the masked language model as ``model``, and the
            encoder a second time; or ``bare`` without both, and with the states under another key.
        parameters: Further parameters.
    """
    path = foreign.write_cerebras(truth, folder)
    state, head = torch.load(path)["model"], head_state(int(parameters.get("num_labels", 2)))
    if form == "wrapped":
        state = {f"model.{name}": value for name, value in state.items()}
        inside = {name.removeprefix("model."): value for name, value in state.items() if "encoder" in name}
        state |= {f"classifier.{name}": value for name, value in {**head, **inside}.items()}
    else:
        state = {name: value for name, value in state.items() if "bert_mlm_head" not in name} | head
    torch.save({"model" if form == "wrapped" else "state_dict": state, "global_step": 7}, path)
    content = yaml.safe_load((folder / "x.yaml").read_text())
    content["trainer"]["init"]["model"] |= {"num_labels": 2, "classifier_dropout": 0.4, **parameters}
    (folder / "x.yaml").write_text(yaml.safe_dump(content))
    return path


@torch.no_grad()
def logits(truth: foreign.Truth, outputs: int = 2) -> Tensor:
    """The classifier by fair-esm's encoder and three lines of PyTorch."""
    ids = torch.tensor([[CLS, *encode_residues(PROTEIN).tolist(), EOS]])
    states = truth.model(ids, repr_layers=[foreign.L])["representations"][foreign.L]
    head = head_state(outputs)
    pooled = F.gelu(F.linear(states[:, 0], head[f"{POOLER}weight"], head[f"{POOLER}bias"]))
    return F.linear(pooled, head["classifier.weight"], head["classifier.bias"])[0]


def test_there_and_back(truth: foreign.Truth, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Predictions are PyTorch's, and a second file has the same bits under the names of Model Zoo."""
    source, ours = write_classifier(truth, tmp_path), tmp_path / "ours"
    assert main(["convert", str(source), str(ours), "--to", "esm2mega"]) == 0
    said = capsys.readouterr().out
    assert "stays beside a classifier unused" in said and "stored under another name too" in said
    task = layout.read_config(ours).task
    assert (task.kind, task.head, task.pooler_activation) == ("classification", "pooler", "gelu")
    assert (task.dropout, layout.read_state(ours)["task"]["names"]) == (0.4, ["0", "1"])
    (tmp_path / "x.fasta").write_text(f">p\n{PROTEIN}\n")
    assert main(["predict", str(ours), str(tmp_path / "x.fasta"), "--out", str(tmp_path / "out.csv")]) == 0
    header, row = (tmp_path / "out.csv").read_text().splitlines()
    found = dict(zip(header.split(","), row.split(","), strict=True))
    expected = logits(truth).softmax(-1).tolist()
    # fp32 sums in another order over four layers
    assert [float(found["p_0"]), float(found["p_1"])] == pytest.approx(expected, abs=1e-5)

    back = tmp_path / "back.mdl"
    assert main(["convert", str(ours), str(back), "--to", "cerebras", "--verify"]) == 0
    first, second = open_weights(source), open_weights(back)
    assert first.infos == second.infos
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.infos)
    state, parameters = (
        torch.load(back)["model"],
        yaml.safe_load((tmp_path / "back.yaml").read_text())["model"],
    )
    assert torch.equal(state[f"classifier.{POOLER}weight"], head_state(2)[f"{POOLER}weight"])
    assert torch.equal(state["classifier.classifier.bias"], head_state(2)["classifier.bias"])
    assert {name.partition(".")[0] for name in state} == {"model", "classifier"}
    keys = ("num_labels", "problem_type", "classifier_dropout")
    assert [parameters[key] for key in keys] == [2, "single_label_classification", 0.4]
    report = json.loads((tmp_path / "back.mdl.verify.json").read_text())
    assert report["passed"] and report["logits"]["scale"] > 0.01

    (tmp_path / "bare").mkdir()
    third = open_weights(write_classifier(truth, tmp_path / "bare", "bare"))
    assert third.infos == first.infos and third.description == first.description
    assert all(torch.equal(first.read(name), third.read(name)) for name in first.infos)


def test_numbers_in_units_of_the_labels(truth: foreign.Truth, tmp_path: Path) -> None:
    """The scale of a regression is folded into the last layer, as there is no other place for it."""
    source = write_classifier(truth, tmp_path, "bare", num_labels=1)
    convert(source, tmp_path / "ours", "esm2mega")
    state = layout.read_state(tmp_path / "ours")
    layout.write_state(tmp_path / "ours", {**state, "task": {**state["task"], "mean": [100.0], "std": [3.0]}})
    convert(tmp_path / "ours", tmp_path / "back.mdl", "cerebras")
    found, first = open_weights(tmp_path / "back.mdl"), open_weights(source)
    assert found.description.task is not None and found.description.task.task.kind == "regression"
    assert torch.allclose(found.read("head.output.weight"), 3 * first.read("head.output.weight"))
    assert torch.allclose(found.read("head.output.bias"), 3 * first.read("head.output.bias") + 100)


def test_what_is_refused(truth: foreign.Truth, tmp_path: Path) -> None:
    info = TargetInfo("classification", ["0", "1"], [1, 1])
    head = HeadDescription(
        TaskConfig(kind="classification", head="pooler", pooler_activation="gelu"), info, {}
    )
    assert parameters_of(head)["num_labels"] == 2
    for changed in ({"pooler_activation": "tanh"}, {"head": "mlp"}, {"kind": "token_classification"}):
        with pytest.raises(UserError, match="no equivalent of this head .*; --drop-head writes the encoder"):
            parameters_of(replace(head, task=replace(head.task, **changed)))
    path = write_classifier(truth, tmp_path)
    convert(path, tmp_path / "ours", "esm2mega")
    with pytest.raises(UserError, match="transformers has no equivalent of the head cls gelu"):
        convert(tmp_path / "ours", tmp_path / "hf", "hf")
    state = torch.load(path)["model"]
    twin = "classifier.bert_encoder.transformer_encoder.norm.bias"
    torch.save({"model": {**state, twin: state[twin] + 1}}, path)
    with pytest.raises(UserError, match="are one tensor and differ"):
        open_weights(path)
    write_classifier(truth, tmp_path, "bare", num_labels=3)
    content = yaml.safe_load((tmp_path / "x.yaml").read_text())
    content["trainer"]["init"]["model"]["num_labels"] = 2
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="num_labels is 2, the classifier has 3 outputs"):
        open_weights(path)
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(UserError, match="is HDF5, as cerebras.pytorch saves"):
        open_weights(path)


def test_an_encoder_alone(truth: foreign.Truth, tmp_path: Path) -> None:
    convert(write_classifier(truth, tmp_path), tmp_path / "bare.mdl", "cerebras", drop_head=True)
    found = open_weights(tmp_path / "bare.mdl")
    assert found.description.head is None and not any(name.startswith("head.") for name in found.infos)
