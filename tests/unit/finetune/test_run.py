"""Fine-tuning end to end in one process: what it starts from, resumes to, leaves alone, and predicts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.cli.app import main
from esm2mega.config.load import load_run
from esm2mega.config.schema import TaskConfig
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.finetune.api import infer_model, train_model
from esm2mega.finetune.run import UserParts, read_splits
from esm2mega.model.heads import MLPHead
from tests.checkpoints import full_tensors
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(8)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(4, 60, 40)]
PAIRS = [(sequence, sequence.count("K") + len(sequence) / 10) for sequence in SEQUENCES]
TRAIN, VALID = PAIRS[:30], PAIRS[30:]


def train(run_dir: Path, *overrides: str, **given: Any):
    settings = [*SETTINGS, f"run_dir={run_dir}", "task.kind=regression", "train.eval_every=2", *overrides]
    return train_model(settings, **{"train": TRAIN, "valid": VALID, **given})


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    train(tmp_path / "broken", "train.max_steps=2")
    again = train(tmp_path / "broken")
    assert whole.checkpoint.name == again.checkpoint.name == "step_00000004"
    expected, actual = full_tensors(whole.checkpoint), full_tensors(again.checkpoint)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    assert whole.metrics["valid_loss"] == again.metrics["valid_loss"]
    with pytest.raises(UserError, match="was trained on other labels than data.train holds now"):
        train(tmp_path / "broken", "train.max_steps=6", train=[(s, v * 2) for s, v in TRAIN])
    with pytest.raises(UserError, match="is of a run with task.kind=regression, the configuration says"):
        train(tmp_path / "broken", "task.kind=multilabel", train=[("MK", "a")], valid=[("ML", "a")])


def test_the_encoder_of_a_pretrained_model_and_a_new_head(finished: TinyRun, tmp_path: Path) -> None:
    """Frozen: base weights stay bit-equal, the head moves; the model's shape is that of init_from."""
    settings = [
        text for text in SETTINGS if not text.startswith("model.") and not text.startswith("train.max_steps")
    ]
    trained = train_model(
        [
            *settings,
            f"run_dir={tmp_path}",
            f"init_from={finished.run_dir}",
            "task.kind=regression",
            "finetune.mode=frozen",
            "train.max_steps=3",
        ],
        train=TRAIN,
    )
    assert trained.run.model.hidden_size == 24 and trained.run.model.precision == "fp64"
    base, tuned = full_tensors(choose_checkpoint(finished.run_dir).path), full_tensors(trained.checkpoint)
    encoder = [name for name in tuned if name.startswith(("encoder.", "embedding."))]
    assert encoder and all(torch.equal(tuned[name], base[name]) for name in encoder)
    assert not any(name.startswith(("lm_head", "output_layer")) for name in tuned)
    assert {name for name in tuned if name.startswith("optimizer.state.exp_avg.")} == {
        f"optimizer.state.exp_avg.head.{layer}.{part}"
        for layer in ("dense", "output")
        for part in ("weight", "bias")
    }
    # A second task may begin with this head. Another seed: an initial head is a function of it.
    settings = [f"init_from={trained.checkpoint}", "train.max_steps=1", "seed=9"]
    warm = train(tmp_path / "warm", "finetune.load_head=true", *settings)
    cold = train(tmp_path / "cold", *settings)
    first = tuned["head.dense.weight"]
    moved = [(full_tensors(t.checkpoint)["head.dense.weight"] - first).abs().max() for t in (warm, cold)]
    assert moved[0] < 0.01 < moved[1]


def test_a_warm_start_knows_the_labels_of_its_own_training_data() -> None:
    """Proteins that are dropped are none of them; held-out splits are read by the loaded scale."""
    run = load_run(
        None, ["model.size=tiny", "task.kind=regression", "data.max_seq_length=8", "data.too_long=drop"]
    )
    pairs = {"train": [("MK", 1.0), ("LA", 4.0), ("MKTAYIAKQR", 900.0)], "valid": [("WY", 7.0)]}
    loaded = TargetInfo("regression", ["target"], [50], [101.0], [3.0], [101.0])
    splits = read_splits(run.data, run.task, UserParts(pairs), loaded)
    assert splits.info.to_dict() == loaded.to_dict() | {"counts": [2], "baseline": [2.5]}
    assert [len(splits.of["train"]), splits.of["valid"].labels.tolist()] == [2, [[7.0]]]
    assert "1 of 3 proteins of data.train have more than 6 residues" in splits.of["train"].notes[0]


def test_frozen_features_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """Computing them once changes nothing: freezing all but the head by patterns gives the same weights."""
    frozen = train(tmp_path / "frozen", "finetune.mode=frozen", "task.pooling=attention")
    patterns = "finetune.freeze=[embedding.*, encoder.*]"
    plain = train(tmp_path / "plain", patterns, "task.pooling=attention")
    expected, actual = full_tensors(plain.checkpoint), full_tensors(frozen.checkpoint)
    for name in ("head.dense.weight", "head.query", "head.output.bias"):
        assert (actual[name] - expected[name]).abs().max() < 1e-12
    with pytest.raises(UserError, match="'encoder.layer.*' matches no weight"):
        train(tmp_path / "wrong", "finetune.freeze=[encoder.layer.*]")
    with pytest.raises(UserError, match="in some layers and not in others"):
        train(tmp_path / "wrong", "finetune.freeze=[encoder.layers.0.*]")


def test_a_frozen_embedding_with_recomputed_layers_trains_the_layers(tmp_path: Path) -> None:
    """A recomputed layer whose input wants no gradient would be left out of the backward pass."""
    stored = train(tmp_path / "stored", "finetune.freeze=[embedding.*]")
    again = train(tmp_path / "again", "finetune.freeze=[embedding.*]", "model.recompute=full")
    expected, actual = full_tensors(stored.checkpoint), full_tensors(again.checkpoint)
    assert all((actual[name] - expected[name]).abs().max() < 1e-12 for name in expected)


def test_learning_rates_by_pattern_and_layer(tmp_path: Path) -> None:
    """Adam's first update does not depend on the size of the gradient: it is the rate of each weight."""
    start = ("train.max_steps=1", "optim.weight_decay=0", "task.dropout=0")
    changes = (
        "finetune.lr_scale={'*': 7, encoder.layers.*: 0.5, 'head.*': 3}",
        "finetune.layer_decay=0.8",
    )
    none = full_tensors(train(tmp_path / "none", *start, "optim.lr=1e-30").checkpoint)
    plain = full_tensors(train(tmp_path / "plain", *start).checkpoint)
    scaled = full_tensors(train(tmp_path / "scaled", *start, *changes).checkpoint)
    for name, first in none.items():
        if name.startswith("optimizer.") or not torch.is_floating_point(first) or "rotary" in name:
            continue
        factor = torch.tensor(7.0, dtype=torch.float64)
        if name.startswith("embedding."):
            factor *= 0.8**3
        if name.startswith("head."):
            factor = torch.tensor(3.0)
        if name.startswith("encoder.layers."):
            # Stacked: the first of two layers is two away from the head.
            factor = 0.5 * torch.tensor([0.8**2, 0.8]).view(-1, *[1] * (first.dim() - 1))
        moved = plain[name] - first
        assert moved.abs().max() > 1e-4, name
        assert (scaled[name] - first - factor * moved).abs().max() < 1e-9, name
    with pytest.raises(UserError, match="'hed.*' matches no weight that is trained"):
        train(tmp_path / "wrong", "finetune.lr_scale={hed.*: 2}")
    with pytest.raises(UserError, match="was trained with finetune.layer_decay=0.8"):
        train(tmp_path / "scaled", *changes[:1])


def test_a_resume_keeps_learning_rates(tmp_path: Path) -> None:
    """Of groups that differ in nothing else, with the rates of this start."""
    settings = ("finetune.lr_scale={embedding.*: 0.1, head.*: 3}", "schedule.name=linear", "optim.lr=1e-2")
    settings += ("schedule.decay_steps=4",)
    whole = train(tmp_path / "whole", *settings)
    train(tmp_path / "broken", *settings, "train.max_steps=2")
    again = train(tmp_path / "broken", *settings)
    expected, actual = full_tensors(whole.checkpoint), full_tensors(again.checkpoint)
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


class HeadWithMore(MLPHead):
    """A user's own head: that of the configuration with one tensor more."""

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device, TaskConfig(kind="regression", hidden_size=8), 1)
        self.bias = torch.nn.Parameter(torch.empty(1, device=device, dtype=config.params_dtype))

    def predict(self, features: torch.Tensor, segments: Any) -> torch.Tensor:
        return super().predict(features, segments) + self.bias


def test_a_lenient_start_takes_what_fits_and_says_what_does_not(
    finished: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = train(tmp_path / "first", "task.hidden_size=8")
    start = ("train.max_steps=1", "optim.lr=1e-30", "finetune.load_head=true", "seed=7")
    wider = ("task.hidden_size=9", f"init_from={first.checkpoint}")
    with pytest.raises(UserError, match="head.dense.weight"):
        train(tmp_path / "wider", *start, *wider)
    capfd.readouterr()
    taken = full_tensors(train(tmp_path / "wider", *start, *wider, "finetune.strict=false").checkpoint)
    said = capfd.readouterr().err
    assert "init_from initial: head.dense.weight is [8, 24] there and [9, 24] here\n" in said
    assert said.count("init_from ") == 3
    expected = full_tensors(first.checkpoint)
    same = [name for name in expected if not name.startswith(("optimizer.", "head."))] + ["head.output.bias"]
    assert len(same) > 15 and all(torch.equal(taken[name], expected[name]) for name in same)
    same_head = ("task.hidden_size=8", f"init_from={first.checkpoint}")
    with pytest.raises(UserError, match="missing .*head.bias"):
        train(tmp_path / "more", *start, *same_head, make_head=HeadWithMore)
    train(tmp_path / "more", *start, *same_head, "finetune.strict=false", make_head=HeadWithMore)
    assert capfd.readouterr().err.count("init_from initial: head.bias is not there\n") == 1
    # A pretrained model has no head at all.
    for strict in ("true", "false"):
        with pytest.raises(UserError, match="has no head of a task; set finetune.load_head=false"):
            train(tmp_path / "bare", *start, f"init_from={finished.run_dir}", f"finetune.strict={strict}")


def test_predictions_are_those_of_training_in_input_order(tmp_path: Path) -> None:
    """The metrics of the last evaluation follow from what `predict` writes for the same proteins."""
    trained = train(tmp_path / "run")
    table = tmp_path / "proteins.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "sequence", "target"])
        writer.writerows([["same", sequence, value] for sequence, value in VALID])
    out = tmp_path / "out.csv"
    assert main(["predict", str(tmp_path / "run"), str(table), "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["id"] for row in rows] == ["same"] * 10
    predicted = np.array([float(row["target"]) for row in rows])
    labels = np.array([value for _, value in VALID])
    assert trained.metrics["valid_mse"] == pytest.approx(((predicted - labels) ** 2).mean(), rel=1e-12)
    assert infer_model(trained.checkpoint, [sequence for sequence, _ in VALID]) == predicted.tolist()
    result = tmp_path / "metrics.json"
    arguments = ["evaluate", str(tmp_path / "run"), "--data", str(table), "--out", str(result)]
    assert main([*arguments, "task.bootstrap=50"]) == 0
    found = json.loads(result.read_text())
    assert (
        found["loss"] == trained.metrics["valid_loss"]
        and found["spearman"] == trained.metrics["valid_spearman"]
    )
    assert [example["prediction"] for example in found["predictions"]] == predicted.tolist()
    assert found["intervals"]["mse"][0] < found["mse"] < found["intervals"]["mse"][1]


def test_residues_in_all_formats(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    pairs = [(text, "".join("HEC"[ord(c) % 3] for c in text)) for text in SEQUENCES]
    trained = train(
        tmp_path / "run",
        "task.kind=token_classification",
        "task.head=cnn",
        "optim.lr=1e-2",
        "train.max_steps=12",
        train=pairs[:30],
        valid=pairs[30:],
    )
    fasta = tmp_path / "proteins.fasta"
    fasta.write_text("".join(f">p{n}\n{text}\n" for n, text in enumerate(SEQUENCES)))
    for ending in ("csv", "h5"):
        out = tmp_path / f"out.{ending}"
        assert main(["predict", str(trained.checkpoint), str(fasta), "--out", str(out)]) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [len(row["prediction"]) for row in rows] == [len(text) for text in SEQUENCES]
    right = [
        a == b
        for row, (_, label) in zip(rows, pairs, strict=True)
        for a, b in zip(row["prediction"], label, strict=True)
    ]
    assert np.mean(right) > 0.6  # a third by chance
    with h5py.File(tmp_path / "out.h5") as file:
        names, offsets = list(file.attrs["names"]), file["offsets"][:]
        likeliest = file["predictions"][:].argmax(axis=1)
        for number, row in enumerate(rows):
            mine = likeliest[offsets[number] : offsets[number + 1]]
            assert "".join(names[i] for i in mine) == row["prediction"]


def test_a_step_larger_than_the_data_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In steps and in epochs; nothing is said where a step takes each protein once at most."""
    batch = ("train.micro_batch_tokens=64", "train.global_batch_tokens=256")
    three = [("MKT", 1.0), ("MKTL", 2.0), ("LL", 4.0)]
    train(tmp_path / "epochs", *batch, "train.max_epochs=2", train=three)
    said = capsys.readouterr().err
    note = (
        "data     data.train has 3 proteins, and a step takes each of them 2 times, so that "
        "train.max_epochs=2 is 1 step; for smaller steps lower train.global_batch_tokens=256 and "
        "train.micro_batch_tokens=64\n"
    )
    assert note in said and said.index(note) < said.index("step 1: validation")
    train(tmp_path / "steps", *batch, "train.max_steps=1", train=three)
    assert (
        "data     data.train has 3 proteins, and a step takes each of them 4 times; for"
        in capsys.readouterr().err
    )
    train(tmp_path / "fits", *batch, "train.global_batch_tokens=64", "train.max_steps=1", train=three)
    assert "a step takes" not in capsys.readouterr().err


def test_steps_in_proteins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packs of any size give the same losses and metrics; epochs take every protein so often."""
    settings = [text for text in SETTINGS if "batch_tokens" not in text]
    settings += ["task.kind=regression", "train.max_epochs=2"]
    records = []
    for name, batch in (("a", ["train.micro_batch_size=1"]), ("b", ["train.micro_batch_size=4"])):
        given = [*settings, f"run_dir={tmp_path / name}", *batch, "train.global_batch_size=8"]
        trained = train_model(given, train=TRAIN, valid=VALID)
        state = layout.read_state(trained.last_checkpoint)
        assert state["step"] == 8 and state["data"]["consumed_samples"] == 2 * len(TRAIN)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        records.append([[r["loss"], r["grad_norm"]] for r in map(json.loads, lines) if r["kind"] == "train"])
    assert np.allclose(*records, rtol=0, atol=1e-10)
    assert "batch    8 proteins a step in packs of up to 64 tokens\n" in capsys.readouterr().err
    short = [*settings, f"run_dir={tmp_path / 'short'}", "train.micro_batch_size=80"]
    train_model(short, train=TRAIN[:3], valid=VALID)
    assert (
        "data.train has 3 proteins, and a step takes each of them 26.7 times, so that train.max_epochs=2 is "
        "1 step; for smaller steps lower train.global_batch_size=80\n" in capsys.readouterr().err
    )


def test_a_declared_class_that_training_never_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has an output, its held-out labels count as wrong, and records name it; the head goes on with it."""
    classes = ("task.kind=classification", 'task.classes=[many,"none",few]', "task.class_weights=balanced")
    pairs = [(s, "many" if v > 4 else "few") for s, v in PAIRS]
    held_out = [*pairs[30:], ("MKKT", "none"), ("LAG", "none")]
    trained = train(
        *(tmp_path / "run", *classes, "data.allow_overlap=true"),
        **{"train": pairs[:30], "valid": held_out, "test": pairs[30:]},
    )
    said = capsys.readouterr().err
    assert "data     data.train has no label of the class 'none' in column 'target'\n" in said
    assert (
        "data     2 labels are of the class 'none' in data.valid in column 'target', first at data.valid[10]"
        in said
    )
    assert trained.metrics["valid_unseen_classes"] == {"none": 2}
    assert "test_unseen_classes" not in trained.metrics
    (tmp_path / "t.csv").write_text("sequence,target\n" + "".join(f"{s},{c}\n" for s, c in held_out))
    command = ["evaluate", str(trained.checkpoint), "--data", str(tmp_path / "t.csv"), "--out"]
    assert main([*command, str(tmp_path / "out.json"), "task.bootstrap=5"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["unseen_classes"] == {"none": 2} and found["loss"] == trained.metrics["valid_loss"]
    assert (
        "first at" in found["notes"][0] and "t.csv:12; training had none of that class" in found["notes"][0]
    )
    right = [x["prediction"] == x["label"] != "none" for x in found["predictions"]]
    assert found["accuracy"] == trained.metrics["valid_accuracy"] == np.mean(right)
    capsys.readouterr()
    assert main([*command, str(tmp_path / "x.json"), "task.classes=[many,few]"]) == 2
    assert "has the classes ['many', 'none', 'few']; set task.classes=null" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("sequence,target\nMK,some\n")
    assert main([*command, str(tmp_path / "x.json")]) == 2
    assert (
        "t.csv:2: the class 'some' in column 'target' is none of those of the head: many,"
        in capsys.readouterr().err
    )
    warm = (*classes, f"init_from={trained.checkpoint}", "finetune.load_head=true", "train.max_steps=1")
    again = train(tmp_path / "warm", *warm, train=pairs[:30], valid=held_out)
    assert layout.read_state(again.checkpoint)["task"]["untrained"] == [1]


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    for overrides, message in (
        (["task.head=cnn"], "task.head=cnn does not go with task.kind=regression"),
        (["task.mask_column=m"], "marks residues, but task.kind=regression has labels of proteins"),
        (["task.head=hf", "data.too_long=crop"], "may cut <cls> away"),
        (["data.workers=1"], "labelled proteins are in memory"),
        (["finetune.mode=frozen", "model.hidden_dropout=0.1"], "computes the encoder once for each protein"),
        (["finetune.mode=frozen", "finetune.freeze=[embedding.*]"], "is of no use with finetune.mode=frozen"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path, *overrides)
    with pytest.raises(UserError, match="data.valid: 30 of 30 proteins are also in data.train"):
        train(tmp_path, valid=TRAIN)
    with pytest.raises(UserError, match="init_from=absent does not exist, and no model is configured"):
        train_model(["init_from=absent", "task.kind=regression"], train=TRAIN)
