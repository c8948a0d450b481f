"""Rows beside hidden states: what comes out is what went in, bit for bit, in both directions."""

from __future__ import annotations

import pytest
import torch

from esm2mega.model import pipeline_payload


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 40, 41])
def test_states_values_and_their_gradients_come_through(dtype: torch.dtype, count: int) -> None:
    hidden_size, tokens = 8, 5
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        # Halves of a wider number as bf16: not-a-number, infinities and negative zeros among them.
        wide = torch.randint(-(2**62), 2**62, shape, generator=generator)
        return torch.frexp(wide.double()).mantissa * 2.0 ** (wide % 60 - 30)

    states = random(tokens, 1, hidden_size).to(dtype).requires_grad_()
    values = random(count).to(pipeline_payload.carried_dtype(dtype)).requires_grad_()
    rows = pipeline_payload.carried_rows(count, hidden_size, dtype) + 2
    assert (pipeline_payload.carried_rows(count, hidden_size, dtype) == 0) == (count == 0)
    sent = pipeline_payload.append(states, values, rows)
    assert sent.shape == (tokens + rows, 1, hidden_size) and sent.dtype == dtype
    received = sent.detach().clone().requires_grad_()
    found_states, found = pipeline_payload.split(received, count, rows)
    assert torch.equal(found_states, states) and torch.equal(found, values)

    gradients = random(tokens, 1, hidden_size).to(dtype), random(count).to(values.dtype)
    torch.autograd.backward((found_states, found), gradients)
    assert received.grad is not None
    sent.backward(received.grad.clone())
    for given, arrived in zip(gradients, (states.grad, values.grad), strict=True):
        assert arrived is not None and torch.equal(given, arrived)
