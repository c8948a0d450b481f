"""Heads on padded batches against the heads of packs, which are compared with PyTorch's modules elsewhere."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from esm2mega.config.schema import TaskConfig
from esm2mega.convert.heads.user_code import UserCode
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.export.padded_heads import PaddedHead, why_not
from esm2mega.model.heads import head_of_task
from tests.task_batches import one_pack, proteins_of

H, NAMES = 12, ["a", "b", "c"]
SEQUENCES = ["MKTAYIAKQR", "LA", "G", "WYVTSRQPNMFKLIHGEDCA" * 2, "MKKLLPT"]


def described(task: TaskConfig, shapes: dict[str, tuple[int, ...]] | None = None) -> HeadDescription:
    scale = {"mean": [3.0, -1.0, 50.0], "std": [2.0, 0.5, 7.0]} if "regression" in str(task.kind) else {}
    info = TargetInfo(str(task.kind), NAMES, **scale)  # type: ignore[arg-type]
    return HeadDescription(task, info, shapes or {})


@pytest.mark.parametrize(
    "task",
    [
        *(TaskConfig(kind="regression", pooling=pooling) for pooling in ("mean", "cls", "max", "attention")),
        TaskConfig(kind="classification", head="linear"),
        TaskConfig(kind="multilabel", head="hf"),
        TaskConfig(kind="regression", head="pooler", pooler_activation="gelu"),
        TaskConfig(kind="token_regression"),
        TaskConfig(kind="token_classification", head="cnn"),
    ],
    ids=lambda task: f"{task.kind}-{task.head}-{task.pooling}",
)
def test_padded_heads_equal_those_of_packs(task: TaskConfig) -> None:
    generator = torch.Generator().manual_seed(5)
    head = head_of_task(task, len(NAMES))(
        SimpleNamespace(hidden_size=H, params_dtype=torch.float32), torch.device("cpu")
    ).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    values = {f"head.{name}": value for name, value in head.state_dict().items()}
    description = described(task, {name: tuple(value.shape) for name, value in values.items()})
    assert why_not(description) is None
    padded = PaddedHead(description)
    padded.load_state_dict(head.state_dict())

    batch = one_pack(proteins_of(SEQUENCES, per_residue=description.info.per_residue))
    states = torch.randn(256, H, generator=generator)
    lengths = batch.seqlens[: len(SEQUENCES)]
    # Padding with values that would show.
    x = torch.full((len(lengths), max(lengths), H), 9.0)
    residues = torch.zeros(x.shape[:2], dtype=torch.bool)
    for row, (piece, length) in enumerate(zip(states.split(batch.seqlens), lengths, strict=False)):
        x[row, :length] = piece
        residues[row, 1 : length - 1] = True
    with torch.no_grad():
        expected, actual = head(states, batch.head_inputs), padded(x, residues)
    if description.info.std:
        expected = expected * torch.tensor(description.info.std) + torch.tensor(description.info.mean)
    if description.info.per_residue:
        assert not actual[~residues].any(), "nothing is predicted for other tokens"
        actual = actual[residues]
    # fp32 sums of 12 to 84 products of values around 1, times the largest scale of 7.
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("task", "instead"),
    [
        (TaskConfig(kind="contact", head="attention_maps"), "--include contacts"),
        (TaskConfig(kind="contact"), "--include encoder"),
        (TaskConfig(kind="regression", head="tape"), "--include encoder"),
        (TaskConfig(kind="token_classification", head="proteinlm"), "--include encoder"),
    ],
    ids=lambda value: f"{value.kind}-{value.head}" if isinstance(value, TaskConfig) else "",
)
def test_heads_without_a_padded_form_are_named(task: TaskConfig, instead: str) -> None:
    assert instead in (why_not(described(task)) or "")


def test_a_head_of_own_code_is_named() -> None:
    head = replace(described(TaskConfig(kind="regression")), code=UserCode(head="mine:Head"))
    assert "your own code; give --include encoder" in (why_not(head) or "")
