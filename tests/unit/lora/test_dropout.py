"""Dropout of adapters: its masks, and a model against a plain one whose masks are computed anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esm2mega.config.schema import LoRAConfig
from esm2mega.lora.dropout import LINEARS_OF_LAYER, InputDropout
from esm2mega.lora.inject import apply_lora, is_adapter
from esm2mega.model import dropout
from esm2mega.model.dropout import FIRST_ADAPTER, MLP_OUTPUT, drop, place_of
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.packed import PackedSequences
from tests.unit.model.dropout_reference import PlainModel, factors
from tests.unit.model.models import loss_and_gradients, random_model

IDS = torch.tensor([0, 5, 32, 2, 0, 6, 8, 0, 32, 9, 4, 2, 1])
LENGTHS = [4, 3, 5, 1]  # the second is a piece without <eos>, the last is padding
KEYS = torch.tensor([7, -(2**63) + 12345, 2**62 + 1, 0])
LABELS = (torch.arange(len(IDS)) * 7 + 4) % 33
HEADS, HIDDEN, P = 3, 0.3, 0.4
# By the documentation: the places of adapters begin in the middle of those of a layer.
FIRST = 2**19
LORA = LoRAConfig(
    rank=2,
    alpha=3.0,
    dropout=P,
    target_modules=["linear_q", "linear_v", "linear_proj", "*.[12].*.linear_fc?", "lm_head.dense"],
)


@dataclass
class AdaptedModel(PlainModel):
    """The plain model with adapters beside its linears.

    Attributes:
        piece: Key of the piece that is computed.
    """

    piece: int = field(default=0, init=False)

    def logits(self, ids: Tensor, piece: int) -> Tensor:
        self.piece = piece
        return super().logits(ids, piece)

    def _linear(self, y: Tensor, name: str) -> Tensor:
        output = super()._linear(y, name)
        stem, _, linear = name.rpartition(".")
        layer = 0 if stem == "lm_head" else int(stem.split(".")[2]) + 1
        place = FIRST + (0 if layer == 0 else LINEARS_OF_LAYER.index(linear))
        rows = [factors(self.piece, position, layer, place, y.shape[1], P) for position in range(len(y))]
        x = y * torch.tensor(rows, dtype=torch.float64)
        if linear != "linear_qkv":
            return output + self._delta(x, name)
        parts = [self._delta(x, f"{stem}.linear_{part}") for part in "qkv"]
        deltas = [part.expand_as(y).unflatten(1, (self.heads, -1)) for part in parts]
        return output + torch.stack(deltas, dim=2).flatten(1)

    def _delta(self, x: Tensor, name: str) -> Tensor:
        if f"{name}_lora.lora_A" not in self.weights:
            return torch.zeros((), dtype=torch.float64)
        a, b = (self.weights[f"{name}_lora.lora_{factor}"] for factor in "AB")
        return LORA.scaling * x @ a.T @ b.T


def _adapted(family: str = "esm2", recompute: str = "none", lora: LoRAConfig = LORA) -> ESM2Model:
    positions = None if family == "esm2" else 8
    model = random_model(family=family, recompute=recompute, max_positions=positions, hidden_dropout=HIDDEN)
    apply_lora([model], lora, seed=3)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def _packed(counts: list[int] | None = None) -> PackedSequences:
    return PackedSequences.from_lengths(LENGTHS, row_counts=counts).with_dropout_keys(KEYS)


@pytest.mark.parametrize("family", ["esm2", "proteinbert_postln"])
def test_model_equals_a_plain_one_with_the_same_masks(world: None, family: str) -> None:
    """Loss and the gradients of all factors, at all tokens and at those with labels, computed again or not.

    Of some linears, that of the head among them, and below the dropout of the encoder.
    """
    chosen, counts = torch.tensor([1, 2, 6, 8, 10]), [2, 1, 2, 0]
    for recompute in ("none", "full"):
        model = _adapted(family, recompute)
        weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        buffers = {name: b.double() for name, b in model.named_buffers()}
        plain = AdaptedModel({**buffers, **weights}, family, 3, HEADS, hidden=HIDDEN, attention=0.0)
        pieces = zip(IDS.split(LENGTHS), KEYS.tolist(), strict=True)
        logits = torch.cat([plain.logits(ids, key) for ids, key in pieces])
        loss = cross_entropy(logits[chosen], LABELS[chosen], reduction="sum")
        loss.backward()
        expected = {name: w.grad for name, w in weights.items() if is_adapter(name)} | {"loss": loss.detach()}
        for rows in (counts, None):
            actual = loss_and_gradients(model, IDS, _packed(rows), LABELS, chosen)
            assert actual.keys() == expected.keys() and len(actual) == 1 + 2 * (3 * 3 + 2 * 2 + 1)
            for name, value in expected.items():
                assert value is not None and value.abs().max() > 1e-3, name
                # Up to rounding: sums run in another order.
                bound = 1e-12 * max(1.0, value.abs().max().item())
                assert (actual[name] - value).abs().max() <= bound, (name, recompute, rows)


def test_a_layer_that_is_computed_again_has_the_keys_of_its_micro_batch(world: None) -> None:
    """As under 1F1B: a second micro-batch goes forward before the first one comes back."""
    seen = []
    for others in (False, True):
        model = _adapted(recompute="full")
        first = model(IDS, _packed()).square().sum()
        if others:
            model(IDS, PackedSequences.from_lengths([13]).with_dropout_keys(KEYS[:1] + 1))
        first.backward()
        seen.append({name: p.grad for name, p in model.named_parameters() if is_adapter(name)})
    assert all(torch.equal(seen[0][name], value) for name, value in seen[1].items())


def test_evaluation_drops_nothing_and_training_needs_keys(world: None) -> None:
    model, without = _adapted(), _adapted(lora=LoRAConfig(**{**vars(LORA), "dropout": 0.0}))
    packed = PackedSequences.from_lengths(LENGTHS)
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS, _packed()), without.eval()(IDS, packed))
        assert torch.equal(model(IDS, packed), without(IDS, packed))
        with pytest.raises(ValueError, match=r"give it PackedSequences\.with_dropout_keys"):
            model.train()(IDS, packed)


def test_adapters_without_dropout_do_no_work_for_it(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("dropout was computed")

    monkeypatch.setattr("esm2mega.lora.dropout.drop", forbidden)
    model = random_model()
    apply_lora([model], LoRAConfig(rank=2), seed=3)
    model(IDS, PackedSequences.from_lengths(LENGTHS)).sum().backward()
    with pytest.raises(AssertionError, match="dropout was computed"):
        _adapted()(IDS, _packed())


def test_a_rank_drops_its_channels_as_one_process_does() -> None:
    """Four channels share a hash; the channels of a rank may begin and end within one."""
    keys, place = dropout.token_keys(KEYS, torch.arange(4)), place_of(2, FIRST_ADAPTER + 1)
    values = torch.rand(4, 1, 30, dtype=torch.float64) + 1
    whole = drop(values, 0.3, keys[:, None], place)
    for size in (1, 2, 3, 5, 6, 10):
        for rank, part in enumerate(values.chunk(size, dim=-1)):
            input_dropout = InputDropout(0.3, place, _Group(rank))
            input_dropout.keys = keys
            assert torch.equal(input_dropout(part), whole.chunk(size, dim=-1)[rank]), (size, rank)


@dataclass(frozen=True)
class _Group:
    """Stands for a tensor-parallel group."""

    number: int

    def rank(self) -> int:
        return self.number


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_inputs_have_the_rate_the_mean_and_masks_of_their_own(p: float) -> None:
    """Between linears, layers and tokens, and beside the dropout of the encoder."""
    count = 1 << 15
    keys = dropout.token_keys(torch.tensor([1, 2, -1]), torch.tensor([0, 1, 5]))
    places = [place_of(layer, FIRST_ADAPTER + n) for layer in (1, 2) for n in range(len(LINEARS_OF_LAYER))]
    places += [place_of(0, FIRST_ADAPTER), place_of(1, MLP_OUTPUT), place_of(2, MLP_OUTPUT)]
    ones = torch.ones(3, 1, count, dtype=torch.float64)
    scaled = []
    for place in places:
        input_dropout = InputDropout(p, place)
        input_dropout.keys = keys
        scaled.append(input_dropout(ones)[:, 0])
    values = torch.cat(scaled)
    # Five standard deviations of the share of a row, and of the mean of all rows.
    error = 5 * (p * (1 - p) / count) ** 0.5
    assert ((values == 0).double().mean(1) - p).abs().max() < error
    assert (values.mean() - 1).abs() < error / (1 - p) / len(values) ** 0.5
    normed = ((values != 0).double() - (1 - p)) / (p * (1 - p)) ** 0.5
    products = normed @ normed.T / count
    assert (products - products.diagonal().diag()).abs().max() < 5.5 / count**0.5
    assert len(torch.unique(values[:, :64], dim=0)) == len(values)
