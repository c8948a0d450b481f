"""The last layer at the rows that get logits, against the whole layer and a selection of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.packed import PackedSequences
from tests.unit.model.models import loss_and_gradients, random_model

IDS = torch.tensor([0, 5, 32, 2, 0, 6, 2, 0, 32, 9, 4, 2])
LENGTHS = [4, 3, 5]
# Of the first sequence, of none, of the last; the second has no label.
CASES = [([1, 2, 8, 10], [2, 0, 2]), ([], [0, 0, 0]), (list(range(12)), LENGTHS)]
LABELS = (torch.arange(12) * 7 + 4) % 33


def _results(model: ESM2Model, positions: Tensor, counts: Sequence[int] | None) -> dict[str, Tensor]:
    packed = PackedSequences.from_lengths(LENGTHS, row_counts=counts)
    return loss_and_gradients(model, IDS, packed, LABELS, positions)


def _mlp_inputs(model: ESM2Model) -> list[int]:
    """Grows by the number of tokens of each call of an MLP."""
    tokens: list[int] = []
    for layer in model.encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].shape[0]))
    return tokens


class OtherCoreAttention(nn.Module):
    """Stands for an attention that takes whole sequences only."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, query: Tensor, key: Tensor, *others: Any, **settings: Any) -> Tensor:
        assert query.shape == key.shape
        return self.whole(query, key, *others, **settings)


def _assert_same(model: ESM2Model, positions: list[int], counts: list[int]) -> None:
    places = torch.tensor(positions, dtype=torch.int64)
    expected = _results(model, places, None)
    tokens = _mlp_inputs(model)
    actual = _results(model, places, counts)
    assert set(tokens) == {12, len(positions) or 12}
    assert tokens[2] == (len(positions) or 12), "the third call is that of the last layer"
    assert actual.keys() == expected.keys()
    assert len(actual) == 1 + len(list(model.parameters()))
    for name, value in expected.items():
        assert value.any() == bool(positions), name
        # Up to rounding: sums over rows run in another order.
        assert (actual[name] - value).abs().max() <= 1e-12 * max(1.0, value.abs().max().item()), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("positions", "counts"), CASES, ids=["some", "none", "all"])
def test_rows_give_the_same_loss_and_gradients(
    world: None, recompute: str, positions: list[int], counts: list[int]
) -> None:
    _assert_same(random_model(recompute=recompute), positions, counts)


def test_rows_behind_an_attention_of_whole_sequences(world: None) -> None:
    model = random_model()
    attention = model.encoder.layers[-1].self_attention
    attention.core_attention = OtherCoreAttention(attention.core_attention)
    _assert_same(model, *CASES[0])


def test_rows_in_evaluation(world: None) -> None:
    model = random_model().eval()
    positions, counts = CASES[0]
    with torch.no_grad():
        whole = model(IDS, PackedSequences.from_lengths(LENGTHS))
        tokens = _mlp_inputs(model)
        packed = PackedSequences.from_lengths(LENGTHS, row_counts=counts)
        rows = model(IDS, packed, torch.tensor(positions))
        assert tokens == [12, 12, 4]
        assert (model(IDS, packed) - whole).abs().max() == 0, "counts alone change nothing"
    assert (rows - whole[positions]).abs().max() <= 1e-12
