"""Where a start takes its state from. Training itself is tested in tests/distributed."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from esm2mega.checkpoint import layout
from esm2mega.cli.app import main
from esm2mega.config.load import run_from_yaml
from esm2mega.config.schema import EvalConfig
from esm2mega.convert.start_point import StartPoint
from esm2mega.data.overlap import check_overlap
from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.store import verification
from esm2mega.data.store.prepare import PrepareOptions, prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.recipe import masks_recipe
from esm2mega.errors import DamagedError, MachineError, UserError
from esm2mega.quickstart.simulate import FamilySpec, simulate_families
from esm2mega.train import session as module
from esm2mega.train.evaluate import evaluate_checkpoint
from esm2mega.train.loop import LoopState
from esm2mega.train.pretrain import pretrain
from esm2mega.train.start import find_init, find_resume
from tests.checkpoints import full_weights
from tests.unit.conftest import TinyRun
from tests.unit.data.damage import flip
from tests.unit.runs import SETTINGS, proteins_run, tiny_run, unmasked_store


def test_init_from_starts_with_the_weights_and_a_fresh_optimizer(finished: TinyRun, tmp_path: Path) -> None:
    """One step at a rate of almost 0 leaves the weights where they were."""
    changes = (
        f"init_from={finished.run_dir}",
        f"data.train={finished.train}",
        "train.max_steps=1",
        "optim.lr=1e-300",
    )
    loop = pretrain(tiny_run(*changes, "seed=5", run_dir=tmp_path))
    assert loop.step == 1
    expected, actual = (
        full_weights(layout.step_dir(finished.run_dir, 4)),
        full_weights(layout.step_dir(tmp_path, 1)),
    )
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_resume_goes_on_where_the_run_stopped(finished: TinyRun, tmp_path: Path) -> None:
    """Back at step 2, the run ends as it did without a break, bit by bit."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    shutil.rmtree(layout.step_dir(tmp_path / "run", 4))
    changes = ("train.eval_every=2", "checkpoint.save_every=2", f"data.valid={finished.valid}")
    pretrain(tiny_run(f"data.train={finished.train}", *changes, run_dir=tmp_path / "run"))
    expected, actual = (
        full_weights(layout.step_dir(finished.run_dir, 4)),
        full_weights(layout.step_dir(tmp_path / "run", 4)),
    )
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.fasta", "MKT\n", "not FASTA: a record must start with '>'"),
        ("bad.csv", "id,seq\na,MKT\n", "no column 'sequence' among id, seq"),
        ("absent", None, "absent"),
    ],
)
def test_every_input_is_looked_at_before_the_first_is_prepared(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    (tmp_path / "good.fasta").write_text(">a\nMKT\n")
    if content is not None:
        (tmp_path / name).write_text(content)
    inputs = (f"data.train={tmp_path}/good.fasta", f"data.test={tmp_path / name}")
    with pytest.raises(UserError, match=message):
        pretrain(tiny_run(*inputs, run_dir=tmp_path / "runs" / "x"))
    assert not (tmp_path / "runs").exists()


def test_epochs_take_every_protein_so_often(finished: TinyRun, tmp_path: Path) -> None:
    """Workers and padded batches included; the last step is filled up with packs that contribute nothing."""
    changes = (
        f"data.train={finished.train}",
        "train.max_epochs=3",
        "data.packing=bucket",
        "data.workers=1",
        "schedule.name=linear",
    )
    loop = pretrain(tiny_run(*changes, run_dir=tmp_path))
    state = layout.read_state(layout.step_dir(tmp_path, loop.step))
    assert state["data"]["consumed_samples"] == 3 * len(TokenStore(finished.train))
    packs = state["data"]["consumed_packs"]
    assert loop.step == -(-packs // 2) > 4  # two packs a step
    saved = run_from_yaml(tmp_path / "config.yaml")
    assert (saved.train.max_steps, saved.schedule.decay_steps) == (loop.step, loop.step * 9 // 10)
    with pytest.raises(UserError, match="train.max_epochs=4 differs from 3 of the checkpoint"):
        pretrain(tiny_run(*changes, "train.max_epochs=4", run_dir=tmp_path))


def test_every_start_may_have_a_directory_of_its_own(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With resume=never beside an existing run; resume=auto goes on in the newest, and never in it."""

    def start(steps: int, *words: str) -> int:
        given = [f"data.train={finished.train}", f"train.max_steps={steps}", *words]
        return main(["pretrain", *SETTINGS, *given])

    numbered = (f"run_dir={tmp_path}/run_{{version}}", "checkpoint.resume=never")
    assert [start(1, *numbered), start(2, *numbered), start(1, *numbered)] == [0, 0, 0]
    assert start(3, numbered[0]) == 0
    ends = {path.name: layout.find_checkpoints(path)[0][-1].name for path in tmp_path.iterdir()}
    assert ends == {"run_0": "step_00000001", "run_1": "step_00000002", "run_2": "step_00000003"}
    assert start(4, f"run_dir={tmp_path}/run_2", numbered[1]) == 2
    assert (
        "choose another run_dir, one with {version} for a new number at every start"
        in capsys.readouterr().err
    )
    timed = (f"run_dir={tmp_path}/times/{{time}}", "checkpoint.resume=never")
    assert start(1, *timed) == 0
    (first,) = (tmp_path / "times").iterdir()
    assert layout.find_checkpoints(first)[0]


def test_steps_in_proteins(finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packs of any size give one curve; a resumed run keeps its step, and says so where the keys say else."""

    def losses(name: str, *batch: str) -> list[float]:
        tokens = [f"{key}={value}" for key, value in (("data.train", finished.train), ("train.max_steps", 2))]
        pretrain(proteins_run(*tokens, *batch, run_dir=tmp_path / name))
        records = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [record[key] for record in records for key in ("loss", "grad_norm", "consumed_tokens")]

    expected = losses("a", "train.micro_batch_size=4", "train.accumulate_grad_batches=3")
    for name, batch in (("b", ["train.micro_batch_size=12"]), ("c", ["train.global_batch_size=12"])):
        # Another order of summation changes the last of the 16 digits.
        assert losses(name, *batch) == pytest.approx(expected, rel=1e-12, abs=0)
    state = layout.read_state(layout.step_dir(tmp_path / "a", 2))
    saved = layout.read_config(layout.step_dir(tmp_path / "a", 2))
    assert state["data"]["consumed_samples"] == 24 and saved.train.global_batch_size == 12
    assert state["data"]["identity"]["train.global_batch_size"] == 12
    said = capsys.readouterr().err
    assert (
        "batch    12 proteins a step in packs of up to 256 tokens\n" in said
        and "as in the checkpoint" not in said
    )
    losses("a", "train.micro_batch_size=4", "train.accumulate_grad_batches=2", "train.max_steps=3")
    assert layout.read_state(layout.step_dir(tmp_path / "a", 3))["data"]["consumed_samples"] == 36
    assert (
        "a step takes 12 proteins as in the checkpoint, not train.micro_batch_size x data-parallel size x "
        "train.accumulate_grad_batches = 8\n" in capsys.readouterr().err
    )
    # The batch of the training is no rule for other commands.
    loss = evaluate_checkpoint(tmp_path / "a", finished.valid)["loss"]
    other = evaluate_checkpoint(tmp_path / "a", finished.valid, micro_batch_tokens=100)["loss"]
    assert other == pytest.approx(loss, rel=1e-12)
    with pytest.raises(UserError, match="train.global_batch_size=24 differs from 12 of the checkpoint"):
        losses("a", "train.micro_batch_size=4", "train.global_batch_size=24", "train.max_steps=4")


def test_a_step_larger_than_the_data_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proteins of several epochs share a pack, so three proteins and two epochs are one step."""
    (tmp_path / "x.fasta").write_text(">a\nMKT\n>b\nLAGVS\n>c\nWYV\n")
    loop = pretrain(
        tiny_run(f"data.train={tmp_path / 'x.fasta'}", "train.max_epochs=2", run_dir=tmp_path / "run")
    )
    assert loop.step == 1
    said = capsys.readouterr().err
    assert "3 proteins, and a step takes each of them 2 times, so that train.max_epochs=2 is 1 step;" in said


def test_two_stores_are_mixed(finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = f"data.train=[{finished.train}, {finished.valid}]"
    pretrain(tiny_run(stores, "data.weights=[3, 1]", "train.max_steps=2", run_dir=tmp_path))
    said = capsys.readouterr().err
    assert f"data     45 sequences of {finished.train}, 75.00% of the samples" in said
    assert f"data     15 sequences of {finished.valid}, 25.00% of the samples" in said
    with pytest.raises(UserError, match=r"data.weights=\[32768, 32768\] differs from \[49152, 16384\]"):
        pretrain(tiny_run(stores, "data.weights=[1, 1]", "train.max_steps=3", run_dir=tmp_path))


def path_of(start: StartPoint | None) -> Path:
    assert start is not None
    return start.path


def test_find_resume(finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert find_resume(tiny_run(run_dir=run_dir)) is None
    assert find_resume(tiny_run("checkpoint.resume=never", run_dir=run_dir)) is None
    shutil.copytree(finished.run_dir, run_dir)
    assert path_of(find_resume(tiny_run(run_dir=run_dir))) == layout.step_dir(run_dir, 4)
    assert capsys.readouterr().err == ""
    (layout.step_dir(run_dir, 4) / "COMPLETE").unlink()
    assert path_of(find_resume(tiny_run(run_dir=run_dir))) == layout.step_dir(run_dir, 2)
    assert (
        capsys.readouterr().err == f"esm2mega: ignoring {layout.step_dir(run_dir, 4)}: it has no COMPLETE\n"
    )
    named = layout.step_dir(finished.run_dir, 4)
    assert path_of(find_resume(tiny_run(f"checkpoint.resume={named}", run_dir=tmp_path / "new"))) == named


def test_a_fresh_start_does_not_overwrite(finished: TinyRun) -> None:
    with pytest.raises(UserError, match="resume=never, but .* holds checkpoints up to step_00000004"):
        find_resume(tiny_run("checkpoint.resume=never", run_dir=finished.run_dir))


def test_another_shape_is_refused(finished: TinyRun) -> None:
    expected = "holds a model of 2 layers, hidden 24, .* the configuration says 3 layers, hidden 24, "
    with pytest.raises(UserError, match=expected):
        find_resume(tiny_run("model.num_layers=3", run_dir=finished.run_dir))
    with pytest.raises(UserError, match=expected):
        find_init(tiny_run("model.num_layers=3", f"init_from={finished.run_dir}", run_dir=Path("new")))


def test_weights_that_would_mean_something_else_are_refused(finished: TinyRun, tmp_path: Path) -> None:
    other = "model.layernorm_epsilon=1e-12"
    expected = (
        "weights go with model.layernorm_epsilon=1e-05, .* says 1e-12; set model.layernorm_epsilon=1e-05"
    )
    with pytest.raises(UserError, match=expected):
        find_resume(tiny_run(other, run_dir=finished.run_dir))
    with pytest.raises(UserError, match=expected):
        find_init(tiny_run(other, f"init_from={finished.run_dir}", run_dir=tmp_path))


def test_another_precision_is_refused_for_resume_alone(finished: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.precision=fp64, the configuration says fp32, .* init_from="):
        find_resume(tiny_run("model.precision=fp32", run_dir=finished.run_dir))
    fresh = tiny_run("model.precision=fp32", f"init_from={finished.run_dir}", run_dir=tmp_path)
    assert path_of(find_init(fresh)) == layout.step_dir(finished.run_dir, 4)


def test_a_checkpoint_before_others_of_its_run_is_refused(finished: TinyRun, tmp_path: Path) -> None:
    """Retention would take the later ones for the newest of this run."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    early = layout.step_dir(run_dir, 2)
    with pytest.raises(UserError, match=r"run holds step_00000004, .* move them away, or choose another"):
        find_resume(tiny_run(f"checkpoint.resume={early}", run_dir=run_dir))
    # Nor does a checkpoint of another run go on beside one of the same step.
    other = layout.step_dir(finished.run_dir, 4)
    with pytest.raises(UserError, match="holds step_00000004, "):
        find_resume(tiny_run(f"checkpoint.resume={other}", run_dir=run_dir))
    shutil.rmtree(layout.step_dir(run_dir, 4))
    assert path_of(find_resume(tiny_run(f"checkpoint.resume={early}", run_dir=run_dir))) == early
    assert path_of(find_resume(tiny_run(f"checkpoint.resume={other}", run_dir=run_dir))) == other


def test_a_start_tells_what_it_does_with_what_is_there(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    data = (f"data.train={finished.train}", f"data.test={finished.valid}", "train.max_steps=2")
    run_dir.mkdir()
    log.write_text('{"kind": "train", "step": 7}\n')

    def refuse(*_: object) -> list[object]:
        raise MachineError("no tracker")

    with monkeypatch.context() as patched, pytest.raises(MachineError):
        patched.setattr(module, "open_trackers", refuse)
        pretrain(tiny_run(*data, run_dir=run_dir))
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"log.jsonl", ".lock"}, "a start that fails touches nothing that was there"

    # A fresh start keeps the log of the earlier one, and the test split comes last.
    init = f"init_from={finished.run_dir}"
    capsys.readouterr()
    pretrain(tiny_run(*data, init, run_dir=run_dir))
    said = capsys.readouterr().err.splitlines()
    source = layout.step_dir(finished.run_dir, 4)
    assert f"run      {run_dir}, weights from {source}" in said
    assert f"log      that of an earlier start is now {log}.1" in said
    assert said[-1] == f"done: step 2, checkpoint {layout.step_dir(run_dir, 2)}"
    assert (run_dir / "log.jsonl.1").read_text() == '{"kind": "train", "step": 7}\n'
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 1),
        ("train", 2),
        ("test", 2),
    ]
    assert {"test_loss", "test_perplexity", "unigram_loss"} < records[-1].keys()
    assert layout.read_state(layout.step_dir(run_dir, 2))["loop"]["test_loss"] == records[-1]["test_loss"]

    # Started again it has nothing to do, and changes nothing.
    before = log.read_bytes()
    pretrain(tiny_run(*data, init, run_dir=run_dir))
    ending = f"nothing to do: step 2 of 2 is done, checkpoint {layout.step_dir(run_dir, 2)}"
    assert capsys.readouterr().err.splitlines()[-1] == ending
    assert log.read_bytes() == before

    # A resume says what it drops, what has changed, and what it leaves out.
    log.write_text(log.read_text() + '{"kind": "train", "step": 3}\n')
    pretrain(tiny_run(*data, init, "train.max_steps=3", "optim.lr=1e-3", run_dir=run_dir))
    said = capsys.readouterr().err.splitlines()
    assert f"run      {run_dir}, resumed from step_00000002 at step 2; {init} is not used" in said
    assert f"log      1 record behind step 2 dropped from {log}" in said
    changes = "train.max_steps 2 -> 3, optim.lr 0.002 -> 0.001, schedule.decay_steps 2 -> 3"
    assert f"changed since the checkpoint: {changes}" in said


def test_early_stopping_says_so(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate of almost 0 nothing improves."""
    settings = ("train.eval_every=1", "train.early_stopping.patience=2", "optim.lr=1e-300")
    data = (f"data.train={finished.train}", f"data.valid={finished.valid}")
    run = tiny_run(*data, *settings, "train.max_steps=9", run_dir=tmp_path)
    ended = pretrain(run)
    assert (ended.step, ended.best_step) == (3, 1)
    last, best = (layout.step_dir(tmp_path, step) for step in (3, 1))
    ending = f"stopped early: no improvement in 2 evaluations; step 3, checkpoint {last}"
    ending += f"; best by valid_loss ({ended.best_value:.4f}): step 1, checkpoint {best}"
    assert capsys.readouterr().err.splitlines()[-1] == ending


def test_validation_that_predicts_nothing_is_refused(finished: TinyRun, tmp_path: Path) -> None:
    """Before training: its loss would be null, which is never best and never stops."""
    store = unmasked_store(tmp_path / "store")
    run = tiny_run(f"data.train={finished.train}", f"data.valid={store}", run_dir=tmp_path / "run")
    with pytest.raises(
        UserError, match="select no residue of its 1 proteins, so there is nothing to predict"
    ):
        pretrain(run)
    assert not (tmp_path / "run").exists()


def test_a_test_that_predicts_nothing_is_null(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = unmasked_store(tmp_path / "store")
    data = (f"data.train={finished.train}", f"data.test={store}")
    pretrain(tiny_run(*data, "train.max_steps=1", run_dir=tmp_path / "run"))
    assert "step 1: test loss none: nothing to predict\n" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert record["kind"] == "test"
    assert record["test_loss"] is record["test_perplexity"] is record["unigram_loss"] is None


def test_a_resume_with_another_recipe_starts_the_comparison_anew(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another mask rate of training changes nothing; one of evaluation, or other proteins, are said."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    kept = layout.read_state(layout.step_dir(tmp_path / "run", 4))["loop"]
    data = (f"data.train={finished.train}", f"data.valid={finished.valid}")
    settings = (*data, "train.eval_every=1", "optim.lr=1e-300", "data.mlm_probability=0.3")

    def resumed(steps: int, *changes: str) -> tuple[LoopState, list[str]]:
        capsys.readouterr()
        run = tiny_run(*settings, f"train.max_steps={steps}", *changes, run_dir=tmp_path / "run")
        loop = pretrain(run)
        return loop, [line for line in capsys.readouterr().err.splitlines() if "start anew" in line]

    same, said = resumed(5)
    assert said == [] and same.eval_recipe == kept["eval_recipe"]
    assert same.best_value == pytest.approx(kept["best_value"], rel=1e-12)
    harder, said = resumed(6, "eval.mlm_probability=0.6")
    recipe = masks_recipe(EvalConfig(0.6), 64)
    line = f"eval     recipe {recipe} in place of {kept['eval_recipe']}: best and early stopping start anew"
    assert said == [line] and harder.eval_recipe == recipe
    assert (harder.best_step, harder.evaluations_without_improvement) == (6, 0)
    assert harder.best_value == harder.valid_loss != same.best_value
    part, said = resumed(7, "eval.mlm_probability=0.6", "train.eval_batches=1")
    assert said == ["eval     other validation proteins than before: best and early stopping start anew"]
    assert part.best_value == part.valid_loss != harder.best_value
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    recipes = [record["eval_recipe"] for record in records if record["kind"] == "eval"]
    assert recipes == [kept["eval_recipe"]] * 3 + [recipe] * 2
    # Every record says when it was written, in UTC; resuming keeps those of earlier starts.
    times = [datetime.fromisoformat(record["time"]) for record in records]
    assert times == sorted(times) and all(time.utcoffset() == timedelta(0) for time in times)


@pytest.mark.slow
def test_a_small_model_gets_below_residue_frequencies(tmp_path: Path) -> None:
    """The whole way from simulated families to a loss that only context can give."""
    lengths = {"median_length": 40, "length_sigma": 0.1, "min_length": 30, "max_length": 60}
    spec = FamilySpec(**lengths, min_identity=0.8, max_identity=0.95)
    simulate_families(tmp_path / "families.fasta", n_families=2, members=60, seed=1, spec=spec)
    prepare_fasta([tmp_path / "families.fasta"], tmp_path / "data", valid_size=20)
    pretrain(
        tiny_run(
            f"data.train={tmp_path / 'data' / 'train'}",
            f"data.valid={tmp_path / 'data' / 'valid'}",
            "model.precision=fp32",
            "model.hidden_size=64",
            "model.num_attention_heads=4",
            "model.ffn_hidden_size=128",
            "model.init_std=0.1",
            "train.micro_batch_tokens=512",
            "train.global_batch_tokens=512",
            "train.max_steps=300",
            "schedule.warmup_steps=10",
            "optim.lr=3e-3",
            run_dir=tmp_path / "run",
        )
    )
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "eval"
    assert last["valid_loss"] < last["unigram_loss"] - 0.3


def _csv(path: Path, numbers: range) -> Path:
    rows = "".join(f"p{i},MKTLAGVSER{'ACDEFGHIKL' * (i % 3)}{'LAGVSERTID'[i:]}\n" for i in numbers)
    path.write_text(f"name,aa\n{rows}")
    return path


def test_sequence_files_take_the_place_of_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained and evaluated as from stores of the same proteins, bit by bit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    train, valid = _csv(tmp_path / "train.csv", range(8)), _csv(tmp_path / "valid.csv", range(8, 11))
    columns = SourceOptions(sequence_column="aa", id_column="name")
    stores = {}
    for path in (train, valid):
        prepare_fasta([path], tmp_path / path.stem, options=PrepareOptions(columns))
        stores[path] = tmp_path / path.stem / "train"
    changes = ("data.sequence_column=aa", "data.id_column=name", "train.max_steps=2", "train.eval_every=1")
    files = tiny_run(f"data.train={train}", f"data.valid={valid}", *changes, run_dir=tmp_path / "a" / "run")
    pretrain(files)
    said = capsys.readouterr().err
    assert f"data.train: {train} is prepared, once, into {tmp_path / 'caches' / 'esm2mega'}" in said
    given = (f"data.train={stores[train]}", f"data.valid={stores[valid]}")
    pretrain(tiny_run(*given, *changes, run_dir=tmp_path / "b" / "run"))
    first, second = (full_weights(layout.step_dir(tmp_path / name / "run", 2)) for name in "ab")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []

    of_file = evaluate_checkpoint(files.run_dir, valid)
    of_store = evaluate_checkpoint(files.run_dir, stores[valid])
    assert {**of_file, "data": None} == {**of_store, "data": None}


def test_validation_on_the_training_proteins_is_refused_unless_asked_for(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.train, tmp_path / "copy")
    data = (f"data.train={finished.train}", f"data.valid={tmp_path / 'copy'}", "train.max_steps=1")
    with pytest.raises(
        UserError, match="copy: 45 of 45 proteins are also in data.train=.*allow_overlap=true"
    ):
        pretrain(tiny_run(*data, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    pretrain(tiny_run(*data, "data.allow_overlap=true", run_dir=tmp_path / "run"))
    assert "copy: 45 of 45 proteins are also in data.train=" in capsys.readouterr().err
    with pytest.raises(UserError, match="copy: 45 of 45 proteins are also in data.train="):
        pretrain(tiny_run(*data, "train.max_steps=2", run_dir=tmp_path / "run"))


def test_splits_are_not_compared_again_when_a_run_is_resumed(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.train, tmp_path / "copy")
    data = (f"data.train={finished.train}", f"data.valid={tmp_path / 'copy'}", "data.allow_overlap=true")
    compared = []

    def counting(splits: Any, allowed: bool) -> list[str]:
        compared.append(list(splits))
        return check_overlap(splits, allowed)

    monkeypatch.setattr("esm2mega.train.pretrain.check_overlap", counting)
    for step in (1, 2):
        pretrain(tiny_run(*data, f"train.max_steps={step}", run_dir=tmp_path / "run"))
        assert "copy: 45 of 45 proteins are also in data.train=" in capsys.readouterr().err
    assert compared == [["data.train", "data.valid"]]
    pretrain(
        tiny_run(*data, f"data.test={finished.train}", "train.max_steps=3", run_dir=tmp_path / "run"),
    )
    assert len(compared) == 2


@pytest.mark.parametrize(
    ("name", "bit"), [("tokens.bin", 0), ("tokens.bin", 7), ("ids.bin", 0), ("tokens.idx", 280)]
)
def test_a_flipped_bit_of_a_large_file_leaves_no_checkpoint(
    finished: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bit: int
) -> None:
    """Whether a token becomes another one or none; training has begun when the last file is compared."""
    monkeypatch.setattr(verification, "SMALL_BYTES", 0)
    shutil.copytree(finished.train, tmp_path / "store")
    flip(tmp_path / "store" / name, bit)
    changes = (f"data.train={tmp_path / 'store'}", "checkpoint.save_every=1")
    with pytest.raises(DamagedError, match="the token store is damaged; make it again") as caught:
        pretrain(tiny_run(*changes, run_dir=tmp_path / "run"))
    assert caught.value.path == tmp_path / "store" / name
    assert layout.find_checkpoints(tmp_path / "run") == ([], [])


def test_the_verification_changes_no_number(
    finished: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "SMALL_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    changes = (f"data.train={finished.train}", f"data.valid={finished.valid}", "train.eval_every=2")
    pretrain(tiny_run(*changes, run_dir=tmp_path / "run"))
    assert "GB are verified in the background" in capsys.readouterr().err
    step = layout.step_dir(tmp_path / "run", 4), layout.step_dir(finished.run_dir, 4)
    actual, expected = (full_weights(path) for path in step)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_training_data_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.train is not set"):
        pretrain(tiny_run(run_dir=tmp_path))
