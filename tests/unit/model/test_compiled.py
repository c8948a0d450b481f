"""Compiled layers, against the same layers as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from esm2mega.model import compiled
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.packed import PackedSequences
from tests.unit.model.models import loss_and_gradients, random_model

CPU = torch.device("cpu")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced and differentiated as for a compiler, and run without one."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield from _fresh()


def _fresh() -> Iterator[None]:
    def forget() -> None:
        torch._dynamo.reset()
        counters.clear()
        compiled._functions.cache_clear()
        compiled.can_compile.cache_clear()

    forget()
    yield
    forget()


def _pack(number: int) -> tuple[torch.Tensor, PackedSequences, torch.Tensor, torch.Tensor]:
    """A pack of other lengths, and of another length in sum, for each number."""
    lengths = [3 + number % 4, 2 + number, 5]
    ids = torch.arange(sum(lengths)) * (number + 1) % 20 + 4
    places = torch.arange(number % 3, sum(lengths), 3)
    borders = torch.tensor(lengths).cumsum(0)
    counts = torch.bincount(torch.bucketize(places, borders, right=True), minlength=3).tolist()
    return ids, PackedSequences.from_lengths(lengths, row_counts=counts), (ids * 7) % 33, places


def _assert_same(model: ESM2Model, plain: ESM2Model, number: int, bound: float) -> None:
    actual, expected = (loss_and_gradients(one, *_pack(number)) for one in (model, plain))
    assert actual.keys() == expected.keys()
    assert len(actual) == 1 + len(list(plain.parameters()))
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= bound * max(1.0, value.abs().max().item()), name


def test_twenty_packs_need_two_graphs(world: None, traced: None) -> None:
    model, plain = random_model(compile=True), random_model()
    assert model.config.compiled_layers
    graphs = counters["stats"]["unique_graphs"]
    for number in range(20):
        _assert_same(model, plain, number, 1e-12)
    assert counters["stats"]["unique_graphs"] == graphs + 2
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["model.recompute=full", "model.activation=gelu_tanh"])
def test_what_else_layers_may_have(world: None, traced: None, change: str) -> None:
    key, _, value = change.removeprefix("model.").partition("=")
    _assert_same(random_model(compile=True, **{key: value}), random_model(**{key: value}), 1, 1e-12)
    assert counters["stats"]["unique_graphs"] > 1


def test_a_layer_with_another_linear_is_not_compiled(world: None, traced: None) -> None:
    """Whoever puts adapters beside linears, or others in their place, gets what these compute."""
    model = random_model(compile=True)
    first, second, third = model.encoder.layers
    calls = []
    first.mlp.linear_fc1.register_forward_hook(lambda module, inputs, output: calls.append(module))
    second.self_attention.linear_proj = torch.nn.Sequential(second.self_attention.linear_proj)
    assert [compiled.is_plain(layer) for layer in (first, second, third)] == [False, False, True]
    del model.encoder.layers[1:]
    model(*_pack(1)[:2])
    assert calls == [first.mlp.linear_fc1]


def test_without_a_compiler_layers_run_as_they_are(
    world: None, traced: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*args: object, **settings: object) -> None:
        raise RuntimeError("no g++\nand a long text")

    monkeypatch.setattr(torch, "compile", none)
    model = random_model(compile=True)
    assert not model.config.compiled_layers
    said = capsys.readouterr().err
    assert said == "esm2mega: model.compile has no compiler here, so layers run as they are (no g++)\n"
    _assert_same(model, random_model(), 1, 0.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")
def test_a_compiler_computes_the_same(world: None) -> None:
    for _ in _fresh():
        model, plain = random_model(compile=True), random_model()
        assert model.config.compiled_layers
        graphs = counters["stats"]["unique_graphs"]
        for number in range(20):
            # erf of the compiled GELU is another approximation than PyTorch's own.
            _assert_same(model, plain, number, 1e-10)
        assert counters["stats"]["unique_graphs"] == graphs + 2
        assert not counters["graph_break"]
