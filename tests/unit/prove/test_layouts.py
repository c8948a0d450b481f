"""Layouts: names, options and settings of the same thing; random ones; the way to simpler ones."""

from __future__ import annotations

import pytest

from esm2mega.config.load import load_run
from esm2mega.errors import UserError
from esm2mega.prove.layouts import (
    Layout,
    is_possible,
    layout_from_options,
    random_layouts,
)
from esm2mega.prove.training import SETTINGS

FULL = Layout(
    tp=2, pp=2, vpp=2, dp=2, sp=True, packed=3, distributed_optimizer=True, recompute="full", layers=8
)


def test_name_says_everything_that_is_not_default() -> None:
    assert str(Layout()) == "1 process"
    assert str(Layout(packed=12)) == "1 process, 12 per pack"
    assert str(FULL) == "TP2 PP2 VPP2 DP2 SP DO, 3 per pack, recompute full, 8 layers"


def test_settings_are_keys_of_the_configuration() -> None:
    run = load_run(None, [*SETTINGS, *FULL.settings()])
    parallel = run.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (2, 2)
    assert (parallel.virtual_pipeline_model_parallel_size, parallel.sequence_parallel) == (2, True)
    assert (parallel.distributed_optimizer, run.model.recompute, run.model.num_layers) == (True, "full", 8)
    assert (run.train.micro_batch_tokens, run.train.global_batch_tokens) == (3 * 64, 12 * 64)
    plain = load_run(None, [*SETTINGS, *Layout().settings()])
    assert plain.parallel.virtual_pipeline_model_parallel_size is None


def _parsed(words: list[str]) -> Layout:
    """The layout that the command line makes of options."""
    from esm2mega.cli.app import cli

    command = cli.commands["prove"]
    options = command.make_context("prove", list(words)).params
    others = ("layouts", "seed", "processes", "out", "precision")
    chosen = {name: value for name, value in options.items() if value and name not in others}
    return layout_from_options(chosen, SETTINGS)


def test_options_are_read_back_by_the_command_line() -> None:
    possible = Layout(tp=2, dp=2, sp=True, packed=3, distributed_optimizer=True, recompute="full", layers=4)
    for layout in (possible, Layout(), Layout(pp=3, vpp=2, layers=6), *random_layouts(30, 5, 8, SETTINGS)):
        assert _parsed(layout.options()) == layout


def test_defaults_of_the_command_line() -> None:
    # A depth that the pieces divide, and a number of proteins that the schedule allows.
    assert _parsed(["--pp", "2", "--vpp", "3"]) == Layout(pp=2, vpp=3, layers=6)
    assert _parsed(["--packed"]) == Layout(packed=2)
    assert _parsed(["--dp", "4", "--packed"]) == Layout(dp=4, packed=3)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"tp": 3}, "ffn_hidden_size=88 is not divisible"),
        ({"sp": True}, "needs parallel.tensor_model_parallel_size > 1"),
        ({"pp": 2, "vpp": 2, "layers": 5}, "model.num_layers=5 is not divisible"),
        ({"pp": 8}, "model.num_layers=5 is smaller than parallel.pipeline_model_parallel_size=8"),
        ({"dp": 5}, "is not a multiple of train.micro_batch_tokens"),
    ],
)
def test_impossible_layouts_are_refused(chosen: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout_from_options(chosen, SETTINGS)


def test_random_layouts_are_the_same_for_a_seed_and_reach_every_axis() -> None:
    drawn = random_layouts(60, 1, 4, SETTINGS)
    assert drawn == random_layouts(60, 1, 4, SETTINGS)
    assert drawn[:20] != random_layouts(20, 2, 4, SETTINGS)
    assert len(set(drawn)) == 60
    assert all(layout.processes <= 4 and is_possible(layout, SETTINGS) for layout in drawn)
    for axis, values in {
        "tp": {1, 2, 4},
        "pp": {1, 2, 3, 4},
        "dp": {1, 2, 3, 4},
        "cp": {1, 2, 3, 4},
        "exchange": {"auto", "heads", "needed", "gather"},
        "sp": {False, True},
        "packed": {1, 2, 3, 4, 6, 12},
        "distributed_optimizer": {False, True},
        "recompute": {"none", "selective", "full"},
    }.items():
        assert {getattr(layout, axis) for layout in drawn} == values, axis
    assert {layout.vpp for layout in drawn} >= {1, 2}


def test_more_random_layouts_than_there_are() -> None:
    with pytest.raises(UserError, match="ask for fewer"):
        random_layouts(120, 1, 1, SETTINGS)


def _size(layout: Layout) -> tuple[int, ...]:
    flags = layout.sp + layout.distributed_optimizer + (layout.recompute != "none")
    return (layout.tp + layout.pp + layout.vpp + layout.dp, flags, layout.packed)


def test_simpler_layouts_come_nearer_to_the_reference() -> None:
    assert list(Layout().simpler()) == []
    simpler = list(FULL.simpler())
    assert len(set(simpler)) == len(simpler)
    assert Layout(**{**vars(FULL), "sp": False}) in simpler
    assert Layout(**{**vars(FULL), "packed": 2}) in simpler
    for layout in simpler:
        assert layout != FULL
        assert all(now <= before for now, before in zip(_size(layout), _size(FULL), strict=True))
