"""The flow by classes: train with a frozen encoder, predict, go on with adapters, predict again."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esm2mega import evaluate_model, load
from esm2mega.cli.app import main
from esm2mega.convert.start_point import read_checkpoint, read_start
from esm2mega.errors import UserError
from esm2mega.finetune.classes import (
    FineTuneDataModule,
    InMemorySingleValueDataset,
    LoRATransform,
    infer_model,
    train_model,
)
from esm2mega.inspect import inspect_path
from esm2mega.lora.checkpoint import AdapterReader
from esm2mega.lora.merge import merge, merged
from tests.checkpoints import full_weights
from tests.own_classes import EncoderLoRA, OtherModel, RootConfig, SmallConfig
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(5)
PAIRS = [
    ("".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)), float(n) / 10) for n in RNG.integers(9, 40, 16)
]
SHORT = [text for text in SETTINGS if not text.startswith(("model.", "train.max_steps"))]


class HalfValues(InMemorySingleValueDataset):
    """What users extend: other values, or other sequences."""

    def __getitem__(self, index: int) -> tuple[str, Any]:
        sequence, value = super().__getitem__(index)
        return sequence, value / 2


def data(extended: bool = False) -> FineTuneDataModule:
    make = HalfValues if extended else InMemorySingleValueDataset
    return FineTuneDataModule(make(PAIRS[:10]), make(PAIRS[10:]), make(PAIRS[10:]))


def of(checkpoint: Path | str, skipped: list[str], **given: Any) -> SmallConfig:
    return SmallConfig(
        initial_ckpt_path=str(checkpoint),
        initial_ckpt_skip_keys_with_these_prefixes=skipped,
        overrides=SHORT,
        **given,
    )


@pytest.fixture(scope="module")
def frozen(finished: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head trained on a frozen encoder for two steps; its numbers are those of the validation."""
    config = of(finished.run_dir, ["head"], encoder_frozen=True)
    checkpoint, metrics, run = train_model("e", tmp_path_factory.mktemp("f"), config, data(extended=True), 2)
    assert (run.finetune.mode, Path(run.run_dir).name, run.train.max_steps) == ("frozen", "e", 2)
    values = np.array([value / 2 for _, value in PAIRS[10:]])
    found = np.array(infer_model(of(checkpoint, []), data()))
    # In fp64, in two orders of adding.
    assert metrics["valid_loss"] == pytest.approx(((found - values) ** 2).mean(), rel=1e-12)
    assert found.std() > 1e-4
    return checkpoint


def test_a_frozen_encoder_is_that_of_the_start(finished: TinyRun, frozen: Path) -> None:
    before, after = full_weights(finished.run_dir / "checkpoints" / "step_00000004"), full_weights(frozen)
    encoder = [name for name in after if not name.startswith("head.")]
    assert encoder and all(torch.equal(before[name], after[name]) for name in encoder)
    assert "model tests.own_classes:SmallModel\n" in inspect_path(frozen)


def test_what_the_model_froze_is_kept_and_the_logged_loss_is_reduced(
    finished: TinyRun, tmp_path: Path
) -> None:
    plain, metrics, _ = train_model("a", tmp_path, of(finished.run_dir, ["head"]), data(), 2)
    root_config = RootConfig(initial_ckpt_path=str(finished.run_dir), overrides=SHORT)
    root, root_metrics, _ = train_model("b", tmp_path, root_config, data(), 2)
    weights, same = full_weights(plain), full_weights(root)
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    for name in ("loss", "valid_loss"):
        assert root_metrics[name] == pytest.approx(metrics[name] ** 0.5, rel=1e-12)
    before = full_weights(finished.run_dir / "checkpoints" / "step_00000004")
    for name, value in weights.items():
        if not name.startswith("head."):
            # The LayerNorm before it is named after the linear that follows.
            is_kept = (".mlp." in name and "layer_norm" not in name) or "rotary" in name
            assert torch.equal(value, before[name]) == is_kept, name


def test_adapters_beside_what_a_transform_leaves_to_be_trained(frozen: Path, tmp_path: Path) -> None:
    before = full_weights(frozen)
    transform = EncoderLoRA(rank=2, target_modules=["linear_q", "linear_fc1"])
    start = of(frozen, [])
    checkpoint, metrics, run = train_model("lora", tmp_path, start, data(), 2, transform=transform)
    assert (run.finetune.mode, run.lora.rank, run.finetune.load_head) == ("lora", 2, True)
    trained = full_weights(checkpoint)
    beside = {name for name in trained if "_lora." not in name}
    assert {name for name in beside if not name.startswith("head.")} == {"embedding.word_embeddings.weight"}
    assert all(not torch.equal(trained[name], before[name]) for name in beside)
    assert all(torch.equal(value, before[name]) for name, value in full_weights(frozen).items())

    found = np.array(infer_model(of(checkpoint, []), data()))
    values = np.array([value for _, value in PAIRS[10:]])
    assert metrics["valid_loss"] == pytest.approx(((found - values) ** 2).mean(), rel=1e-12)
    # Merged and embedded with the table that was trained. Training pads it, a merge reads its tokens alone.
    table = "embedding.word_embeddings.weight"
    weights = merged(read_start(str(frozen)).weights, AdapterReader(read_checkpoint(checkpoint)))
    assert weights.read(table).shape == weights.infos[table].shape
    merge(checkpoint, tmp_path / "merged")
    after = infer_model(of(tmp_path / "merged", []), data())
    np.testing.assert_allclose(after, found, rtol=0, atol=1e-12)
    sequences = [sequence for sequence, _ in PAIRS[10:]]
    with load(checkpoint) as adapted, load(tmp_path / "merged") as whole, load(frozen) as base:
        states = [model.embed(sequences, pooling="mean") for model in (adapted, whole, base)]
    np.testing.assert_allclose(states[0], states[1], rtol=0, atol=1e-12)
    assert np.abs(states[0] - states[2]).max() > 1e-5
    assert main(["lora", "export", str(checkpoint), "--out", str(tmp_path / "peft")]) == 2


@pytest.mark.slow
def test_a_resume_trains_what_the_transform_left_to_be_trained(frozen: Path, tmp_path: Path) -> None:
    """One step and then another are two, bit for bit."""
    start, transform = of(frozen, []), EncoderLoRA(rank=2, target_modules=["linear_v"])
    for name, steps in (("broken", 1), ("broken", 2), ("whole", 2)):
        train_model(name, tmp_path, start, data(), steps, transform=transform)
    last = [tmp_path / name / "checkpoints" / "step_00000002" for name in ("whole", "broken")]
    one, other = map(full_weights, last)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


class FrozenHead(LoRATransform):
    def selective_freeze(self, module: Any, name: str, prefix: str) -> Any:
        return super().selective_freeze(module, "encoder", prefix) if name == "" else module


class FirstLayer(LoRATransform):
    def selective_freeze(self, module: Any, name: str, prefix: str) -> Any:
        if (name, prefix) == ("0", "encoder.layers"):
            module.requires_grad_(False)
        return module


class NoAdapters(LoRATransform):
    def transform(self, module: Any, name: str, prefix: str) -> Any:
        return module


class Fails(LoRATransform):
    def selective_freeze(self, module: Any, name: str, prefix: str) -> Any:
        return module.missing  # the mistake


@pytest.mark.parametrize(
    ("skipped", "transform", "given", "message"),
    [
        (["head"], FrozenHead(2), {}, "freezes a head with random weights; leave it to be trained, or load"),
        (
            ["head"],
            FirstLayer(2),
            {},
            "transform.selective_freeze freezes .* in some layers and not in others",
        ),
        (["head"], NoAdapters(2), {}, "transform: no linear has a trained adapter; let `transform` call"),
        (["head"], Fails(2), {}, "Fails failed at .*test_flow.py:.*has no attribute 'missing'; correct it"),
        (["head"], LoRATransform, {}, "transform is <class .*; give an instance of LoRATransform"),
        (
            ["head"],
            LoRATransform(2),
            {"encoder_frozen": True},
            "finetune.mode=frozen .encoder_frozen., lora.r",
        ),
        (["head", "embedding."], LoRATransform(2), {}, "would leave adapters without their base; remove it"),
    ],
)
def test_transforms_that_cannot_be_kept_are_refused(
    frozen: Path, tmp_path: Path, skipped: list[str], transform: Any, given: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train_model("x", tmp_path, of(frozen, skipped, **given), data(), 1, transform=transform)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_head_that_is_loaded_may_stay_as_it_is(frozen: Path, tmp_path: Path) -> None:
    checkpoint, metrics, _ = train_model("x", tmp_path, of(frozen, []), data(), 1, transform=FrozenHead(2))
    assert all("_lora." in name for name in full_weights(checkpoint))
    found = np.array(infer_model(of(checkpoint, []), data()))
    values = np.array([value for _, value in PAIRS[10:]])
    assert metrics["valid_loss"] == pytest.approx(((found - values) ** 2).mean(), rel=1e-12)
    merge(checkpoint, tmp_path / "merged")
    np.testing.assert_allclose(infer_model(of(tmp_path / "merged", []), data()), found, rtol=0, atol=1e-12)


def test_what_predictions_need(frozen: Path) -> None:
    for config, module, message in (
        (of(frozen, ["head"]), data(), r"=\['head'\] would predict with random weights; set it to \[\]"),
        (
            SmallConfig(),
            data(),
            "initial_ckpt_path is not set; give the checkpoint that train_model returned",
        ),
        (of(frozen, []), FineTuneDataModule(), "predict_dataset is not set; give FineTuneDataModule"),
        (SmallConfig, data(), "config is <class .*; give an instance of a subclass of .*FineTuneConfig"),
        (
            of(frozen, [], model_cls=OtherModel),
            data(),
            "trained with the model tests.own_classes:SmallModel, n",
        ),
    ):
        with pytest.raises(UserError, match=message):
            infer_model(config, module)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="is a model of your own code, tests.own_classes:SmallModel; give the"
    ):
        evaluate_model(frozen, PAIRS)
    with pytest.raises(UserError, match="train_dataset is not set; give FineTuneDataModule"):
        train_model("x", "y", of(frozen, []), FineTuneDataModule(), 1)
    plain = FineTuneDataModule(predict_dataset=[sequence for sequence, _ in PAIRS[10:]])
    assert infer_model(of(frozen, []), plain) == infer_model(of(frozen, []), data())


def test_commands_take_the_configuration_as_code(frozen: Path, tmp_path: Path) -> None:
    table = tmp_path / "valid.csv"
    table.write_text("sequence,target\n" + "".join(f"{s},{v}\n" for s, v in PAIRS[10:]))
    out, result, code = tmp_path / "out.csv", tmp_path / "out.json", "tests.own_classes:SmallConfig"
    assert main(["predict", str(frozen), str(table), "--out", str(out), "--code", code]) == 0
    found = [float(row["target"]) for row in csv.DictReader(out.open())]
    assert found == infer_model(of(frozen, []), data())
    command = ["evaluate", str(frozen), "--data", str(table), "--out", str(result), "--code", code]
    assert main([*command, "task.bootstrap=0"]) == 0
    values = np.array([value for _, value in PAIRS[10:]])
    loss = json.loads(result.read_text())["loss"]
    assert loss == pytest.approx(((np.array(found) - values) ** 2).mean(), rel=1e-12)
    assert main([*command, "--code", "tests.own_code:MeanHead"]) == 2


def test_a_model_that_fails_is_named_with_the_place(finished: TinyRun, tmp_path: Path) -> None:
    class Fails(OtherModel):
        def forward(self, *inputs: Any) -> Any:
            return self.missing  # the mistake

    config = replace(of(finished.run_dir, ["head"]), model_cls=Fails)
    with pytest.raises(UserError, match="Fails.forward failed at .*test_flow.py:.*'missing'.*; correct it"):
        train_model("x", tmp_path, config, data(), 1)
