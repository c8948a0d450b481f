"""Heads on packs against the same modules of PyTorch applied to each protein alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esm2mega.batch import LabelledBatch
from esm2mega.config.schema import ParallelConfig, TaskConfig
from esm2mega.model.dropout import KeyedDropout
from esm2mega.model.heads import head_of_task
from esm2mega.model.init import initialize_parameters
from esm2mega.parallel.initialize import process_groups
from tests.task_batches import one_pack, proteins_of

H, K = 12, 3
SEQUENCES = ["MKTAYIAKQR", "LA", "G", "WYVTSRQPNMFKLIHGEDCA" * 2, "MKKLLPT"]


def made(task: TaskConfig) -> Any:
    config = SimpleNamespace(hidden_size=H, params_dtype=torch.float64)
    head = head_of_task(task, K)(config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return head.eval()


def hidden_and_batch() -> tuple[Tensor, LabelledBatch, list[tuple[Tensor, Tensor]]]:
    """Random states of a pack; and of each protein in it its `<cls>` and residues."""
    batch = one_pack(proteins_of(SEQUENCES))
    states = torch.randn(256, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone, first = [], 0
    for length, row in zip(batch.seqlens, batch.rows.tolist(), strict=False):
        assert length == len(SEQUENCES[row]) + 2
        alone.append((states[first], states[first + 1 : first + length - 1]))
        first += length
    return states, batch, alone


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "attention"])
def test_pooled_heads_equal_each_protein_alone(pooling: str) -> None:
    states, batch, alone = hidden_and_batch()
    head = made(TaskConfig(kind="regression", pooling=pooling, head="mlp"))
    for number, (cls, residues) in enumerate(alone):
        pooled = {"mean": residues.mean(0), "cls": cls, "max": residues.amax(0)}.get(pooling)
        if pooled is None:
            pooled = (residues @ head.query).softmax(0) @ residues
        expected = head.output(F.relu(head.dense(pooled)))
        assert (head(states, batch.head_inputs)[number] - expected).abs().max() < 1e-13


def test_convolutions_never_see_the_neighbour() -> None:
    """Each protein through `Conv1d` alone, which pads with zeros."""
    states, batch, alone = hidden_and_batch()
    head = made(TaskConfig(kind="token_classification", head="cnn"))
    together = head(states, batch.head_inputs)
    expected = [head.second(F.relu(head.first(residues.T[None])))[0].T for _, residues in alone]
    assert together.shape == (sum(map(len, SEQUENCES)), K)
    assert (together - torch.cat(expected)).abs().max() < 1e-13


def test_heads_of_tape_read_the_tokens_around_the_residues() -> None:
    """Each protein through modules of PyTorch alone, `<cls>` and `<eos>` included, in evaluation."""
    states, batch, _ = hidden_and_batch()
    pieces = states.split([*batch.seqlens])[: len(SEQUENCES)]
    segments = batch.head_inputs

    def weight(layer: Any) -> Tensor:
        return layer.weight_v * layer.weight_g / layer.weight_v.norm()

    head = made(TaskConfig(kind="token_classification", head="tape", hidden_size=7))
    expected = []
    for x in pieces:
        scaled = (x * head.norm.weight + head.norm.bias).T[None]
        hidden = F.relu(F.conv1d(scaled, weight(head.first), head.first.bias, padding=2))
        expected.append(F.conv1d(hidden, weight(head.output), head.output.bias, padding=1)[0].T[1:-1])
    assert (head(states, segments) - torch.cat(expected)).abs().max() < 1e-13
    head = made(TaskConfig(kind="classification", head="tape", hidden_size=7))
    for number, x in enumerate(pieces):
        hidden = F.relu(F.linear(torch.tanh(head.dense(x[0])), weight(head.first), head.first.bias))
        alone = F.linear(hidden, weight(head.output), head.output.bias)
        assert (head(states, segments)[number] - alone).abs().max() < 1e-13


def test_a_new_residual_block_passes_on_what_it_gets() -> None:
    """So 30 of them start as none, and the first step reaches all last scales."""
    config = SimpleNamespace(hidden_size=H, params_dtype=torch.float64)
    head = head_of_task(TaskConfig(kind="contact", head="proteinlm"), 1)(config, torch.device("cpu"))
    model: Any = SimpleNamespace(
        named_parameters=head.named_parameters, global_parameter_name="head.{}".format
    )
    with process_groups(ParallelConfig(), seed=1):
        initialize_parameters(model, 1, 0.02)
    segments = one_pack(proteins_of(["MKTAY"])).head_inputs
    states = torch.randn(7, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    head(states, segments).square().sum().backward()
    assert all(block.norm2.weight.grad.abs().max() > 0 for block in head.blocks)
    maps = torch.rand(1, 64, 5, 5, dtype=torch.float64)
    assert torch.equal(head.blocks[3](maps), maps)


@pytest.mark.parametrize(
    "task",
    [
        TaskConfig(kind="regression", pooling="attention"),
        TaskConfig(kind="regression", head="proteinlm", hidden_size=7),
        TaskConfig(kind="token_classification", head="tape", hidden_size=7),
        TaskConfig(kind="regression", head="linear", pooling="max"),
        TaskConfig(kind="multilabel", head="pooler"),
        TaskConfig(kind="token_regression"),
        TaskConfig(kind="token_classification", head="cnn"),
    ],
)
def test_a_pack_without_proteins_has_gradients_of_zero(task: TaskConfig) -> None:
    states, batch, _ = hidden_and_batch()
    states.requires_grad_()
    head = made(task)
    output = head(states, batch.without_labels().head_inputs)
    assert output.shape == (0, K)
    output.sum().backward()
    assert states.grad is not None and not states.grad.any()


def test_dropout_belongs_to_protein_and_sample() -> None:
    keys, places = torch.tensor([7, 7, -9]), torch.tensor([0, 1, 0])
    values = torch.ones(3, 20000, dtype=torch.float64)
    dropout = KeyedDropout(0.25)
    dropped = dropout(values, keys, places)
    kept = dropped != 0
    # Five standard deviations of 20,000 draws.
    assert ((kept.double().mean(1) - 0.75).abs() < 0.016).all()
    assert torch.equal(dropped[kept], torch.full_like(dropped[kept], 1 / 0.75))
    # Rows, places, layers and proteins draw independently of each other, and each always the same.
    others = [kept[1], kept[2], KeyedDropout(0.25, layer=1)(values, keys, places)[0] != 0]
    for other in others:
        assert abs((kept[0] & other).double().mean() - 0.5625) < 0.018
    assert torch.equal(dropout(values[[2, 0]], keys[[2, 0]], places[[2, 0]]), dropped[[2, 0]])
    assert torch.equal(dropout.eval()(values, keys, places), values)
