"""Batches in tokens and in proteins: the arithmetic, one way at a time, and what a resume keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm2mega.config.batches import data_parallel_size, num_micro_batches, resolve_batches
from esm2mega.config.load import load_run, load_run_over, run_from_yaml
from esm2mega.config.resolved import save_resolved
from esm2mega.config.schema import Run, TrainConfig
from esm2mega.config.validate import validate
from esm2mega.errors import UserError

BASE = ("model.size=8M", "schedule.warmup_steps=10", "data.max_seq_length=100")


def loaded(*overrides: str, config: Path | None = None) -> Run:
    return load_run(None if config is None else str(config), [*BASE, *overrides])


def resolved(*overrides: str, dp: int = 1, saved: int | None = None) -> TrainConfig:
    run = loaded(*overrides)
    return resolve_batches(run.train, run.data, run.parallel, dp, saved)


def proteins(train: TrainConfig) -> tuple[int | None, int | None, int | None, int]:
    return (
        train.micro_batch_size,
        train.global_batch_size,
        train.accumulate_grad_batches,
        train.micro_batch_tokens,
    )


@given(
    micro=st.integers(1, 64),
    accumulation=st.integers(1, 32),
    tp=st.integers(1, 4),
    pp=st.integers(1, 4),
    dp=st.integers(1, 16),
)
def test_batch_arithmetic(micro, accumulation, tp, pp, dp):
    run = Run()
    run.parallel.tensor_model_parallel_size = tp
    run.parallel.pipeline_model_parallel_size = pp
    run.train.micro_batch_tokens = micro
    run.train.global_batch_tokens = micro * dp * accumulation
    assert data_parallel_size(run.parallel, tp * pp * dp) == dp
    assert num_micro_batches(run.train, run.parallel, tp * pp * dp) == accumulation
    run.train.global_batch_tokens += 1
    if micro * dp > 1:
        with pytest.raises(UserError, match=r"is not a multiple of train\.micro_batch_tokens"):
            num_micro_batches(run.train, run.parallel, tp * pp * dp)


SIZE, TOTAL, ACCUMULATED = (
    "train.micro_batch_size=4",
    "train.global_batch_size=24",
    "train.accumulate_grad_batches=3",
)


@pytest.mark.parametrize(
    ("words", "dp", "saved", "expected"),
    [
        ([SIZE, ACCUMULATED], 2, None, (4, 24, None, 400)),
        ([SIZE], 2, None, (4, 8, None, 400)),
        ([SIZE, TOTAL], 2, None, (4, 24, None, 400)),
        ([TOTAL], 8, None, (1, 24, None, 100)),
        ([SIZE, ACCUMULATED], 3, 24, (4, 24, None, 400)),
        ([SIZE, TOTAL], 24, 12, (4, 24, None, 400)),  # the stream refuses the checkpoint's
        ([], 3, 24, (None, None, None, 4096)),
    ],
)
def test_what_a_step_takes(
    words: list[str], dp: int, saved: int | None, expected: tuple[int | None, ...]
) -> None:
    assert proteins(resolved(*words, dp=dp, saved=saved)) == expected


@pytest.mark.parametrize(
    ("words", "dp", "saved", "message"),
    [
        ([TOTAL, ACCUMULATED], 1, None, "both say how many proteins a step takes; set one of them to null"),
        ([ACCUMULATED], 1, None, "counts micro-batches, whose size is not set; set train.micro_batch_size"),
        ([SIZE, ACCUMULATED], 5, 24, "24 proteins are not a multiple of data-parallel size 5; start "
         "processes for a data-parallel size of 1 or 2 or 3 or 4 or 6 or 8, or set train.global_batch"),
        ([TOTAL], 7, None, "set train.global_batch_size=21 or 28 in a new run"),
        ([SIZE, "train.micro_batch_tokens=400"], 1, None, "override: train.micro_batch_size counts "
         "proteins and train.micro_batch_tokens tokens, but a batch is counted in one of them"),
    ],
)  # fmt: skip
def test_counts_that_say_nothing_or_too_much(
    words: list[str], dp: int, saved: int | None, message: str
) -> None:
    with pytest.raises(UserError) as error:
        resolved(*words, dp=dp, saved=saved)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        (["train.micro_batch_size=0"], 1, "train.micro_batch_size=0 is too small"),
        ([SIZE, "train.accumulate_grad_batches=0"], 1, "train.accumulate_grad_batches=0 is too small"),
        ([TOTAL], 5, "train.global_batch_size=24 proteins are not a multiple of data-parallel size 5"),
        (
            [SIZE, "data.pack_window=64"],
            1,
            "data.pack_window=64 does not go with batches counted in",
        ),
        (
            [
                "train.micro_batch_size=3",
                "data.max_seq_length=101",
                "parallel.tensor_model_parallel_size=4",
                "parallel.sequence_parallel=true",
            ],
            4,
            "train.micro_batch_size=3 x data.max_seq_length=101 = 303 is not divisible by "
            "parallel.tensor_model_parallel_size=4, which parallel.sequence_parallel=true needs; set "
            "train.micro_batch_size=4",
        ),
    ],
)
def test_refused_before_anything_starts(words: list[str], world: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        validate(loaded(*words), world)
    assert message in str(error.value)


def counted(config: Path, words: Sequence[str] = ()) -> tuple[int | None, ...]:
    return proteins(load_run(str(config), words).train)


def test_the_source_that_speaks_last_decides(tmp_path: Path) -> None:
    """A file over its defaults, and the command line over both; within one of them nothing is guessed."""
    tokens, theirs, both = tmp_path / "tokens.yaml", tmp_path / "theirs.yaml", tmp_path / "both.yaml"
    tokens.write_text("defaults: base\nmodel:\n  size: 8M\ntrain:\n  micro_batch_tokens: 2048\n")
    theirs.write_text("defaults: tokens\ntrain:\n  micro_batch_size: 2\n  accumulate_grad_batches: 5\n")
    both.write_text("defaults: tokens\ntrain:\n  micro_batch_tokens: 4096\n  global_batch_size: 2\n")
    assert counted(tokens) == (None, None, None, 2048)
    assert counted(theirs) == (2, None, 5, 2048)
    assert counted(tokens, ["train.micro_batch_size=8"]) == (8, None, None, 8192)
    assert counted(theirs, ["train.global_batch_tokens=8192"]) == (None, None, None, 2048)
    assert counted(tokens, ["train.micro_batch_size=null"]) == (None, None, None, 2048)
    with pytest.raises(UserError, match=r"both.yaml:4: train.global_batch_size counts proteins"):
        load_run(str(both))


def test_a_written_configuration_counts_proteins_alone(tmp_path: Path) -> None:
    """It reads back equal, can be changed, and evaluations of its checkpoints may have other packs."""
    run = loaded(SIZE, ACCUMULATED)
    run = replace(run, train=resolve_batches(run.train, run.data, run.parallel, 2))
    save_resolved(run, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "global_batch_size: 24" in text and "train:\n  micro_batch_size: 4" in text
    assert "micro_batch_tokens: null" in text, "that of the section infer alone"
    assert "global_batch_tokens" not in text
    assert run_from_yaml(tmp_path / "config.yaml") == load_run(str(tmp_path / "config.yaml")) == run
    shorter = load_run(str(tmp_path / "config.yaml"), ["data.max_seq_length=50"])
    assert proteins(shorter.train) == (4, 24, None, 200)
    other = load_run_over(run, ["train.micro_batch_tokens=1000", "train.global_batch_tokens=1000"])
    assert proteins(other.train) == (None, None, None, 1000)
    validate(other, 1)
