"""Contact heads against those of TAPE and fair-esm: predictions, loss, precision, every gradient, in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from esm2mega.batch import LabelledBatch
from esm2mega.config.schema import ModelConfig, ParallelConfig, TaskConfig
from esm2mega.convert.formats import fair_esm
from esm2mega.data.labels.schema import IGNORED, TargetInfo
from esm2mega.finetune.losses import ContactLossReduction
from esm2mega.finetune.metrics import Predictions, metrics_of, objects
from esm2mega.model.build import build_model
from esm2mega.model.heads import head_of_task
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.initialize import process_groups
from tests.parity import references
from tests.parity.references import Shape
from tests.task_batches import one_pack, proteins_of

CPU = torch.device("cpu")
TASK = TaskConfig(kind="contact")
RNG = np.random.default_rng(12)
LENGTHS = (31, 9, 1, 47)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in LENGTHS]
COORDINATES = np.cumsum(RNG.normal(size=(sum(LENGTHS), 3)) * 2.2, axis=0)
COORDINATES[[5, 40, 60, 61]] = np.nan


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


def labelled_pack() -> LabelledBatch:
    return one_pack(proteins_of(SEQUENCES, COORDINATES, per_residue=True, per_pair=True))


def labels_of(row: int) -> Tensor:
    """The whole map of a protein by the definition: 1 below 8 Angstrom, -1 where it does not count."""
    first = sum(LENGTHS[:row])
    coordinates = torch.tensor(COORDINATES[first : first + LENGTHS[row]])
    distances = torch.cdist(coordinates, coordinates, compute_mode="donot_use_mm_for_euclid_dist")
    places = torch.arange(LENGTHS[row])
    counts = ((places[:, None] - places).abs() >= 6) & ~distances.isnan()
    return torch.where(counts, (distances < 8.0).long(), -1)


def upper(values: Tensor) -> Tensor:
    first, second = torch.triu_indices(len(values), len(values), 1)
    return values[first, second]


def close(actual: Tensor, expected: Tensor) -> None:
    """fp64: some thousand additions of numbers of that size."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_product_head_equals_tape() -> None:
    modules = pytest.importorskip("tape.models.modeling_utils", reason="tape-proteins is not installed")
    h = 12
    theirs = modules.PairwiseContactPredictionHead(h, ignore_index=-1).double().eval()
    config = SimpleNamespace(hidden_size=h, params_dtype=torch.float64)
    head = head_of_task(TASK, 1)(config, CPU).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mine, other in zip(head.output.parameters(), theirs.predict[1].parameters(), strict=True):
            mine.copy_(torch.randn(mine.shape, generator=generator, dtype=torch.float64) * 0.4)
            other.copy_(mine)
    batch = labelled_pack()
    states = torch.randn(256, h, generator=generator, dtype=torch.float64, requires_grad=True)
    output = head(states, batch.head_inputs)
    terms = ContactLossReduction().forward(batch, output)
    terms.loss_sum.backward()
    ours = output.detach()[:, 0].sigmoid()
    gradient, states.grad = states.grad, None

    # Theirs: one padded batch, in the order of the pack.
    rows = batch.rows.tolist()
    pieces = states.split(batch.seqlens)[: len(rows)]
    padded = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    targets = torch.full((len(rows), *[padded.shape[1] - 2] * 2), -1)
    for number, row in enumerate(rows):
        targets[number, : LENGTHS[row], : LENGTHS[row]] = labels_of(row)
    lengths = torch.tensor([LENGTHS[row] for row in rows])
    (loss, metrics), prediction = theirs(padded, lengths, targets)
    probabilities = prediction.softmax(-1)[..., 1]
    close(ours, torch.cat([upper(p[:n, :n]) for p, n in zip(probabilities, lengths, strict=True)]))
    # The mean over both orders of each pair is that over one.
    close(terms.loss_sum / terms.count, loss)
    (loss * terms.count).backward()
    close(gradient, states.grad)
    for mine, other in zip(head.output.parameters(), theirs.predict[1].parameters(), strict=True):
        # Those of differences cancel: to rounding in theirs.
        assert (mine.grad - other.grad).abs().max() < 1e-11 * other.grad.abs().max()

    counts = [n * (n - 1) // 2 for n in lengths.tolist()]
    found = Predictions(
        np.arange(len(rows)),
        np.zeros(len(rows), dtype=int),
        objects(x.numpy() for x in ours.split(counts)),
        objects(x.numpy() for x in batch.labels.split(counts)),
    )
    mine = metrics_of(found, TargetInfo("contact", ["contact"]))
    # TAPE takes no more than what counts in these proteins, so that both count the same pairs.
    assert mine["p_at_L5_pooled"] == pytest.approx(
        float(metrics["precision_at_l5"]), abs=1e-6
    )  # theirs is fp32


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_attention_maps_equal_fair_esm(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")
    # fair-esm takes the softmax in fp32 whatever the model's dtype.
    monkeypatch.setattr(
        "esm.multihead_attention.utils_softmax", lambda x, dim, onnx_trace=False: torch.softmax(x, dim)
    )
    shape = replace(Shape(), ffn_hidden_size=4 * Shape().hidden_size)
    reference = references.fair_esm(shape, torch.float64)
    config = ModelConfig(precision="fp64", **vars(shape))
    task = replace(TASK, head="attention_maps")
    (model,) = build_model(config, ParallelConfig(), CPU, 5, head_of_task(task, 1))
    state = dict(reference.state_dict())
    weights = our_names(state, shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[: weights[name].shape[0]] = weights[name]
    model.frozen = mode == "frozen"
    for name, parameter in model.named_parameters():
        parameter.requires_grad = mode == "full" or name.startswith("head.")
    batch = labelled_pack()
    packed = PackedSequences.from_lengths(batch.seqlens)
    output = model(batch.input_ids, packed, batch.head_inputs)
    terms = ContactLossReduction().forward(batch, output)
    terms.loss_sum.backward()
    assert torch.equal(model(batch.input_ids, packed, batch.head_inputs), output)

    expected, total = [], torch.zeros((), dtype=torch.float64)
    for ids, row in zip(batch.input_ids.split(batch.seqlens), batch.rows.tolist(), strict=False):
        contacts = reference(ids[None], return_contacts=True)["contacts"][0]
        expected.append(upper(contacts))
        labels = upper(labels_of(row))
        there = labels != -1
        total = total + binary_cross_entropy(expected[-1][there], labels[there].double(), reduction="sum")
    close(output[:, 0].sigmoid(), torch.cat(expected).detach())
    close(terms.loss_sum.detach(), total.detach())
    total.backward()
    gradients = our_names(
        {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in [*reference.named_parameters(), ("lm_head.weight", reference.lm_head.weight)]
        }
        | {name: value for name, value in state.items() if name.endswith("inv_freq")},
        shape,
    )
    checked = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in gradients and gradients[name].any():
            close(parameter.grad[: gradients[name].shape[0]], gradients[name])
            checked += 1
        elif parameter.grad is not None:
            assert not parameter.grad.any(), name
    # All weights but those behind the last map; or those of the regression.
    assert checked >= (30 if mode == "full" else shape.num_layers + 1)


def our_names(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Encoder and regression of fair-esm under our names."""
    found = references.ours(tensors, fair_esm.NAMES, shape)
    kept = {name: value for name, value in found.items() if name.startswith(("encoder.", "embedding."))}
    weights = tensors["contact_head.regression.weight"].view(shape.num_layers, -1)
    kept |= {f"head.weights.{layer}": weight[None] for layer, weight in enumerate(weights)}
    return kept | {"head.bias": tensors["contact_head.regression.bias"]}


def test_labels_of_pairs_are_those_of_the_definition() -> None:
    batch: Any = labelled_pack()
    expected = torch.cat([upper(labels_of(row)) for row in batch.rows.tolist()])
    assert torch.equal(batch.labels.long(), torch.where(expected == -1, IGNORED, expected))
    assert 20 < int((expected == 1).sum()) < 400
