"""When the loop logs, evaluates, saves and stops. Steps are made up; their arithmetic is tested elsewhere."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import best_checkpoint, prune
from esm2mega.config.schema import CheckpointConfig, EarlyStoppingConfig, Run, TrainConfig
from esm2mega.data.stream.build import StreamState
from esm2mega.errors import DamagedError, LostWorkerError, MachineError, StoppedBySignal
from esm2mega.parallel.initialize import Ranks
from esm2mega.train import loop as loop_module
from esm2mega.train import throughput
from esm2mega.train.incidents import Incidents, RollBack
from esm2mega.train.loop import Evaluation, Hooks, LoopState, begin_evaluations, fit, note_evaluation
from esm2mega.train.signals import StopSignal
from esm2mega.train.step import StepResult
from esm2mega.train.time_limit import TimeLimit
from tests.unit.runs import CPU, tiny_run

RANKS = Ranks(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, CPU)
Event = tuple[Any, ...]


class Stream:
    """Endless packs of one protein, 100 real tokens, 90 of them residues."""

    def __init__(self) -> None:
        self.state = StreamState()

    def next_step(self, micro_batches: int) -> list[SimpleNamespace]:
        first = self.state.consumed_packs
        packs = first + micro_batches
        self.state = StreamState(consumed_packs=packs, consumed_samples=packs, consumed_tokens=100 * packs)
        ids = range(128)
        numbers = range(first, packs)
        return [SimpleNamespace(num_residues=90, num_tokens=100, pack=n, input_ids=ids) for n in numbers]

    def contents_of(self, behind: StreamState, packs: Iterable[int]) -> list[dict[str, Any]]:
        return [{"pack": n, "proteins": [f"p{n}"], "samples": [[n, 0]]} for n in sorted(packs)]


class Writer:
    """A saver whose saves in the background take `steps` steps; it lists when each is finished."""

    def __init__(self, events: list[Event], state: LoopState, steps: int) -> None:
        self._events, self._state, self._steps = events, state, steps
        self._begun: int | None = None

    @property
    def is_writing(self) -> bool:
        return self._begun is not None and self._state.step < self._begun + self._steps

    def save(self, loop: LoopState) -> None:
        self._events.append(("save", loop.step, loop.to_dict()))
        self._begun = loop.step

    def finish(self) -> None:
        if self._begun is not None and self._steps:
            self._events.append(("finish", self._state.step, self._begun))
        self._begun = None


@pytest.fixture
def play(world: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Event]]:
    """Run the loop and list what it did; `valid_losses` are those of the evaluations in turn."""
    clock = iter(range(10**6))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(clock)))

    def run_loop(
        run: Run,
        valid_losses: list[float | None] | None = None,
        loop: LoopState | None = None,
        at_step: Callable[[int], None] = lambda step: None,
        test_losses: list[float] | None = None,
        in_evaluation: Callable[[], None] = lambda: None,
        results: dict[int, StepResult] | None = None,
        is_sound: Callable[[int], bool] = lambda step: True,
        incidents: Incidents | None = None,
        stop: StopSignal | None = None,
        write_steps: int = 0,
        verified: Callable[[], bool] = lambda: True,
        alarm: Callable[[], bool] = lambda: False,
    ) -> list[Event]:
        events: list[Event] = []
        state = loop if loop is not None else LoopState()
        writer = Writer(events, state, write_steps)

        def step(train_state: object, batches: list[Any]) -> StepResult:
            events.append(("step", state.step + 1, len(batches)))
            at_step(state.step + 1)
            finite = StepResult({"loss": 2.0, "count": 10.0}, grad_norm=0.5, lr=1e-3)
            return (results or {}).get(state.step + 1, finite)

        def measure(split: str, values: Iterator[float | None]) -> Evaluation:
            def evaluate(abandon: Callable[[], bool]) -> dict[str, Any] | None:
                in_evaluation()
                return None if abandon() else {f"{split}_loss": next(values), "unigram_loss": 3.0}

            return evaluate

        def log(record: dict[str, Any]) -> None:
            events.append((record["kind"], record["step"], record))

        monkeypatch.setattr(loop_module, "train_step", step)
        hooks = Hooks(
            log=log,
            show=lambda result: None,
            say=lambda line: events.append(("said", state.step, line)),
            evaluate=None if valid_losses is None else measure("valid", iter(valid_losses)),
            test=None if test_losses is None else measure("test", iter(test_losses)),
            is_sound=lambda probe: is_sound(state.step),
            save=writer.save,
            saver=writer,  # type: ignore[arg-type]
            verified=verified,
            alarm=alarm,
        )
        noted = incidents or Incidents(tmp_path / "incidents.jsonl", run.train.on_nonfinite)
        try:
            fit(
                *(run, None, Stream(), state, hooks, RANKS),  # type: ignore[arg-type]
                stop or StopSignal(CPU),
                noted,
            )
        except StoppedBySignal as stopped:
            events.append(("stopped", state.step, str(stopped)))
        except DamagedError:
            events.append(("damaged", state.step))
        except (MachineError, RollBack) as ended:
            events.append((type(ended).__name__, state.step, str(ended)))
        return events

    return run_loop


def _brief(events: list[Event], *kinds: str) -> list[tuple[str, int]]:
    return [(event[0], event[1]) for event in events if not kinds or event[0] in kinds]


Play = Callable[..., list[Event]]


def test_order_within_a_step(play: Play) -> None:
    """What is saved knows the evaluation of its own step."""
    run = tiny_run("train.max_steps=2", "train.eval_every=1", "checkpoint.save_every=1")
    events = play(run, [3.0, 2.5])
    assert _brief(events) == [(kind, step) for step in (1, 2) for kind in ("step", "train", "eval", "save")]
    assert [event[2]["evaluation"]["valid_loss"] for event in events if event[0] == "save"] == [3.0, 2.5]


def test_each_step_takes_the_micro_batches_of_the_configuration(play: Play) -> None:
    events = play(tiny_run("train.max_steps=2", "train.global_batch_tokens=640"))
    assert [event[2] for event in events if event[0] == "step"] == [5, 5]


def test_intervals(play: Play) -> None:
    """keep_best=0, so that only save_every and the end save."""
    run = tiny_run(
        "train.max_steps=7",
        "train.log_every=3",
        "train.eval_every=2",
        "checkpoint.save_every=5",
        "checkpoint.keep_best=0",
    )
    events = play(run, [3.0, 2.0, 1.0, 0.5])
    assert _brief(events, "train") == [("train", 3), ("train", 6), ("train", 7)]
    assert _brief(events, "eval") == [("eval", 2), ("eval", 4), ("eval", 6), ("eval", 7)]
    assert _brief(events, "save") == [("save", 5), ("save", 7)]


def test_by_default_only_the_end_is_evaluated_and_saved(play: Play) -> None:
    events = play(tiny_run("train.max_steps=3"), [2.0])
    assert _brief(events, "eval", "save") == [("eval", 3), ("save", 3)]


def test_without_validation_data_nothing_is_evaluated(play: Play) -> None:
    events = play(tiny_run("train.max_steps=3", "train.eval_every=1"))
    assert _brief(events, "eval", "save") == [("save", 3)]
    assert events[-1][2]["evaluation"] is None


def test_the_best_is_saved_when_it_comes(play: Play) -> None:
    run = tiny_run("train.max_steps=5", "train.eval_every=1", "checkpoint.keep_best=1")
    events = play(run, [3.0, 3.5, 2.0, 2.5, 2.4])
    assert _brief(events, "save") == [("save", 1), ("save", 3), ("save", 5)]
    assert [event[2]["best_value"] for event in events if event[0] == "save"] == [3.0, 2.0, 2.0]


def test_so_are_the_best_few(play: Play) -> None:
    """Also those that are no new best, and whatever early stopping counts as improvement."""
    run = tiny_run(
        "train.max_steps=6",
        "train.eval_every=1",
        "train.early_stopping.min_delta=5",
        "checkpoint.keep_best=2",
    )
    events = play(run, [3.0, 3.5, 3.2, 3.3, 2.5, 2.9])
    assert _brief(events, "save") == [("save", step) for step in (1, 2, 3, 5, 6)]
    assert list(events[-1][2]["ranking"].items()) == [(5, 2.5), (6, 2.9)]


def test_training_record(play: Play) -> None:
    records = [
        event[2] for event in play(tiny_run("train.max_steps=4", "train.log_every=2")) if event[0] == "train"
    ]
    assert [record["consumed_tokens"] for record in records] == [400, 800]
    for record in records:
        assert record["loss"] == 2.0
        assert record["perplexity"] == pytest.approx(7.38905609893065)
        assert (record["lr"], record["grad_norm"]) == (1e-3, 0.5)
        assert record["pack_fill"] == pytest.approx(200 / 256)
        assert record["tokens_per_second"] * 2 * record["step_time"] == pytest.approx(4 * 90), (
            "residues, not tokens"
        )
        assert min(record["step_time"], record["memory_gb"]) > 0


def test_a_resumed_loop_goes_on_behind_its_step(play: Play) -> None:
    events = play(tiny_run("train.max_steps=4"), loop=LoopState(step=2))
    assert _brief(events, "step", "save") == [("step", 3), ("step", 4), ("save", 4)]


def test_a_finished_run_does_nothing(play: Play) -> None:
    assert play(tiny_run("train.max_steps=4"), loop=LoopState(step=4)) == []


def test_patience_ends_the_run_and_saves(play: Play) -> None:
    run = tiny_run(
        "train.max_steps=50",
        "train.eval_every=2",
        "train.early_stopping.patience=2",
        "checkpoint.keep_best=0",
    )
    events = play(run, [3.0, 3.1, 2.9, 2.95, 2.9, 0.0])
    assert _brief(events, "save") == [("save", 10)]
    assert _brief(events, "step")[-1] == ("step", 10)
    assert events[-1][2]["evaluations_without_improvement"] == 2


def test_a_run_out_of_patience_stays_so_when_started_again(play: Play) -> None:
    stopped = {"step": 8, "evaluation": {"valid_loss": 2.0}, "evaluations_without_improvement": 2}
    run = tiny_run("train.max_steps=50", "train.early_stopping.patience=2")
    assert play(run, [], loop=LoopState(**stopped, early_stop_step=8)) == []
    assert play(tiny_run("train.max_steps=9"), [1.0], loop=LoopState(**stopped)) != []


def test_a_run_that_goes_on_without_patience_logs_its_end_once(play: Play) -> None:
    """Its last evaluation was made with more patience, and logged no end."""
    lasting = {"step": 8, "evaluation": {"valid_loss": 2.0}, "evaluations_without_improvement": 2}
    run = tiny_run("train.max_steps=50", "train.early_stopping.patience=2")
    events = play(run, [], loop=LoopState(**lasting))
    assert _brief(events) == [("early_stop", 8), ("save", 8)]
    assert play(run, [], loop=LoopState.from_dict(events[-1][2])) == []
    at_the_end = tiny_run("train.max_steps=8", "train.early_stopping.patience=2")
    assert play(at_the_end, [], loop=LoopState(**lasting)) == []


def test_a_missing_evaluation_of_the_last_step_is_made_up_for(play: Play) -> None:
    """A signal in the last step leaves a run that is trained and not evaluated."""
    events = play(tiny_run("train.max_steps=4"), [2.5], loop=LoopState(step=4))
    assert _brief(events) == [("eval", 4), ("save", 4)]
    assert events[-1][2]["evaluation"]["valid_loss"] == 2.5
    done = LoopState(step=4, evaluation={"valid_loss": 2.5})
    assert play(tiny_run("train.max_steps=4"), [], loop=done) == []


def test_the_test_split_is_evaluated_once_at_the_end(play: Play) -> None:
    run = tiny_run("train.max_steps=3", "train.eval_every=1", "checkpoint.keep_best=0")
    events = play(run, [3.0, 2.0, 2.5], test_losses=[2.2])
    assert _brief(events)[-4:] == [("eval", 3), ("save", 3), ("test", 3), ("save", 3)]
    ended = events[-1][2]
    assert ended["test_loss"] == 2.2
    assert play(run, [], loop=LoopState(**ended), test_losses=[]) == []
    longer = play(tiny_run("train.max_steps=4"), [2.0], loop=LoopState(**ended), test_losses=[2.1])
    assert _brief(longer)[-2:] == [("test", 4), ("save", 4)]
    assert longer[-1][2]["test_loss"] == 2.1


@pytest.mark.parametrize("during", ["eval", "test"])
def test_a_signal_abandons_an_evaluation(play: Play, during: str) -> None:
    """Without its record, but with a checkpoint from which the same command goes on."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    splits = ([3.0], None) if during == "eval" else (None, [3.0])
    run = tiny_run("train.max_steps=2")
    events = play(run, splits[0], test_losses=splits[1], in_evaluation=kill)
    assert _brief(events)[-3:] == [("train", 2), ("save", 2), ("stopped", 2)]
    again = play(run, splits[0], test_losses=splits[1], loop=LoopState(**events[-2][2]))
    assert _brief(again) == [(during, 2), ("save", 2)]


def test_a_signal_saves_and_stops_without_evaluating(play: Play) -> None:
    run = tiny_run("train.max_steps=50", "train.eval_every=1", "train.log_every=10")

    def kill_at_three(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    events = play(run, [3.0, 3.0, 3.0], at_step=kill_at_three)
    assert _brief(events)[-4:] == [("step", 3), ("train", 3), ("save", 3), ("stopped", 3)]
    assert events[-1][2].startswith("stopped by SIGUSR1 after step 3, which is saved")
    assert events[-2][2]["evaluation"] is None, "that of step 2 is not the loss of this checkpoint"


BAD = StepResult({"loss": math.nan, "count": 10.0}, grad_norm=math.nan, lr=1e-3, suspects=(1,))


def _read(incidents: Incidents) -> list[dict[str, Any]]:
    return [json.loads(line) for line in incidents.path.read_text().splitlines()]


def test_a_run_stops_at_a_step_that_is_not_finite(play: Play, tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "incidents.jsonl", "stop")
    run = tiny_run("train.max_steps=5", "checkpoint.save_every=1")
    events = play(run, results={3: BAD}, incidents=incidents)
    assert _brief(events)[-3:] == [("save", 2), ("step", 3), ("MachineError", 3)]
    assert "step 3: the loss is nan in pack 5 (proteins p5); see " in events[-1][2]
    assert str(incidents.path) in events[-1][2]
    (record,) = _read(incidents)
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "step": 3,
        "policy": "stop",
        "kind": "loss",
        "action": "stop",
        "loss": "nan",
        "grad_norm": "nan",
        "packs": [{"pack": 5, "proteins": ["p5"], "samples": [[5, 0]]}],
        "consumed_samples": 6,
    }


@pytest.mark.parametrize(
    ("bad", "last"), [((2, 4, 5), ("save", 7)), ((2, 4, 5, 7), ("save", 7)), ((4, 5, 6), ("MachineError", 6))]
)
def test_three_steps_in_a_row_stop_a_run_that_skips(play: Play, bad: tuple[int, ...], last: Event) -> None:
    run = tiny_run("train.max_steps=7", "train.on_nonfinite=skip")
    events = play(run, results=dict.fromkeys(bad, BAD))
    assert _brief(events)[-1] == last
    assert len([event for event in events if event[0] == "said"]) == len(bad) - (last[0] == "MachineError")


def test_three_times_in_a_row_stop_a_run_that_goes_back(play: Play, tmp_path: Path) -> None:
    """Steps that are done again do not end the row."""
    run = tiny_run("train.max_steps=9", "train.on_nonfinite=rollback")
    incidents = Incidents(tmp_path / "incidents.jsonl", "rollback")
    for bad, suspect, ends in ((4, 1, "RollBack"), (4, 0, "RollBack"), (5, 1, "MachineError")):
        result = replace(BAD, suspects=(suspect,))
        events = play(run, results={bad: result}, incidents=incidents, loop=LoopState(step=1))
        assert _brief(events)[-1] == (ends, bad)
    assert "3 times in a row" in events[-1][2]
    play(run, results={4: BAD}, incidents=(other := Incidents(incidents.path, "rollback")))
    play(run, incidents=other, loop=LoopState(step=3))
    assert other.in_a_row == 0


def test_a_step_of_padding_alone_is_not_done_again(play: Play, tmp_path: Path) -> None:
    """Its packs are left out already, so the weights are to blame, and would be so again."""
    run = tiny_run("train.max_steps=9", "train.on_nonfinite=rollback")
    incidents = Incidents(tmp_path / "incidents.jsonl", "rollback", skipped={4, 5})
    events = play(run, results={3: replace(BAD, suspects=())}, incidents=incidents)
    assert _brief(events)[-1] == ("MachineError", 3)
    assert "the gradient norm is nan though all packs of the step are left out; see" in events[-1][2]


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_ruined_state_is_not_saved(play: Play, policy: str) -> None:
    run = tiny_run("train.max_steps=5", "checkpoint.save_every=2", f"train.on_nonfinite={policy}")
    events = play(run, is_sound=lambda step: step < 4)
    assert _brief(events, "save") == [("save", 2)]
    assert _brief(events)[-1] == ("RollBack" if policy == "rollback" else "MachineError", 4)


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_an_evaluation_that_is_not_finite(play: Play, split: str, policy: str) -> None:
    """The weights give a finite loss on training data, so there is nothing to go back for."""
    run = tiny_run("train.max_steps=1", f"train.on_nonfinite={policy}")
    events = play(
        run, *(([math.nan],) if split == "valid" else ()), test_losses=[math.nan] * (split == "test") or None
    )
    if policy == "stop":
        assert _brief(events)[-1] == ("MachineError", 1)
        assert f"step 1: {split}_loss is nan; see " in events[-1][2]
    else:
        assert _brief(events)[-1] == ("save", 1)
        assert len([event for event in events if event[0] == "said"]) == 1


def test_the_time_limit_saves_and_stops(play: Play) -> None:
    """A step takes 10 seconds, saving none: five are done at 55 of 60, and a sixth would be too late."""
    seconds = 0.0

    def pass_time(step: int) -> None:
        nonlocal seconds
        seconds += 10.0

    run = tiny_run("train.max_steps=50", "checkpoint.save_every=3")
    stop = StopSignal(CPU, limit=TimeLimit(1.0, begun=-5.0, clock=lambda: seconds))
    events = play(run, at_step=pass_time, stop=stop)
    assert _brief(events)[-2:] == [("save", 5), ("stopped", 5)]
    assert events[-1][2].startswith(
        "stopped by train.max_minutes after step 5, which is saved; start the same"
    )


def test_the_time_limit_leaves_time_for_a_step_and_a_save() -> None:
    now = 0.0
    limit = TimeLimit(2.0, begun=0.0, clock=lambda: now)

    def near(at: float) -> bool:
        nonlocal now
        now = at
        return limit.is_near()

    assert not near(20.0), "20 s are the longest step, and 6 s are kept for the first save"
    assert not near(30.0)
    limit.save_begins()
    now = 70.0
    limit.save_ends()
    limit.go_on()
    now = 0.0
    assert not near(59.9), "40 s for saving, 20 s for a step"
    assert near(60.0)


def _noted(
    values: list[float | None], min_delta: float = 0.0, **settings: Any
) -> tuple[list[bool], list[int], LoopState]:
    """Enter evaluations of steps 1, 2, …: which are among the best, and counts since the last improvement."""
    loop, checkpoint = LoopState(), CheckpointConfig(**settings)
    train = TrainConfig(early_stopping=EarlyStoppingConfig(patience=1, min_delta=min_delta))
    kept, counts = [], []
    for loop.step, value in enumerate(values, start=1):
        record = {"valid_loss": 1.0, checkpoint.best_metric: value}
        kept.append(note_evaluation(loop, record, train, checkpoint))
        counts.append(loop.evaluations_without_improvement)
    return kept, counts, loop


def test_nothing_is_saved_before_the_data_are_verified(play: Play) -> None:
    asked = iter([False, False, True, True, True])
    run = tiny_run("train.max_steps=2", "checkpoint.save_every=1")
    assert _brief(play(run, verified=lambda: next(asked)), "step", "save") == [
        (kind, step) for step in (1, 2) for kind in ("step", "save")
    ]
    assert list(asked) == [], "twice more for the first save, once for the second and at the end"


def test_a_signal_waits_for_the_verification(play: Play) -> None:
    """Nothing that was trained on unverified data is ever saved; what is waited for is said once."""

    def stop(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    asked = iter([False, False, False, True, True])
    events = play(tiny_run("train.max_steps=2"), at_step=stop, verified=lambda: next(asked))
    assert _brief(events, "step", "said", "save", "stopped") == [
        *(("step", 1), ("said", 1), ("save", 1), ("stopped", 1))
    ]
    (said,) = [event[2] for event in events if event[0] == "said"]
    assert said == "stopping once the training data are verified and the state is saved"
    assert list(asked) == [], "four times for the save, once at the end"


@pytest.mark.parametrize(
    "found", ["in a step", "before a save", "at the end", "in an evaluation", "in a test"]
)
def test_damaged_data_stop_the_run_without_a_save(play: Play, found: str) -> None:
    known = SimpleNamespace(damage=False)

    def verified() -> bool:
        if known.damage or found == "before a save":
            raise DamagedError("tokens.bin", "is damaged")
        known.damage = found == "at the end"
        return not known.damage

    def at_step(step: int) -> None:
        known.damage = found == "in a step" and step == 2

    def in_evaluation() -> None:
        known.damage = True

    run = tiny_run("train.max_steps=3", "checkpoint.save_every=3")
    more: dict[str, Any] = {"verified": verified, "alarm": lambda: known.damage}
    if found == "in an evaluation":
        more |= {"valid_losses": [3.0], "in_evaluation": in_evaluation}
    if found in ("in a test", "at the end"):
        more |= {"loop": LoopState(3, {"valid_loss": 3.0}, test_loss=None)}
    if found == "in a test":
        more |= {"test_losses": [3.0], "in_evaluation": in_evaluation}
    last = 2 if found == "in a step" else 3
    assert _brief(play(run, at_step=at_step, **more), "save", "stopped", "damaged") == [("damaged", last)]


def test_note_evaluation_counts_since_the_best() -> None:
    kept, counts, loop = _noted([3.0, 2.0, 2.0, 2.5])
    assert (kept, counts) == ([True, True, False, False], [0, 0, 1, 2])
    assert (loop.valid_loss, loop.best_value, loop.best_step, loop.ranking) == (2.5, 2.0, 2, {2: 2.0})


def test_a_metric_may_be_better_when_it_is_higher_and_is_not_always_defined() -> None:
    values = [0.5, math.nan, 0.7, 0.6, 0.7]
    kept, counts, loop = _noted(values, keep_best=2, best_metric="valid_spearman/depth")
    assert (kept, counts) == ([True, False, True, True, True], [0, 1, 0, 1, 2])
    assert (loop.best_value, loop.best_step, loop.ranking) == (0.7, 3, {3: 0.7, 5: 0.7})
    assert _noted([math.nan, 0.1], best_metric="valid_r2")[0] == [False, True]


def test_the_step_of_the_best_is_known(play: Play) -> None:
    loop = LoopState()
    play(tiny_run("train.max_steps=3", "train.eval_every=1"), [3.0, 2.0, 2.5], loop=loop)
    assert (loop.best_step, loop.best_value) == (2, 2.0)


def test_small_improvements_do_not_renew_patience() -> None:
    _, counts, loop = _noted([3.0, 2.95, 2.8], min_delta=0.1)
    assert (counts, loop.best_value) == ([0, 1, 0], 2.8)


def test_an_evaluation_of_nothing_is_neither_best_nor_patience() -> None:
    """As 0 it would be unbeatable. A loss that diverged is no best either, and uses patience up."""
    kept, counts, loop = _noted([None, 3.0, None, 2.0, None])
    assert (kept, counts) == ([False, True, False, True, False], [0] * 5)
    assert (loop.valid_loss, loop.best_value) == (None, 2.0)
    kept, counts, loop = _noted([math.nan, 3.0, math.inf, math.nan])
    assert (kept, counts) == ([False, True, False, False], [1, 0, 1, 2])
    assert (loop.valid_loss, loop.best_value) == (None, 3.0)


def test_an_empty_evaluation_stops_and_keeps_nothing(play: Play) -> None:
    settings = ("train.early_stopping.patience=1", "train.eval_every=1", "checkpoint.keep_best=1")
    events = play(tiny_run("train.max_steps=3", *settings), [None] * 3, test_losses=[None])
    assert _brief(events, "step", "save") == [("step", 1), ("step", 2), ("step", 3), ("save", 3), ("save", 3)]
    assert [event[2]["valid_loss"] for event in events if event[0] == "eval"] == [None] * 3
    assert events[-1][2]["best_value"] is events[-1][2]["test_loss"] is None


@pytest.mark.parametrize("proteins", ["p", None])
def test_another_recipe_starts_the_comparison_anew(proteins: str | None) -> None:
    _, _, loop = _noted([3.0, 2.0, 2.5])
    assert begin_evaluations(loop, "a", proteins)
    assert loop == LoopState(step=3, eval_recipe="a", eval_proteins=proteins)
    assert note_evaluation(loop, {"valid_loss": 2.7}, TrainConfig(), CheckpointConfig())
    assert (loop.best_step, loop.ranking) == (3, {3: 2.7}), "the best of its recipe"
    before = loop.to_dict()
    assert not begin_evaluations(loop, "a", proteins)
    assert not begin_evaluations(loop, "a", None), "without validation nothing is compared"
    assert loop.to_dict() == before
    assert not begin_evaluations(LoopState(), "a", proteins), "there was nothing to compare with"
    assert begin_evaluations(loop, "a", "q"), "other proteins"
    assert loop == LoopState(step=3, eval_recipe="a", eval_proteins="q")


def test_state_survives_its_file() -> None:
    _, _, loop = _noted([3.0, 2.0, 2.5, math.nan], keep_best=2)
    assert LoopState.from_dict(json.loads(json.dumps(loop.to_dict(), allow_nan=False))) == loop


def test_state_of_an_earlier_version_is_read() -> None:
    saved = {"step": 3, "valid_loss": 2.5, "best_valid_loss": 2.0, "best_step": 2, "test_loss": None}
    loop = LoopState.from_dict({**saved, "evaluations_without_improvement": 1})
    assert (loop.valid_loss, loop.best_value, loop.best_step, loop.ranking) == (2.5, 2.0, 2, {2: 2.0})
    unevaluated = {**saved, "valid_loss": None, "best_valid_loss": None, "best_step": None}
    loop = LoopState.from_dict({**unevaluated, "evaluations_without_improvement": 0})
    assert (loop.evaluation, loop.best_value, loop.ranking) == (None, None, {})


def test_the_best_evaluations_are_kept_whatever_their_order(tmp_path: Path) -> None:
    """30 runs of 20 drawn evaluations, some of them equal or not defined, compared with a sort."""
    rng = np.random.default_rng(4)
    for number in range(30):
        metric, sign = (("valid_loss", 1), ("valid_spearman", -1))[number % 2]
        keep_best, keep_last, save_every = (int(rng.integers(low, 7)) for low in (0, 1, 0))
        settings = {"keep_best": keep_best, "keep_last": keep_last, "best_metric": metric}
        values = [float(x) if x else math.nan for x in rng.integers(0, 15, 20)]
        loop, checkpoint, run_dir = LoopState(), CheckpointConfig(**settings), tmp_path / str(number)
        for loop.step, value in enumerate(values, start=1):
            loop.evaluation = None
            kept = note_evaluation(loop, {"valid_loss": 1.0, metric: value}, TrainConfig(), checkpoint)
            if kept or loop.step == len(values) or (save_every and loop.step % save_every == 0):
                directory = layout.step_dir(run_dir, loop.step)
                directory.mkdir(parents=True)
                saved = {"best_metric": metric if keep_best else None, "loop": loop.to_dict()}
                layout.write_state(directory, saved)
                (directory / layout.COMPLETE).write_text("")
                prune(run_dir, checkpoint, directory)
        there = {layout.step_of(path) for path in layout.find_checkpoints(run_dir)[0]}
        ranked = sorted((sign * x, step) for step, x in enumerate(values, start=1) if not math.isnan(x))
        best = [step for _, step in ranked[:keep_best]]
        assert set(best) <= there and 20 in there, number
        assert len(there) <= keep_best + keep_last
        found = best_checkpoint(run_dir)
        assert (found and found.step) == (best[0] if best else None)


def test_saves_in_the_background_are_finished_when_written_and_before_the_end(play: Play) -> None:
    run = tiny_run("train.max_steps=9", "checkpoint.save_every=3")
    events = play(run, write_steps=2)
    assert _brief(events, "save", "finish") == [
        *(("save", 3), ("finish", 5), ("save", 6), ("finish", 8), ("save", 9), ("finish", 9))
    ]

    def stop_in_4(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = _brief(play(run, write_steps=2, at_step=stop_in_4), "save", "finish", "stopped")
    # The stub begins the next save without waiting for the one that is running, as `Saver.save` does.
    assert stopped == [("save", 3), ("save", 4), ("finish", 4), ("stopped", 4)]

    def fail_in_4(step: int) -> None:
        if step == 4:
            raise MachineError("the loss is nan")

    failed = _brief(play(run, write_steps=2, at_step=fail_in_4), "save", "finish", "MachineError")
    assert failed == [("save", 3), ("finish", 3), ("MachineError", 3)], (
        "the state before the failure is a good one"
    )


@pytest.mark.parametrize(
    ("error", "finishes"),
    [
        (MachineError("loss is NaN"), True),
        (RollBack("bad"), True),
        (LostWorkerError("data worker 0 died"), False),
        (ValueError(), False),
    ],
)
def test_a_save_is_finished_before_errors_of_all_ranks_alone(error: Exception, finishes: bool) -> None:
    """Finishing is for all ranks together, and the others know nothing of a worker that this one lost."""
    finished: list[int] = []
    hooks: Any = SimpleNamespace(saver=SimpleNamespace(finish=lambda: finished.append(1)))
    with pytest.raises(type(error)), loop_module._saved_first(hooks):
        raise error
    assert bool(finished) == finishes
