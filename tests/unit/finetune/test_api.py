"""The Python interface and the command line give the same numbers, whoever wrote the head and the loss."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega import evaluate_model, infer_model, load, train_model
from esm2mega.checkpoint.tensors import TensorReader
from esm2mega.cli.app import main
from esm2mega.config.schema import LoRAConfig
from esm2mega.errors import UserError
from esm2mega.finetune.api import TrainedModel
from esm2mega.lora.merge import merge
from tests.checkpoints import full_tensors
from tests.own_code import AbsoluteLoss, FlagLoss, HalfScale, LogLoss, MeanHead
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
h5py = pytest.importorskip("h5py")

RNG = np.random.default_rng(12)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(9, 40, 24)]
LABELS: dict[str, list[Any]] = {
    "regression": [5 + s.count("K") + len(s) / 10 for s in SEQUENCES],
    "multilabel": [";".join(sorted(set(s) & set("KW"))) for s in SEQUENCES],
    "token_classification": ["".join("HEC"[ord(c) % 3] for c in s) for s in SEQUENCES],
    "contact": [RNG.normal(scale=6, size=(len(s), 3)).tolist() for s in SEQUENCES],
}
MODES = {"full": (), "frozen": ("finetune.mode=frozen",), "lora": ("finetune.mode=lora", "lora.rank=2")}
HEADS = [
    *(("regression", head) for head in ("mlp", "linear", "pooler", "hf")),
    *(("token_classification", head) for head in ("linear", "cnn")),
    *(("contact", head) for head in ("product", "attention_maps")),
]
CONFIGURED = [
    pytest.param(kind, head, mode, marks=() if number % len(MODES) == turn else pytest.mark.slow)
    for number, (kind, head) in enumerate(HEADS)
    for turn, mode in enumerate(MODES)
]
"""Every head in every mode, and in `make test` each head in one of them."""


def train(start: TinyRun, run_dir: Path, kind: str, *overrides: str, **given: Any) -> TrainedModel:
    pairs = list(zip(SEQUENCES, LABELS[kind], strict=True))
    settings = [text for text in SETTINGS if not text.startswith("model.")]
    settings += [f"run_dir={run_dir}", f"init_from={start.run_dir}", f"task.kind={kind}", "optim.lr=1e-2"]
    settings += ["train.max_steps=2", "checkpoint.keep_best=0", *overrides]
    return train_model(settings, **{"train": pairs[:16], "valid": pairs[16:], **given})


def check_doors(trained: TrainedModel, kind: str, folder: Path, *code: str, **given: Any) -> list[Any]:
    """`infer_model` and `predict`, `evaluate_model` and `evaluate`; returns the predictions."""
    checkpoint, held_out = trained.checkpoint, SEQUENCES[16:]
    labels, path = LABELS[kind][16:], folder / "valid.jsonl"
    rows = [{"sequence": s, "target": x} for s, x in zip(held_out, labels, strict=True)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = [word for name in code for word in ("--code", f"tests.own_code:{name}")]
    head = {name: value for name, value in given.items() if name == "make_head"}
    found = infer_model(checkpoint, held_out, **(head if "LogLoss" not in code else given))
    out, result = folder / ("out.h5" if kind == "contact" else "out.csv"), folder / "out.json"
    assert main(["predict", str(checkpoint), str(path), "--out", str(out), *words]) == 0
    if kind == "contact":
        with h5py.File(out) as file:
            maps = np.split(file["contacts"][:], file["contact_offsets"][1:-1])
        for one, other in zip(found, maps, strict=True):
            np.testing.assert_array_equal(one, other.reshape(one.shape))
    else:
        column = "target" if kind == "regression" else "prediction"
        cells = [row[column] for row in csv.DictReader(out.open())]
        assert cells == [
            x if isinstance(x, str) else ";".join(x) if isinstance(x, list) else repr(x) for x in found
        ]
    arguments = ["evaluate", str(checkpoint), "--data", str(path), "--out", str(result), *words]
    assert main([*arguments, "task.bootstrap=0"]) == 0
    by_command = json.loads(result.read_text())
    by_program = evaluate_model(checkpoint, rows, ["task.bootstrap=0"], **given)
    assert by_program | {"data": ""} == {name: by_command[name] for name in by_program} | {"data": ""}
    logged = {n: v for n, v in trained.metrics.items() if n.startswith("valid_") and not np.isnan(v)}
    assert logged == {name: by_command[name.removeprefix("valid_")] for name in logged}
    return found


@pytest.mark.some(3)
@pytest.mark.parametrize(("kind", "head", "mode"), CONFIGURED)
def test_configured_heads(finished: TinyRun, tmp_path: Path, kind: str, head: str, mode: str) -> None:
    trained = train(finished, tmp_path / "run", kind, f"task.head={head}", *MODES[mode])
    check_doors(trained, kind, tmp_path)


@pytest.mark.parametrize("mode", ["full", "lora", pytest.param("frozen", marks=pytest.mark.slow)])
def test_an_own_head_with_an_own_loss(finished: TinyRun, tmp_path: Path, mode: str) -> None:
    """Outputs are in the units of the labels: `head(pooled)`, computed here from what `load` embeds."""
    given = {"make_head": MeanHead, "loss": AbsoluteLoss()}
    trained = train(finished, tmp_path / "run", "regression", *MODES[mode], **given)
    code = ("MeanHead", "AbsoluteLoss")
    found = np.array(check_doors(trained, "regression", tmp_path, *code, **given))
    reader = TensorReader(trained.checkpoint)
    with load(trained.checkpoint) as model:
        pooled = model.embed(SEQUENCES[16:], pooling="mean")
    weight, bias = (reader.read(f"head.output.{part}").numpy() for part in ("weight", "bias"))
    # Two orders of adding numbers in fp64.
    np.testing.assert_allclose(found, (pooled @ weight.T + bias)[:, 0], rtol=0, atol=1e-12)
    errors = found - np.array(LABELS["regression"][16:])
    assert trained.metrics["valid_loss"] == pytest.approx(np.abs(errors).mean(), rel=1e-12)
    assert trained.metrics["valid_mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-12)
    if mode == "lora":
        # Merging keeps the head, and whose it is.
        merge(trained.checkpoint, tmp_path / "merged")
        with pytest.raises(UserError, match="has a head of your own code, tests.own_code:MeanHead"):
            infer_model(tmp_path / "merged", SEQUENCES[16:])
        merged = infer_model(tmp_path / "merged", SEQUENCES[16:], make_head=MeanHead)
        np.testing.assert_allclose(merged, found, rtol=0, atol=1e-12)
    # What the loss logs besides.
    assert trained.metrics["valid_bias"] == pytest.approx(errors.mean(), rel=1e-12)
    assert "bias" in trained.metrics


@pytest.mark.parametrize("loss", [HalfScale, pytest.param(LogLoss, marks=pytest.mark.slow), FlagLoss])
def test_own_losses_with_a_configured_head(finished: TinyRun, tmp_path: Path, loss: type[Any]) -> None:
    """Their outputs are scaled by numbers of their own, logarithms, and logits of several labels."""
    kind = "multilabel" if loss is FlagLoss else "regression"
    trained = train(finished, tmp_path / "run", kind, "task.head=linear", "task.dropout=0", loss=loss())
    found = check_doors(trained, kind, tmp_path, loss.__name__, loss=loss())
    reader = TensorReader(trained.checkpoint)
    with load(trained.checkpoint) as model:
        pooled = model.embed(SEQUENCES[16:], pooling="mean")
    weight, bias = (reader.read(f"head.output.{part}").numpy() for part in ("weight", "bias"))
    outputs = pooled @ weight.T + bias
    if loss is FlagLoss:
        assert found == [[name for name, x in zip("KW", row, strict=True) if x >= 0] for row in outputs]
        return
    expected = {HalfScale: 2 * outputs + 1, LogLoss: np.exp(outputs)}[loss][:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_command_trains_own_code_as_the_program_does(finished: TinyRun, tmp_path: Path) -> None:
    """And goes on where that ended, with the same code alone."""
    given = {"make_head": MeanHead, "loss": AbsoluteLoss()}
    trained = train(finished, tmp_path / "program", "regression", **given)
    tables = []
    for name, part in (("train", slice(16)), ("valid", slice(16, None))):
        cells = zip(SEQUENCES[part], map(repr, LABELS["regression"][part]), strict=True)
        (tmp_path / f"{name}.csv").write_text("sequence,target\n" + "".join(f"{a},{b}\n" for a, b in cells))
        tables.append(f"data.{name}={tmp_path / name}.csv")
    code = ["--code", "tests.own_code:MeanHead", "--code", "tests.own_code:AbsoluteLoss"]
    settings = [text for text in SETTINGS if not text.startswith("model.")]
    settings += [f"run_dir={tmp_path / 'command'}", f"init_from={finished.run_dir}", "task.kind=regression"]
    settings += ["optim.lr=1e-2", "train.max_steps=2", "checkpoint.keep_best=0", *tables]
    assert main(["finetune", *code, *settings]) == 0
    made = tmp_path / "command" / "checkpoints" / "step_00000002"
    expected, found = full_tensors(trained.checkpoint), full_tensors(made)
    assert expected.keys() == found.keys()
    assert all((value == found[name]).all() for name, value in expected.items())
    assert main(["finetune", *settings, "train.max_steps=3"]) == 2
    assert main(["finetune", *code, *settings, "train.max_steps=3"]) == 0


def test_arguments_of_other_shapes_are_refused_in_one_line(tmp_path: Path) -> None:
    class PeftConfig:
        r = 8

    for overrides, given, message in (
        ("task.kind=regression", {}, "overrides is 'task.kind=regression'; give a list of texts"),
        (
            {"task.kind": "regression"},
            {},
            r"overrides is a dict; give a list of texts, as in \['task.kind=…'\]",
        ),
        ([("task.kind", "regression")], {}, r"overrides\[0\] is \('task.kind', 'regression'\); give text"),
        ([], {"lora": PeftConfig()}, "lora is a PeftConfig; give an esm2mega.config.schema.LoRAConfig"),
        ([], {"lora": {"rank": 8}}, r"lora is a dict; .*LoRAConfig\(rank=8, alpha=16\)"),
    ):
        with pytest.raises(UserError, match=message):
            train_model(overrides, train=[("MK", 1.0)], **given)
    with pytest.raises(UserError, match="lora.rank=None and the argument lora"):
        train_model(["finetune.mode=frozen", "model.size=tiny"], train=[("MK", 1.0)], lora=LoRAConfig(rank=8))
