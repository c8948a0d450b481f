"""What one half of the heads sends is on its way while the other half attends, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from esm2mega.model.context_parallel import HeadExchange, KeyExchange
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel import context_collectives


class _Attend(torch.autograd.Function):
    """Returns q + 2 k + 3 v, and notes when it does, and when gradients come back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("attend")
        return q + 2 * k + 3 * v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.events.append("attend")
        return gradients[0], 2 * gradients[0], 3 * gradients[0], None


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order; a group of one rank, whose messages arrive when they are waited for."""
    happened: list[str] = []

    class Work:
        def __init__(self, received: Tensor, sent: Tensor) -> None:
            self._received, self._sent = received, sent.clone()

        def wait(self) -> None:
            happened.append("wait")
            self._received.copy_(self._sent)

    def all_to_all(received: Tensor, sent: Tensor, *_: Any, group: Any, async_op: bool) -> Work:
        assert async_op and group == "context"
        happened.append("send")
        return Work(received.fill_(float("nan")), sent)

    monkeypatch.setattr(context_collectives.dist, "all_to_all_single", all_to_all)
    monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda: "context")
    return happened


# Heads send the results back too, so the backward pass looks the same.
BY_HEADS = "send send wait attend send wait attend send wait wait"
BY_KEYS, BY_KEYS_BACKWARD = "send send wait attend wait attend", "attend send attend send wait wait"


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("exchange", ["heads", "keys"])
def test_one_half_computes_while_the_other_travels(events: list[str], heads: int, exchange: str) -> None:
    tokens = 7
    packed = PackedSequences.from_lengths([tokens])
    by_heads = HeadExchange(packed, size=1, rank=0)
    by_keys = KeyExchange(packed, given=(slice(0, tokens),), taken=(tokens,))
    q, k, v = (torch.randn(tokens, heads, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    first_heads: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, first_head: int) -> Tensor:
        first_heads.append(first_head)
        return _Attend.apply(q, k, v, events)

    chosen = by_heads if exchange == "heads" else by_keys
    context = chosen.attend(q, k, v, 20, kernel)
    assert torch.equal(context, q + 2 * k + 3 * v)
    assert first_heads == ([20] if heads == 1 else [20, 20 + heads // 2])
    if heads > 1:
        assert events == (BY_HEADS if exchange == "heads" else BY_KEYS).split()
    events.clear()
    gradient = torch.randn_like(context)
    context.backward(gradient)
    assert all(torch.equal(x.grad, times * gradient) for times, x in enumerate((q, k, v), start=1))
    if heads > 1:
        assert events == (BY_HEADS if exchange == "heads" else BY_KEYS_BACKWARD).split()
