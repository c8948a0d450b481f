"""A configuration by classes: its settings, the traps of dataclasses, and what is refused in one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from esm2mega.config.load import load_run
from esm2mega.errors import UserError
from esm2mega.finetune.classes import (
    FineTuneConfig,
    FineTuneDataModule,
    FineTuneModel,
    LossReduction,
    train_model,
)
from tests.own_classes import SmallConfig, SmallModel
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS


def test_fields_become_settings() -> None:
    size = "model.size=tiny"
    run = load_run(None, [*FineTuneConfig(encoder_frozen=True, ft_dropout=0.1).settings(), size])
    assert (run.task.kind, run.finetune.mode, run.task.dropout) == ("regression", "frozen", 0.1)
    assert (run.optim.lr, run.schedule.name, run.schedule.warmup_steps) == (5e-4, "constant", 0)
    start = FineTuneConfig(initial_ckpt_path="a b", overrides=[size, "optim.lr=1e-3"])
    run = load_run(None, start.settings())
    assert (run.init_from, run.optim.lr, run.finetune.load_head, run.finetune.skip) == (
        "a b",
        1e-3,
        False,
        [],
    )
    start.initial_ckpt_skip_keys_with_these_prefixes = ["embedding."]
    run = load_run(None, start.settings())
    assert (run.finetune.load_head, run.finetune.skip) == (True, ["embedding."])
    with pytest.raises(UserError, match="'task.kind=contact' is set by task_kind; give it there"):
        FineTuneConfig(overrides=["task.kind=contact"]).settings()


def test_a_default_that_a_dataclass_would_pass_over_is_refused() -> None:
    class NoDataclass(FineTuneConfig):
        encoder_frozen = True

    @dataclass
    class NoType(FineTuneConfig):
        model_cls = SmallModel

    @dataclass
    class NoTypeOfList(FineTuneConfig):
        overrides = ["optim.lr=1"]

    for cls, name in ((NoDataclass, "encoder_frozen"), (NoType, "model_cls"), (NoTypeOfList, "overrides")):
        with pytest.raises(UserError, match=f"{cls.__name__}.{name} changes a field without being one"):
            cls()

    class OnlyAMethod(SmallConfig):
        def get_loss_reduction_class(self) -> Any:
            return None

    assert OnlyAMethod().model_cls is SmallModel


class NoHead(FineTuneModel):
    head_cls = torch.nn.Linear  # type: ignore[assignment]


class NoForward(LossReduction):
    pass


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (torch.nn.Linear, None, "is no subclass of esm2mega.finetune.classes.FineTuneModel; name one"),
        (NoHead, None, "NoHead.head_cls=.* is no subclass of esm2mega.finetune.classes.TaskHead"),
        (FineTuneModel, torch.nn.MSELoss, "get_loss_reduction_class returned .*MSELoss.*; return a subclass"),
        (FineTuneModel, NoForward, "NoForward.. failed: TypeError: .*forward.*; correct it"),
    ],
)
def test_classes_of_another_kind_are_refused(model: Any, loss: Any, message: str) -> None:
    class Given(FineTuneConfig):
        def get_loss_reduction_class(self) -> Any:
            return loss

    with pytest.raises(UserError, match=message) as caught:
        Given(model_cls=model).code()
    assert "\n" not in str(caught.value)


def test_configure_model_shows_the_model_with_its_weights(finished: TinyRun) -> None:
    start = str(finished.run_dir)
    model = SmallConfig(initial_ckpt_path=start).configure_model()
    assert isinstance(model, SmallModel) and model.head.dense.weight.shape == (11, 24)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(".mlp." in name for name in frozen)
    skipped = ["head", "embedding.", "encoder.final_layernorm."]
    other = SmallConfig(
        initial_ckpt_path=start,
        initial_ckpt_skip_keys_with_these_prefixes=skipped,
        overrides=["model.init_std=0.3"],
    ).configure_model()
    for name, value in model.named_parameters():
        changed = not torch.equal(value, dict(other.named_parameters())[name])
        assert changed == name.startswith(("embedding.", "encoder.final_layernorm.")), name


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        (["head", "regression_head"], "no weight of the model has a name that begins with 'regression_h"),
        (["head", "encoder.layers.0."], "begins with 'encoder.layers.0.'; names are such as "),
        ([], "has no head of a task; set finetune.load_head=false"),
    ],
)
def test_prefixes_that_skip_nothing_are_refused(
    finished: TinyRun, tmp_path: Path, skipped: list[str], message: str
) -> None:
    config = SmallConfig(
        initial_ckpt_path=str(finished.run_dir),
        initial_ckpt_skip_keys_with_these_prefixes=skipped,
        overrides=[text for text in SETTINGS if not text.startswith(("model.", "train.max_steps"))],
    )
    with pytest.raises(UserError, match=message):
        train_model("x", tmp_path, config, FineTuneDataModule([("MKTAY", 1.0), ("LA", 2.0)]), 1)
