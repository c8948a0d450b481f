"""Dropout of the encoder: its masks, and models against plain ones whose masks are computed anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esm2mega.model import attention, dropout, layer, proteinbert
from esm2mega.model.dropout import ATTENTION_OUTPUT, EMBEDDING, FIRST_HEAD, MLP_OUTPUT, drop, place_of
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.packed import PackedSequences
from tests.unit.model.dropout_reference import PlainModel, factors
from tests.unit.model.models import loss_and_gradients, random_model

IDS = torch.tensor([0, 5, 32, 2, 0, 6, 8, 0, 32, 9, 4, 2, 1])
LENGTHS = [4, 3, 5, 1]  # the second is a piece without <eos>, the last is padding
KEYS = torch.tensor([7, -(2**63) + 12345, 2**62 + 1, 0])
LABELS = (torch.arange(len(IDS)) * 7 + 4) % 33
HIDDEN, ATTENTION = 0.3, 0.2


def _model(family: str = "esm2", recompute: str = "none", **dropouts: float) -> ESM2Model:
    positions = None if family == "esm2" else 8
    return random_model(family=family, recompute=recompute, max_positions=positions, **dropouts)


def _results(model: ESM2Model, places: Tensor, counts: list[int] | None) -> dict[str, Tensor]:
    packed = PackedSequences.from_lengths(LENGTHS, row_counts=counts).with_dropout_keys(KEYS)
    return loss_and_gradients(model, IDS, packed, LABELS, places)


def _plain_results(model: ESM2Model, places: Tensor, family: str, **dropouts: float) -> dict[str, Tensor]:
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    buffers = {name: b.double() for name, b in model.named_buffers()}
    plain = PlainModel({**buffers, **weights}, family, 3, 3, **dropouts)  # type: ignore[arg-type]
    pieces = zip(IDS.split(LENGTHS), KEYS.tolist(), strict=True)
    logits = torch.cat([plain.logits(ids, key) for ids, key in pieces])
    loss = cross_entropy(logits[places], LABELS[places], reduction="sum")
    loss.backward()
    gradients = {name: w.grad for name, w in weights.items() if w.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("family", ["esm2", "proteinbert_preln", "proteinbert_postln"])
def test_model_equals_a_plain_one_with_the_same_masks(world: None, family: str) -> None:
    """Loss and every gradient, whatever is computed again, at all tokens and at those with labels alone."""
    chosen, counts = torch.tensor([1, 2, 6, 8, 10]), [2, 1, 2, 0]
    for hidden, probabilities in ((HIDDEN, ATTENTION), (HIDDEN, 0.0), (0.0, ATTENTION)):
        ours = {"hidden_dropout": hidden, "attention_dropout": probabilities}
        whole = bool(hidden and probabilities)
        for recompute in ("none", "selective", "full") if whole else ("none",):
            model = _model(family, recompute, **ours)
            expected = _plain_results(model, chosen, family, hidden=hidden, attention=probabilities)
            for rows in (counts, None):
                actual = _results(model, chosen, rows)
                assert actual.keys() == expected.keys() and len(actual) > 40
                for name, value in expected.items():
                    # Up to rounding: sums run in another order.
                    bound = 1e-12 * max(1.0, value.abs().max().item())
                    assert (actual[name] - value).abs().max() <= bound, (name, recompute, rows)


def test_evaluation_drops_nothing_and_training_needs_keys(world: None) -> None:
    model = _model(hidden_dropout=HIDDEN, attention_dropout=ATTENTION)
    without = _model()
    packed = PackedSequences.from_lengths(LENGTHS)
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS, packed.with_dropout_keys(KEYS)), without.eval()(IDS, packed))
        with pytest.raises(ValueError, match=r"give it PackedSequences\.with_dropout_keys"):
            model.train()(IDS, packed)


def test_a_model_without_dropout_does_no_work_for_it(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("dropout was computed")

    packed = PackedSequences.from_lengths(LENGTHS)
    for module, name in ((layer, "dropped"), (proteinbert, "dropped"), (attention, "sdpa_with_dropout")):
        monkeypatch.setattr(module, name, forbidden)
    for family in ("esm2", "proteinbert_preln", "proteinbert_postln"):
        _model(family)(IDS, packed).sum().backward()
        for key in ("hidden_dropout", "attention_dropout"):
            with pytest.raises(AssertionError, match="dropout was computed"):
                _model(family, **{key: 0.1})(IDS, packed.with_dropout_keys(KEYS))


def test_masks_are_those_of_the_formula() -> None:
    """For a row of a layer and of a head, with a count that four does not divide, up to the largest p."""
    packed = PackedSequences.from_lengths([3, 2]).with_dropout_keys(torch.tensor([5, -6]))
    keys = packed.query_keys
    assert keys is not None
    for p in (1e-9, 0.1, 0.5, 0.99):
        places = torch.tensor([place_of(2, FIRST_HEAD), place_of(2, FIRST_HEAD + 1)])
        heads = drop(torch.ones(2, 5, 9, dtype=torch.float64), p, keys, places[:, None])
        outputs = drop(torch.ones(5, 9, dtype=torch.float64), p, keys, place_of(3, MLP_OUTPUT))
        for row, (piece, position) in enumerate([(5, 0), (5, 1), (5, 2), (-6, 0), (-6, 1)]):
            for head in (0, 1):
                assert heads[head, row].tolist() == factors(piece, position, 2, 3 + head, 9, p)
            assert outputs[row].tolist() == factors(piece, position, 3, 2, 9, p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_have_the_rate_and_are_independent(p: float) -> None:
    """Between pieces (samples, and so steps), positions, layers, places, heads, and channels of a row."""
    count = 1 << 15
    pieces = torch.tensor([1, 2, -1])
    tokens = [dropout.token_keys(pieces, torch.full((3,), position)) for position in (0, 1)]
    places = [
        place_of(number, place)
        for number in (0, 1, 2)
        for place in (EMBEDDING, ATTENTION_OUTPUT, MLP_OUTPUT, FIRST_HEAD, FIRST_HEAD + 1)
    ]
    ones = torch.ones(3, count, dtype=torch.float64)
    scaled = torch.cat([drop(ones, p, keys, place) for keys in tokens for place in places])
    kept = (scaled != 0).double()
    assert kept.shape == (2 * len(places) * 3, count)
    # Five standard deviations of each, also of the largest of some 4,000 products.
    error = 5.5 * (p * (1 - p) / count) ** 0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < error
    assert (scaled.mean() - 1).abs() < 5 * error / (1 - p) / len(kept) ** 0.5
    normed = (kept - (1 - p)) / (p * (1 - p)) ** 0.5
    products = normed @ normed.T / count
    assert (products - products.diagonal().diag()).abs().max() < 5.5 / count**0.5
    for shift in (1, 2, 3, 4, 5):
        neighbours = (normed[:, shift:] * normed[:, :-shift]).mean()
        assert abs(neighbours) < 5 / normed[:, shift:].numel() ** 0.5, shift
    assert len(torch.unique(kept[:, :64], dim=0)) == len(kept)


def test_attention_masks_are_independent_in_both_directions() -> None:
    """A query drops no other query's keys, a head no other head's, and (i, j) says nothing of (j, i)."""
    packed = PackedSequences.from_lengths([256]).with_dropout_keys(torch.tensor([99]))
    keys = packed.query_keys
    assert keys is not None
    places = place_of(1, FIRST_HEAD) + torch.arange(4)
    kept = (drop(torch.ones(4, 256, 256), 0.25, keys, places[:, None]) != 0).double()
    normed = (kept - 0.75) / (0.25 * 0.75) ** 0.5
    bound = 5 / 256  # five standard deviations of 256 * 256 products
    assert (normed * normed.transpose(1, 2)).triu(1).sum((1, 2)).abs().max() / (256 * 255 / 2) < 1.5 * bound
    for other in (normed.roll(1, 0), normed.roll(1, 1), normed.roll(1, 2)):
        assert (normed * other).mean((1, 2)).abs().max() < bound
