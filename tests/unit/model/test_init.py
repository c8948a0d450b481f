"""Initial weights: what they are, and that they do not depend on the layout."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state

from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.model.build import build_model
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.init import initial_value, initialize_parameters
from esm2mega.vocabulary import PAD

TABLE = "embedding.word_embeddings.weight"


def _slices(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: list[int], dim: int, tp_size: int
) -> list[torch.Tensor]:
    """What each of `tp_size` ranks gets of a parameter that is split along `dim` (-1: replicated)."""
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: tp_size)
    local = list(shape)
    if dim >= 0:
        local[dim] //= tp_size
    values = []
    for rank in range(tp_size):
        monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        parameter = torch.nn.Parameter(torch.empty(local))
        parameter.tensor_model_parallel = dim >= 0
        parameter.partition_dim = dim
        values.append(initial_value(name, parameter, seed=3, std=0.02))
    return values


@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize(
    ("name", "shape", "dim"),
    [
        ("encoder.layers.0.self_attention.linear_qkv.weight", [48, 16], 0),
        ("encoder.layers.0.self_attention.linear_proj.weight", [16, 16], 1),
        (TABLE, [40, 16], 0),
    ],
    ids=["column", "row", "table"],
)
def test_slices_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: list[int], dim: int, tp_size: int
) -> None:
    (whole,) = _slices(monkeypatch, name, shape, dim, 1)
    parts = _slices(monkeypatch, name, shape, dim, tp_size)
    assert all(part.shape[dim] == shape[dim] // tp_size for part in parts)
    assert torch.equal(torch.cat(parts, dim=dim), whole)


def test_replicated_matrices_are_equal_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _slices(monkeypatch, "lm_head.dense.weight", [16, 16], -1, 2)
    assert torch.equal(first, second)
    assert first.any()


def test_table_has_empty_rows_for_pad_and_beyond_the_vocabulary(model: ESM2Model) -> None:
    rows = model.embedding.word_embeddings.weight.abs().sum(dim=1)
    assert (rows == 0).nonzero().flatten().tolist() == [PAD, *range(33, 40)]


def test_table_does_not_depend_on_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    (short,), (long,) = (_slices(monkeypatch, TABLE, [rows, 16], 0, 1) for rows in (40, 48))
    assert torch.equal(long[:40], short)
    assert not long[40:].any()


def test_scales_are_one_and_biases_zero(model: ESM2Model) -> None:
    scales = {n for n, p in model.named_parameters() if p.dim() == 1 and (p == 1).all()}
    zeros = {n for n, p in model.named_parameters() if p.dim() == 1 and not p.any()}
    assert scales == {n for n, p in model.named_parameters() if n.endswith("norm.weight")}
    assert scales | zeros == {n for n, p in model.named_parameters() if p.dim() == 1}
    assert len(scales) == 6  # two per layer, the final one, the head's


@pytest.mark.parametrize(("name", "expected"), [("layer_norm_weight", 1.0), ("layer_norm_bias", 0.0)])
def test_fused_layer_norms_start_alike(world: None, name: str, expected: float) -> None:
    """Transformer Engine keeps the LayerNorm inside the linear module that follows it."""
    value = initial_value(
        f"encoder.layers.0.mlp.linear_fc1.{name}", torch.nn.Parameter(torch.empty(5)), 3, 0.02
    )
    assert value.tolist() == [expected] * 5


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_every_matrix_has_the_asked_deviation(model: ESM2Model, std: float) -> None:
    """No output projection is scaled by depth. 5 sigma of the estimate from n values is 5 / sqrt(2n)."""
    initialize_parameters(model, seed=1, std=std)
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    assert len(matrices) == 10
    for name, parameter in matrices.items():
        values = parameter[[row for row in range(33) if row != PAD]] if name == TABLE else parameter
        bound = 5 / (2 * values.numel()) ** 0.5
        assert abs(values.std().item() / std - 1) < bound, name
        assert abs(values.mean().item() / std) < 5 / values.numel() ** 0.5, name


def test_values_follow_name_and_seed(model: ESM2Model) -> None:
    def values(seed: int) -> dict[str, torch.Tensor]:
        initialize_parameters(model, seed=seed, std=0.02)
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 2}

    first, again, other = values(1), values(1), values(2)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name
    layers = [first[f"encoder.layers.{n}.mlp.linear_fc1.weight"] for n in (0, 1)]
    assert not torch.equal(*layers)


def test_values_do_not_depend_on_the_precision_or_on_what_was_drawn_before(world: None) -> None:
    shape = ModelConfig(
        num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, layer_spec="local"
    )
    models = []
    for precision in ("fp32", "fp64"):
        shape.precision = precision
        torch.rand(17)
        models += build_model(shape, ParallelConfig(), torch.device("cpu"), seed=9)
    for (name, single), (_, double) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.equal(single.double(), double), name
