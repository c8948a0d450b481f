"""One optimizer step: what it returns, and that numbers which are none change no weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esm2mega.batch import PackedBatch
from esm2mega.config.schema import DataConfig
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.loader import TrainStream
from esm2mega.data.stream.step_batches import StepBatches
from esm2mega.parallel.initialize import process_groups
from esm2mega.train.losses import LossReduction, LossTerms, MLMLossReduction
from esm2mega.train.step import TrainState, dropout_keys, run_schedule, train_step
from tests.unit.runs import packed_batch, tiny_run, train_state

BATCHES = [packed_batch([[0, 5, 32, 7, 32, 2]], {1: 5, 2: 9, 3: 4, 4: 23})]


class Constant(LossReduction):
    """A loss of a chosen value with a chosen gradient."""

    def __init__(self, value: float, slope: float) -> None:
        self.value, self.slope = value, slope

    def forward(self, batch: PackedBatch, output: Tensor) -> LossTerms:
        copied = output.clone()
        copied.register_hook(lambda gradient: torch.full_like(gradient, self.slope))
        return LossTerms((0 * copied).sum() + self.value, torch.tensor(1))


class NanFor(MLMLossReduction):
    """Masked language modelling, of which packs with one label are not finite."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, batch: PackedBatch, output: Tensor) -> LossTerms:
        terms = super().forward(batch, output)
        return LossTerms(terms.loss_sum * (math.nan if self.token in batch.labels else 1.0), terms.count)


def parts_of(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _weights(state: TrainState) -> list[Tensor]:
    return [p.detach().clone() for p in state.model[0].module.parameters()]


def test_step_learns(world: None) -> None:
    state = train_state(tiny_run("optim.lr=1e-2"))
    results = [train_step(state, BATCHES) for _ in range(15)]
    assert results[0].metrics["loss"] == pytest.approx(math.log(33), abs=0.3)
    assert results[-1].metrics["loss"] < 0.5 * results[0].metrics["loss"]
    assert results[0].metrics["count"] == 4
    assert results[0].lr == 1e-2


def test_a_micro_batch_is_taken_when_the_one_before_has_run(world: None) -> None:
    """So that a step begins while its later micro-batches are built."""
    state, order = train_state(tiny_run()), []
    state.model[0].module.register_forward_hook(lambda *arguments: order.append("forward"))

    def source() -> Iterator[PackedBatch]:
        while True:
            order.append("taken")
            yield BATCHES[0]

    lazily = train_step(state, StepBatches(source(), 3))
    assert order == ["taken", "forward"] * 3
    assert lazily == train_step(train_state(tiny_run()), BATCHES * 3)


def test_gradients_of_the_last_step_are_forgotten(world: None) -> None:
    state = train_state(tiny_run("optim.lr=1e-300"))
    first, second = (train_step(state, BATCHES).grad_norm for _ in range(2))
    assert first == pytest.approx(second, rel=1e-12)


def test_rate_is_the_one_that_the_update_used(world: None) -> None:
    state = train_state(tiny_run("schedule.warmup_steps=2", "train.max_steps=10"))
    before = _weights(state)
    assert train_step(state, BATCHES).lr == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(state), strict=True))
    assert train_step(state, BATCHES).lr == 1e-3
    assert not torch.equal(before[0], _weights(state)[0])


def test_a_step_without_labels_has_no_loss_and_no_gradient(world: None) -> None:
    state = train_state(tiny_run())
    result = train_step(state, [packed_batch([[0, 5, 7, 2]], {})])
    assert (result.metrics, result.grad_norm) == ({"loss": None, "count": 0.0}, 0.0)


def _everything(state: TrainState) -> list[Tensor]:
    """Weights, moments and step counts of the optimizer."""
    moments = [x for part in parts_of(state.optimizer) for x in part.optimizer.state.values()]
    return [*_weights(state), *(torch.as_tensor(x).clone() for values in moments for x in values.values())]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("model.precision=fp32",),
        ("model.precision=bf16",),
        ("parallel.distributed_optimizer=true", "model.precision=fp32"),
        ("parallel.distributed_optimizer=true", "model.precision=bf16"),
        ("optim.clip_grad=0",),
    ],
)
@pytest.mark.parametrize(("value", "slope"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_schedule(
    settings: tuple[str, ...], value: float, slope: float
) -> None:
    run = tiny_run(*settings)
    with process_groups(run.parallel, run.seed):
        _check_that_nothing_changes(train_state(run), value, slope)


def _check_that_nothing_changes(state: TrainState, value: float, slope: float) -> None:
    mlm = state.loss
    train_step(state, BATCHES)
    before, steps = _everything(state), state.schedule.num_steps
    state.loss = Constant(value, slope)
    result = train_step(state, BATCHES)
    assert not result.is_finite
    assert result.suspects == ((0,) if value != 1.0 else ())
    after = _everything(state)
    assert len(before) == len(after) > 3 * 10
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert state.schedule.num_steps == steps + 1
    state.loss = mlm
    assert train_step(state, BATCHES).is_finite, "nothing of the bad gradient is left"
    assert not torch.equal(before[1], _everything(state)[1])


def test_only_the_losses_that_are_not_finite_are_suspects(world: None) -> None:
    state = train_state(tiny_run())
    state.loss = NanFor(9)
    batches = [BATCHES[0], packed_batch([[0, 5, 32, 2]], {1: 5}), BATCHES[0]]
    assert train_step(state, batches).suspects == (0, 2)


@pytest.mark.parametrize("clip_grad", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_the_update_is_that_of_megatron(world: None, clip_grad: float, precision: str) -> None:
    """Bit for bit, though the parts of its step are called one by one."""
    run = tiny_run(f"optim.clip_grad={clip_grad}", f"model.precision={precision}")
    ours, theirs = train_state(run), train_state(run)
    for _ in range(3):
        train_step(ours, BATCHES)
        theirs.model[0].zero_grad_buffer()
        theirs.optimizer.zero_grad()
        run_schedule(theirs.model, theirs.loss, BATCHES, theirs.device, forward_only=False)
        theirs.optimizer.step()
        theirs.schedule.step(increment=1)
    assert all(torch.equal(a, b) for a, b in zip(_everything(ours), _everything(theirs), strict=True))


def test_dropout_follows_from_seed_and_sample(world: None) -> None:
    """The same in every repetition, another one for another sample, piece or seed, and none in evaluation."""
    state = train_state(tiny_run("model.hidden_dropout=0.5", "model.attention_dropout=0.5"))
    pack = replace(packed_batch([[0, 5, 32, 7, 32, 2]], {2: 9, 4: 23}), starts=[0])

    def loss(sample: int, first: int, seed: int) -> float:
        batch = replace(pack, samples=[(sample, first)])
        (report,) = run_schedule(
            state.model, state.loss, [batch], state.device, forward_only=True, dropout_seed=seed
        )
        return float(report["loss"][0])

    drawn = [loss(*numbers) for numbers in ((3, 0, 1), (4, 0, 1), (3, 1, 1), (3, 0, 2))]
    assert len(set(drawn)) == 4 and loss(3, 0, 1) == drawn[0]
    state.model[0].eval()
    assert loss(3, 0, 1) == loss(4, 0, 2)


def test_keys_of_dropout_do_not_depend_on_packs_processes_or_a_resume(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        for number in range(40):
            writer.append([f"p{number}"], [b"ACDEFGHIKL" * (1 + number % 5)])
    store = TokenStore(tmp_path / "store")
    data = DataConfig(max_seq_length=24, crop="chunk", pack_window=20)

    def keys(batches: list[PackedBatch], seed: int = 1) -> dict[tuple[int, int], int]:
        """Key of each piece, found by where its tokens lie; padding has none."""
        found = {}
        for batch in batches:
            of_segments = dropout_keys(seed, batch).tolist()
            pieces = dict(zip(batch.starts, batch.samples, strict=True))
            position = 0
            for length, key in zip(batch.seqlens, of_segments, strict=True):
                is_padding = bool((batch.input_ids[position : position + length] == 1).all())
                assert is_padding == (position not in pieces) == (key == 0)
                if not is_padding:
                    found[pieces[position]] = key
                position += length
        return found

    def taken(tokens: int, count: int, dp_size: int = 1, packing: str = "pack") -> list[PackedBatch]:
        spec = BatchSpec(replace(data, packing=packing), micro_batch_tokens=tokens, seed=1)
        batches = []
        for rank in range(dp_size):
            with TrainStream([store], spec, rank, dp_size) as stream:
                batches += list(itertools.islice(stream, count))
        return batches

    reference = keys(taken(24, 200))
    assert len(reference) == len(set(reference.values())) > 100
    assert len({sample for sample, _ in reference}) > 60 and any(first for _, first in reference)
    for other in (taken(96, 30), taken(48, 30, dp_size=3), taken(72, 30, packing="bucket")):
        found = keys(other)
        common = found.keys() & reference.keys()
        assert len(common) > 80 and all(found[piece] == reference[piece] for piece in common)
    seeds = keys(taken(24, 200), seed=2)
    assert not {*seeds.values()} & {*reference.values()}
    with TrainStream([store], BatchSpec(data, micro_batch_tokens=48, seed=1)) as stream:
        unbroken = list(itertools.islice(stream, 3))
        state = stream.state_dict()
        unbroken = list(itertools.islice(stream, 5))
    with TrainStream([store], BatchSpec(data, micro_batch_tokens=48, seed=1)) as resumed:
        resumed.load_state_dict(state)
        assert keys(list(itertools.islice(resumed, 5))) == keys(unbroken)
