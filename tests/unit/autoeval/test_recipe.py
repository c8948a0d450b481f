"""The recipe of fine-tuning: how long it is, and what the user changes of that."""

from __future__ import annotations

import pytest

from esm2mega.autoeval.recipe import finetune_settings


@pytest.mark.parametrize(
    ("num_train", "given", "epochs", "warmup"),
    [
        (24, [], "20", "2"),
        (24, ["train.max_epochs=2"], "2", "0"),
        (8000, [], "8", "200"),  # 250 steps for each pass, 2,000 in all
        (640_000, [], "1", "2000"),
        (8000, ["train.max_steps=500"], "null", "50"),
    ],
)
def test_length(num_train: int, given: list[str], epochs: str, warmup: str) -> None:
    words = finetune_settings("finetune", "regression", num_train, 62, 8_000_000, given)
    settings = dict(word.split("=") for word in words)
    assert (settings["train.max_epochs"], settings["schedule.warmup_steps"]) == (epochs, warmup)


def test_learning_rates() -> None:
    rates = [
        dict(word.split("=") for word in finetune_settings(mode, "regression", 9, 9, size))["optim.lr"]
        for mode, size in (("lora", 650_000_000), ("finetune", 8_000_000), ("finetune", 650_000_000))
    ]
    assert rates == ["0.001", "0.001", "5e-05"]
