"""Adapters and the head of a task, trained together: saved, reloaded, merged, exchanged with PEFT."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.checkpoint.store import load_weights
from esm2mega.checkpoint.tensor_filter import ENCODER
from esm2mega.cli.app import main
from esm2mega.config.load import load_run
from esm2mega.config.schema import LoRAConfig, ParallelConfig
from esm2mega.convert.convert import convert
from esm2mega.convert.start_point import read_start
from esm2mega.data.labels.dataset import proteins_of_sequences
from esm2mega.errors import UserError
from esm2mega.finetune.api import TrainedModel, infer_model, train_model
from esm2mega.finetune.checkpoint import open_task, run_task
from esm2mega.finetune.run import UserParts, finetune
from esm2mega.lora.base import identify
from esm2mega.lora.hf_head import TASK
from esm2mega.lora.hf_peft import export_adapters, import_adapters
from esm2mega.lora.merge import merge
from esm2mega.model.build import build_model
from esm2mega.model.heads import head_of_task
from esm2mega.parallel.initialize import process_groups
from esm2mega.vocabulary import encode_residues
from tests.checkpoints import full_tensors
from tests.unit.conftest import TinyRun
from tests.unit.lora import adapted
from tests.unit.lora.adapted import Base
from tests.unit.runs import CPU, SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(8)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(4, 60, 40)]
PAIRS = [(sequence, sequence.count("K") + len(sequence) / 10) for sequence in SEQUENCES]
UNSEEN = SEQUENCES[30:]
ADAPTERS = (
    "finetune.mode=lora",
    "lora.rank=3",
    "lora.alpha=6",
    "lora.target_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2]",
)


def _train(finished: TinyRun, run_dir: Path, *changes: str) -> TrainedModel:
    settings = [
        *SETTINGS,
        f"run_dir={run_dir}",
        f"init_from={finished.run_dir}",
        "task.kind=regression",
        "train.eval_every=2",
        "optim.lr=2e-2",
        *changes,
    ]
    return train_model(settings, train=PAIRS[:30], valid=PAIRS[30:])


@pytest.fixture(scope="module")
def trained(finished: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return _train(finished, tmp_path_factory.mktemp("adapted") / "run", *ADAPTERS)


def test_the_first_step_sees_the_unchanged_model(finished: TinyRun, tmp_path: Path) -> None:
    """The update of the first step of a warmup has rate 0: predictions are those of encoder and new head."""
    start = ("train.max_steps=1", "schedule.warmup_steps=1", "schedule.decay_steps=2")
    ours = _train(finished, tmp_path / "adapted", *ADAPTERS, *start)
    plain = _train(finished, tmp_path / "plain", "finetune.mode=frozen", *start)
    assert infer_model(ours.checkpoint, UNSEEN) == infer_model(plain.checkpoint, UNSEEN)


def test_the_base_gets_no_gradient_and_stays_as_it_is(finished: TinyRun, tmp_path: Path) -> None:
    seen: list[Any] = []
    settings = [*SETTINGS, *ADAPTERS, f"run_dir={tmp_path}", f"init_from={finished.run_dir}"]
    run = load_run(None, [*settings, "task.kind=regression"])
    finetune(
        run,
        UserParts({"train": PAIRS[:30]}),
        lambda model: seen.__setitem__(slice(None), unwrap_model(model)),
    )
    parameters = dict(seen[0].named_parameters())
    with process_groups(ParallelConfig(), seed=1):
        (model,) = build_model(run.model, run.parallel, CPU, 1, head_of_task(run.task, 1))
        load_weights(choose_checkpoint(finished.run_dir).path, [model], ENCODER)
    base = {name: value for name, value in model.named_parameters() if not name.startswith("head.")}
    assert len(base) > 20 and all(torch.equal(parameters[name], value) for name, value in base.items())
    assert not any(hasattr(parameters[name], "main_grad") for name in base)
    trained = parameters.keys() - base.keys()
    assert all(parameters[name].main_grad.abs().max() > 0 for name in trained)
    assert len(trained) == 2 * 6 * 2 + 4


def test_adapters_and_head_are_saved(finished: TinyRun, trained: TrainedModel) -> None:
    names = [name for name in full_tensors(trained.checkpoint) if not name.startswith("optimizer.")]
    assert {name.rpartition(".")[0].rpartition("_")[2] for name in names if "_lora." in name} == {"lora"}
    assert {name for name in names if "_lora." not in name} == {
        f"head.{layer}.{part}" for layer in ("dense", "output") for part in ("weight", "bias")
    }
    state = layout.read_state(trained.checkpoint)
    base = choose_checkpoint(finished.run_dir).path
    assert state["base"] == {"path": str(base), "sha256": identify(read_start(base)).sha256}


@pytest.mark.slow
def test_a_resumed_run_equals_an_unbroken_one(finished: TinyRun, tmp_path: Path) -> None:
    """With dropout in adapters and head, and trained biases."""
    settings = (*ADAPTERS, "lora.dropout=0.3", "lora.use_dora=true", "schedule.decay_steps=4")
    settings += ("lora.bias=all",)
    whole = _train(finished, tmp_path / "whole", *settings)
    _train(finished, tmp_path / "broken", *settings, "train.max_steps=2")
    # Killed while it saved step 3.
    (tmp_path / "broken" / "checkpoints" / "step_00000003.partial" / "model").mkdir(parents=True)
    broken = _train(finished, tmp_path / "broken", *settings)
    expected, actual = full_tensors(whole.checkpoint), full_tensors(broken.checkpoint)
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    assert whole.metrics["valid_loss"] == broken.metrics["valid_loss"]
    for key, change in (("lora.alpha=6", "lora.alpha=3"), ("lora.bias=all", "lora.bias=none")):
        with pytest.raises(UserError, match=key):
            _train(finished, tmp_path / "broken", *settings, change, "train.max_steps=6")
    with pytest.raises(UserError, match="holds adapters"):
        _train(finished, tmp_path / "broken", "train.max_steps=6")


def test_reload_and_merge_predict_what_training_evaluated(
    trained: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "proteins.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["sequence", "target"], *PAIRS[30:]])
    whole = tmp_path / "whole"
    assert main(["lora", "merge", str(trained.checkpoint), "--out", str(whole)]) == 0
    assert "head.output.weight" in capsys.readouterr().out
    predicted = {}
    for name, checkpoint in (("adapters", trained.checkpoint), ("merged", whole)):
        out = tmp_path / f"{name}.csv"
        assert main(["predict", str(checkpoint), str(table), "--out", str(out)]) == 0
        predicted[name] = np.array([float(row["target"]) for row in csv.DictReader(out.open())])
        metrics = tmp_path / f"{name}.json"
        arguments = ["evaluate", str(checkpoint), "--data", str(table), "--out", str(metrics)]
        assert main([*arguments, "task.bootstrap=0"]) == 0
    found = json.loads((tmp_path / "adapters.json").read_text())
    assert found["loss"] == trained.metrics["valid_loss"] and found["mse"] == trained.metrics["valid_mse"]
    scale = np.abs(predicted["adapters"]).max()
    assert np.abs(predicted["merged"] - predicted["adapters"]).max() < 1e-10 * scale
    assert layout.read_config(whole).finetune.mode == "full"
    states = {}
    for name, checkpoint in (("adapters", trained.checkpoint), ("merged", whole)):
        out = tmp_path / f"{name}.h5"
        assert main(["embed", str(checkpoint), str(table), "--out", str(out)]) == 0
        with h5py.File(out) as file:
            (layer,) = file["residue"].values()
            states[name] = layer[:]
    # Stored in fp32.
    assert np.abs(states["merged"] - states["adapters"]).max() < 1e-6 * np.abs(states["adapters"]).max()
    capsys.readouterr()
    arguments = [str(table), "--out", str(tmp_path / "x.h5"), "--include", "logits"]
    assert main(["embed", str(trained.checkpoint), *arguments]) == 2
    assert "no head of masked language modelling" in capsys.readouterr().err
    assert main(["convert", str(trained.checkpoint), str(tmp_path / "x"), "--to", "hf"]) == 2
    assert "esm2mega lora merge" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused(
    finished: TinyRun, trained: TrainedModel, tmp_path: Path
) -> None:
    rank = "lora.rank=3"
    for changes, message in (
        (["finetune.mode=lora"], "finetune.mode=lora needs the rank"),
        (["finetune.mode=frozen", rank], "trains the head alone, without adapters"),
        ([rank], "does not go with finetune.mode=full"),
        ([*ADAPTERS, "init_from=null"], "name it in init_from"),
        ([*ADAPTERS, "finetune.freeze=[embedding.*]"], "freezes all but adapters and head"),
        ([*ADAPTERS, f"init_from={trained.checkpoint}"], "lora merge"),
    ):
        with pytest.raises(UserError, match=message):
            _train(finished, tmp_path / "run", *changes)


@pytest.mark.parametrize("change", ["finetune.mode=frozen", "lora.rank=4"])
def test_adapters_are_configured_in_one_place(finished: TinyRun, tmp_path: Path, change: str) -> None:
    settings = [*SETTINGS, f"run_dir={tmp_path}", f"init_from={finished.run_dir}", "task.kind=regression"]
    with pytest.raises(UserError, match="adapters are configured by one of them"):
        train_model([*settings, change], train=PAIRS[:30], lora=LoRAConfig(rank=8))


def test_adapters_on_a_fine_tuned_model_go_on_with_its_head(
    finished: TinyRun, trained: TrainedModel, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    merge(trained.checkpoint, whole)
    start = (f"init_from={whole}", "finetune.load_head=true", "optim.lr=1e-30")
    again = _train(finished, tmp_path / "run", *ADAPTERS, *start)
    expected = np.array(infer_model(whole, UNSEEN))
    assert np.abs(infer_model(again.checkpoint, UNSEEN) - expected).max() < 1e-10 * np.abs(expected).max()
    merge(again.checkpoint, tmp_path / "again")
    merged = infer_model(tmp_path / "again", UNSEEN)
    assert np.abs(merged - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return adapted.make_base(tmp_path_factory.mktemp("base") / "hf", torch.float32)


def _tuned(base: Base, run_dir: Path, kind: str, labels: list[Any], *changes: str) -> TrainedModel:
    """A few large steps: adapters and head that matter."""
    settings = [text for text in SETTINGS if not text.startswith("model.")]
    settings += [f"run_dir={run_dir}", f"init_from={base.path}", f"task.kind={kind}", *ADAPTERS]
    pairs = list(zip(SEQUENCES, labels, strict=True))
    settings += ["optim.lr=5e-2", "lora.use_dora=true", "lora.bias=all", *changes]
    return train_model(settings, train=pairs[:30])


def _ours(checkpoint: Path) -> Any:
    """Numbers in units of the labels, or probabilities, of all `UNSEEN` in turn: ``[n, k]`` or ``[R, k]``."""
    measured, _ = run_task(open_task(checkpoint), proteins_of_sequences(UNSEEN), "predict")
    assert measured.predictions is not None
    return measured.predictions.values


@torch.no_grad()
def _theirs(model: Any, kind: str) -> Any:
    found = []
    for sequence in UNSEEN:
        ids = torch.tensor([[0, *encode_residues(sequence).tolist(), 2]])
        logits = model.eval()(ids, attention_mask=torch.ones_like(ids)).logits
        found.append(logits[0, 1:-1] if kind == "token_regression" else logits)
    values = torch.cat(found)
    return (values.softmax(dim=1) if kind == "classification" else values).numpy()


@pytest.mark.parametrize(
    "kind",
    [
        "classification",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("regression", "token_regression")),
    ],
)
def test_exported_with_its_head_it_predicts_the_same_in_peft(base: Base, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import EsmForSequenceClassification, EsmForTokenClassification

    labels: dict[str, list[Any]] = {
        "regression": [value * 3 - 5 for _, value in PAIRS],
        "token_regression": [[float(ord(c) % 7) for c in text] for text in SEQUENCES],
        "classification": ["abc"[len(text) % 3] for text in SEQUENCES],
    }
    head = ["task.head=hf"] if kind != "token_regression" else []
    ours = _tuned(base, tmp_path / "run", kind, labels[kind], *head)
    lines = export_adapters(ours.checkpoint, tmp_path / "peft")
    made = EsmForTokenClassification if kind == "token_regression" else EsmForSequenceClassification
    count = 3 if kind == "classification" else 1
    assert lines[1].startswith(f"head     {made.__name__} with num_labels={count}: ")
    plain = made.from_pretrained(base.path, num_labels=count)
    model = PeftModel.from_pretrained(plain, tmp_path / "peft")
    expected = _theirs(model, kind)
    predicted = _ours(ours.checkpoint)
    scale = np.abs(predicted).max()
    assert np.abs(predicted - expected).max() < 1e-5 * scale
    # The same head without the adapters is far away.
    with model.disable_adapter():
        assert np.abs(_theirs(model, kind) - expected).max() > 1e-2 * scale
    # And back.
    import_adapters(tmp_path / "peft", str(base.path), tmp_path / "back")
    assert np.abs(_ours(tmp_path / "back") - predicted).max() < 1e-5 * scale
    # The file that says what logits mean knows one column of classes; without it there is no head of ours.
    meaning = json.loads((tmp_path / "peft" / TASK).read_text())
    (tmp_path / "peft" / TASK).write_text(json.dumps({**meaning, "columns": ["a", "b"], "widths": [1, 9]}))
    with pytest.raises(UserError, match="columns and widths are of heads that transformers has not"):
        import_adapters(tmp_path / "peft", str(base.path), tmp_path / "bare")
    (tmp_path / "peft" / TASK).unlink()
    with pytest.raises(UserError, match="--drop"):
        import_adapters(tmp_path / "peft", str(base.path), tmp_path / "bare")


def test_a_classifier_that_peft_trained_becomes_a_head(base: Base, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import EsmForSequenceClassification

    plain = EsmForSequenceClassification.from_pretrained(base.path, num_labels=3)
    # With these, peft stores the classifier's biases three times, and an adapter of the contact head.
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear", bias="all")
    model = get_peft_model(plain, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "contact_head" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path / "peft")
    arguments = ["lora", "import", str(tmp_path / "peft"), "--base", str(base.path), "--out"]
    assert main([*arguments, str(tmp_path / "bare")]) == 2
    target = tmp_path / "ours"
    assert main([*arguments, str(target), "--task", "classification", "--labels", "x,y,z"]) == 0
    expected = _theirs(model, "classification")
    assert np.abs(_ours(target) - expected).max() < 1e-5
    assert infer_model(target, UNSEEN) == ["xyz"[number] for number in expected.argmax(axis=1)]
    assert main([*arguments, str(tmp_path / "few"), "--task", "classification", "--labels", "x,y"]) == 2


@pytest.mark.parametrize("kind", ["multilabel", "token_regression"])
def test_an_imported_head_is_described_as_a_converted_one(
    base: Base, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same section ``task`` and the same meaning, from the same classifier without names."""
    import transformers
    from peft import LoraConfig, get_peft_model

    shutil.copytree(base.path, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.3}))
    made, problem, count = "Sequence", "multi_label_classification", 3
    if kind == "token_regression":
        made, problem, count = "Token", "regression", 1
    make = getattr(transformers, f"EsmFor{made}Classification")
    plain = make.from_pretrained(tmp_path / "base", num_labels=count, problem_type=problem)
    plain.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "converted", "esm2mega")
    task_type = "SEQ_CLS" if made == "Sequence" else "TOKEN_CLS"
    model = get_peft_model(plain, LoraConfig(task_type=task_type, r=4, target_modules=["query"]))
    model.save_pretrained(tmp_path / "peft")
    arguments = ["lora", "import", str(tmp_path / "peft"), "--base", str(tmp_path / "base"), "--out"]
    assert main([*arguments, str(tmp_path / "ours"), "--task", kind]) == 0
    converted, ours = tmp_path / "converted", tmp_path / "ours"
    task = layout.read_config(ours).task
    assert task == layout.read_config(converted).task and task.dropout == 0.3
    assert layout.read_state(ours)["task"] == layout.read_state(converted)["task"]
    capsys.readouterr()
    for more, message in (
        (["--task", kind, "--labels", "a,a,b"], "--labels a,a,b has 'a' twice"),
        (["--task", "token_regression", "--labels", "a,b"], "with 2 numbers per residue has no equal here"),
        (["--task", "contact"], "'contact' is not one of"),
    ):
        assert main([*arguments, str(tmp_path / "x"), *more]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


def test_only_a_head_that_the_base_has_is_reported_as_dropped(base: Base, tmp_path: Path) -> None:
    convert(base.path, tmp_path / "bare", "hf", drop_head=True)
    for name, path in (("bare", tmp_path / "bare"), ("whole", base.path)):
        tuned = _tuned(replace(base, path=path), tmp_path / f"{name}_run", "regression", [1.0, 2.0] * 20)
        dropped = [
            line for line in merge(tuned.checkpoint, tmp_path / f"{name}_merged") if "the head" in line
        ]
        assert len(dropped) == (name == "whole")


def test_a_head_without_an_equal_is_reported(trained: TrainedModel, tmp_path: Path) -> None:
    lines = export_adapters(trained.checkpoint, tmp_path / "peft")
    dropped = [line for line in lines if line.startswith("dropped: head.")]
    assert len(dropped) == 1 and "task.head=auto" in dropped[0] and "head.output.bias" in dropped[0]
    assert not (tmp_path / "peft" / TASK).exists()
