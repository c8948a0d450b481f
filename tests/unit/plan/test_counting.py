"""The counter sees storages once, from their making to their end, and counts what PyTorch does."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode

from esm2mega.plan.counting import Cost, StepCounter


def test_views_count_once_and_what_is_gone_not_at_all() -> None:
    given = torch.zeros(1000)
    counter = StepCounter([given])
    with counter:
        doubled = given * 2
        halves = doubled.view(2, 500).unbind()
        assert counter.live == 4000
        other = given + 1
        assert (counter.live, counter.peak) == (8000, 8000)
        del other
        given.add_(1)
    del doubled
    assert counter.live == 4000
    del halves
    assert (counter.live, counter.peak) == (0, 8000)


def test_products_count_their_operations_and_the_rest_its_bytes() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    counter = StepCounter([a, b])
    with counter:
        c = a @ b
        c.add_(1.0)
    assert counter.flops == 2 * 3 * 5 * 7
    assert counter.moved == 2 * 3 * 7 * 4


def test_questions_and_empty_tensors_move_nothing() -> None:
    with FakeTensorMode(), StepCounter() as counter:
        a = torch.empty(3, 5)
        b, c = a.new_empty(7), torch.empty_like(a)
        assert {x.device.type for x in (a, b, c)} == {"cpu"}
    assert counter.moved == 0
    assert counter.peak == 4 * (15 + 7 + 15)


def test_a_cost_grows_with_every_further_layer() -> None:
    two, three = Cost(10, 8, 100, 50, 4, 1), Cost(13, 11, 140, 60, 6, 2)
    assert two.extended(three, 3) == Cost(19, 17, 220, 80, 10, 4)
