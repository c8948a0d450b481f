"""Choice of trials, the table, the JSON, and the search for the smallest counterexample."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from esm2mega.errors import MachineError, UserError
from esm2mega.prove import command
from esm2mega.prove.command import choose_trials, prove, row_named, table
from esm2mega.prove.compare import Difference
from esm2mega.prove.layouts import Layout, is_possible
from esm2mega.prove.prover import Verdict
from esm2mega.prove.training import SETTINGS
from esm2mega.prove.trials import GROUPS, LORA, Trial


class FakeProver:
    """Judges by a rule instead of training."""

    wrong: Callable[[Layout], bool] = staticmethod(lambda layout: False)
    judged: list[Trial] = []

    def __init__(self, *arguments: Any) -> None:
        FakeProver.judged = []

    def __enter__(self) -> FakeProver:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def judge(self, trials: Sequence[Trial]) -> Iterator[Verdict]:
        for trial in reversed(trials):
            FakeProver.judged.append(trial)
            value = 0.5 if any(map(FakeProver.wrong, trial.layouts)) else 1e-14
            yield Verdict(trial, 1e-10, (Difference("gradient", "some.weight", "step 2, rank 1", value),))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeProver]:
    monkeypatch.setattr(command, "Prover", FakeProver)
    monkeypatch.setattr(FakeProver, "wrong", staticmethod(lambda layout: False))
    monkeypatch.setattr(FakeProver, "judged", [])
    return FakeProver


def test_groups_hold_possible_layouts_for_four_processes() -> None:
    """Those of context parallelism take eight, which `prove` starts without being asked."""
    for trial in choose_trials("all", seed=1, processes=4):
        assert trial.processes <= (8 if trial in GROUPS["cp"] else 4)
        for layout in trial.layouts:
            layout.check(SETTINGS)
    assert len(GROUPS["ci"]) == 12
    assert len({trial for trials in GROUPS.values() for trial in trials}) == sum(map(len, GROUPS.values()))


def test_every_axis_is_in_the_fixed_dozen() -> None:
    layouts = [trial.layouts[0] for trial in GROUPS["ci"]]
    assert {layout.tp for layout in layouts} == {1, 2, 4}
    assert {layout.pp for layout in layouts} == {1, 2, 3, 4}
    assert {layout.dp for layout in layouts} == {1, 2, 3}
    assert {layout.recompute for layout in layouts} == {"none", "selective", "full"}
    for axis in ("sp", "distributed_optimizer"):
        assert {getattr(layout, axis) for layout in layouts} == {False, True}
    assert any(layout.vpp > 1 for layout in layouts)


def test_names_of_groups() -> None:
    assert choose_trials("ci,bf16", 1, 4) == [*GROUPS["ci"], *GROUPS["bf16"]]
    assert len(choose_trials("random:7", 1, 2)) == 7
    for wrong in ("dozen", "ci,", "random:0", "random:x", ""):
        groups = "ci, more, resume, heads, bf16, fp16, families, exports, lora, lora-heads, dropout, cp"
        with pytest.raises(UserError, match=f"give {groups}, all, or random:N"):
            choose_trials(wrong, 1, 4)


def test_adapters_at_the_same_layouts() -> None:
    plain, adapted = choose_trials("random:5", 3, 4), choose_trials("random:5", 3, 4, lora=True)
    assert [trial.layouts for trial in adapted] == [trial.layouts for trial in plain]
    assert all(trial.settings == LORA and trial.continues for trial in adapted)
    bare = Trial(plain[0].layouts).command(3)
    assert adapted[0].command(3) == bare.replace(" --seed", " --lora --seed")
    assert choose_trials("lora", 1, 4, lora=True) == list(GROUPS["lora"])
    commands = [trial.command(1) for trial in GROUPS["lora"] if trial.label != "LoRA"]
    assert commands[0] == "esm2mega prove --row 'TP2, 2 per pack, DoRA' --seed 1"
    assert choose_trials("ci", 1, 4, head="mlp")[0].command(1).endswith("--packed 12 --head mlp --seed 1")
    for switch in ({"lora": True}, {"head": "mlp"}):
        with pytest.raises(UserError, match="--layouts resume and --(lora|head mlp) exclude each other"):
            choose_trials("resume", 1, 4, **switch)
    with pytest.raises(UserError, match="--head conv is not one of mlp, "):
        choose_trials("ci", 1, 4, head="conv")


def test_heads_with_adapters() -> None:
    """At four layouts each; random trials draw what they train, the same for a seed."""
    rows = choose_trials("lora-heads", 1, 4, lora=True, head="cnn")
    assert [str(trial) for trial in rows] == [
        "TP2, 3 per pack, head cnn, LoRA",
        "TP2 SP, 2 per pack, head cnn, LoRA",
        "PP2, 4 per pack, head cnn, LoRA",
        "DP2 DO, 3 per pack, head cnn, LoRA",
    ]
    assert rows[0].command(1) == "esm2mega prove --tp 2 --packed 3 --lora --head cnn --seed 1"
    assert {"finetune.mode=lora", "task.head=cnn", "lora.rank=3"} <= {*rows[0].settings}
    with pytest.raises(UserError, match="--head frozen and --lora exclude each other"):
        choose_trials("ci", 1, 4, lora=True, head="frozen")
    drawn = choose_trials("random:40", 3, 4)
    assert drawn == choose_trials("random:40", 3, 4)
    words = {word for trial in drawn for word in trial.label.split(", ")}
    assert {"", "LoRA"} < words and len(words) > 6
    assert any(trial.label.startswith("head ") and trial.continues for trial in drawn)
    assert [trial.layouts for trial in drawn[:5]] == [t.layouts for t in choose_trials("random:5", 3, 4)]


def test_all_pass(fake: type[FakeProver], tmp_path: Path) -> None:
    lines: list[str] = []
    trials = [Trial((Layout(tp=2),)), Trial((Layout(), Layout(dp=2)))]
    assert prove(trials, 9, out=tmp_path / "deep" / "proof.json", say=lines.append)
    assert [line.split()[0] for line in lines if line] == ["layout", "TP2", "1", "2"]
    assert lines[-1] == "2 of 2 passed"
    content = json.loads((tmp_path / "deep" / "proof.json").read_text())
    assert (content["complete"], content["passed"]) == (True, True)
    assert (content["seed"], content["counterexamples"]) == (9, [])
    first, second = content["rows"]
    assert first["command"] == "esm2mega prove --tp 2 --seed 9"
    assert first["layouts"][0]["tp"] == 2
    assert second["command"] == "esm2mega prove --row '1 process -> DP2' --seed 9"
    assert first["worst"]["gradient"] == {"value": 1e-14, "name": "some.weight", "place": "step 2, rank 1"}


def test_failure_names_the_worst_tensor_and_the_command(fake: type[FakeProver], tmp_path: Path) -> None:
    fake.wrong = staticmethod(lambda layout: layout.pp == 2)  # type: ignore[method-assign]
    lines: list[str] = []
    trials = [Trial((Layout(pp=2, packed=3),)), Trial((Layout(tp=2),))]
    assert not prove(trials, 1, out=tmp_path / "proof.json", say=lines.append)
    assert "PP2, 3 per pack: differs most in gradient some.weight, step 2, rank 1" in lines
    assert "repeat: esm2mega prove --pp 2 --packed 3 --seed 1" in lines
    assert lines[-1] == "1 of 2 passed"
    assert json.loads((tmp_path / "proof.json").read_text())["passed"] is False


@pytest.mark.parametrize(
    ("wrong", "smallest"),
    [
        (lambda layout: layout.tp >= 2, Layout(tp=2)),
        (lambda layout: layout.sp and layout.packed > 1, Layout(tp=2, sp=True, packed=2)),
        (lambda layout: layout.pp > 1 and layout.tp > 1, Layout(tp=2, pp=2)),
        (lambda layout: layout.vpp > 1, Layout(pp=2, vpp=2, layers=4)),
        (lambda layout: layout.recompute == "full", Layout(recompute="full")),
        (
            lambda layout: layout.distributed_optimizer and layout.pp > 1,
            Layout(pp=2, distributed_optimizer=True),
        ),
    ],
)
def test_counterexample_is_shrunk(
    fake: type[FakeProver], tmp_path: Path, wrong: Callable[[Layout], bool], smallest: Layout
) -> None:
    fake.wrong = staticmethod(wrong)  # type: ignore[method-assign]
    large = Layout(
        tp=4, pp=4, vpp=2, sp=True, packed=3, distributed_optimizer=True, recompute="full", layers=8
    )
    assert is_possible(large, SETTINGS) and wrong(large)
    lines: list[str] = []
    out = tmp_path / "proof.json"
    assert not prove([Trial((large,))], 1, processes=16, out=out, shrink=True, say=lines.append)
    assert f"repeat: {Trial((smallest,)).command(1)}" in lines
    assert json.loads(out.read_text())["counterexamples"][0]["layouts"] == [vars(smallest)]


def test_every_failure_that_no_counterexample_explains_is_shrunk(fake: type[FakeProver]) -> None:
    fake.wrong = staticmethod(lambda layout: layout.tp == 2 or layout.dp == 3)  # type: ignore[method-assign]
    lines: list[str] = []
    layouts = [Layout(tp=2, packed=3), Layout(tp=2, sp=True), Layout(dp=3, packed=2), Layout(pp=2)]
    assert not prove([Trial((layout,)) for layout in layouts], 1, shrink=True, say=lines.append)
    looked = [line for line in lines if line.startswith("Looking")]
    assert [line.rpartition("than ")[2] for line in looked] == ["TP2, 3 per pack", "DP3, 2 per pack"]
    repeats = [line.removeprefix("repeat: esm2mega prove ") for line in lines if line.startswith("repeat")]
    wanted = ["--tp 2 --packed 3", "--tp 2 --sp", "--dp 3 --packed 2", "--tp 2", "--dp 3"]
    assert repeats == [f"{options} --seed 1" for options in wanted]
    assert lines[-1] == "1 of 4 passed"


def test_what_was_found_before_an_interrupt_stays(
    fake: type[FakeProver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = FakeProver.judge

    def interrupted(self: FakeProver, trials: Sequence[Trial]) -> Iterator[Verdict]:
        yield next(judge(self, trials))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(FakeProver, "judge", interrupted)
    lines: list[str] = []
    out = tmp_path / "proof.json"
    with pytest.raises(KeyboardInterrupt):
        prove([Trial((Layout(tp=2),)), Trial((Layout(dp=2),))], 1, out=out, say=lines.append)
    assert [line.split()[0] for line in lines if line] == ["layout", "DP2"]
    content = json.loads(out.read_text())
    assert (len(content["rows"]), content["complete"], content["passed"]) == (1, False, False)


def test_json_that_cannot_be_written_is_told_at_the_start(fake: type[FakeProver], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        prove([Trial((Layout(tp=2),))], 1, out=tmp_path / "file" / "proof.json")
    assert fake.judged == []


def test_rows_by_name() -> None:
    for trials in GROUPS.values():
        for trial in trials:
            assert row_named(str(trial)) == trial
    with pytest.raises(UserError, match="--row TP9: no group has it"):
        row_named("TP9")


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_half_precision_of_one_process_is_its_own_measure(fake: type[FakeProver], half: str) -> None:
    with pytest.raises(UserError, match=f"12 per pack, {half}: {half} is measured by that of one process"):
        prove([Trial((Layout(packed=12),), half)], 1)


def test_too_large_and_impossible_trials_are_refused_before_anything_starts(fake: type[FakeProver]) -> None:
    with pytest.raises(UserError, match="TP4: needs 4 processes, --processes allows 2"):
        prove([Trial((Layout(tp=4),))], 1, processes=2)
    with pytest.raises(UserError, match="needs parallel.tensor_model_parallel_size > 1"):
        prove([Trial((Layout(sp=True),))], 1)
    assert fake.judged == []


def test_table_shows_errors_and_units() -> None:
    found = (Difference("weight", "w", "rank 0", 2.25),)
    rows = [
        Verdict(Trial((Layout(tp=2),)), 1e-10, error="rank 1: RuntimeError: " + "x" * 200),
        Verdict(Trial((Layout(tp=2),), "bf16"), 8.0, found),
    ]
    header, failed, passed = table(rows)
    assert header.split() == ["layout", "processes", "difference", "bound", "largest", "in", "verdict"]
    assert failed.endswith("FAILED") and "RuntimeError" in failed and len(failed) < 200
    assert passed.split()[2:] == ["2", "2.2", "x", "8", "x", "weight", "w,", "rank", "0", "equal"]
