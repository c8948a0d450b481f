"""What a user has not set is chosen from data and model, said, saved, and kept by a run that goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.config.load import given_keys, load_run, run_from_yaml
from esm2mega.config.schema import DataConfig, ParallelConfig, Run, TrainConfig
from esm2mega.config.validate import validate
from esm2mega.data.labels.dataset import LabelledProteins, proteins_of_sequences
from esm2mega.finetune.api import train_with
from esm2mega.finetune.defaults import _pack_size, choose, choose_batch, learning_rate, provisional
from esm2mega.finetune.run import UserParts
from tests.unit.conftest import TinyRun

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(4)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(9, 30, 30)]


def proteins(count: int, length: int = 50) -> LabelledProteins:
    return proteins_of_sequences(["M" * length] * count)


def chosen(count: int, *settings: str, validates: bool = True, length: int = 50) -> tuple[Run, list[str]]:
    """What is chosen for so many proteins, with these keys set; packs are not counted here."""
    words = ["model.size=8M", "task.kind=regression", *settings]
    given = given_keys(None, words)
    run = provisional(load_run(None, words), given, validates)
    validate(run, 1)
    run, batch = choose_batch(run, given, proteins(count, length), None)

    def num_steps(train: TrainConfig) -> int:
        assert train.max_epochs is not None
        return -(-count * train.max_epochs // (train.global_batch_size or 10))

    run, lines = choose(run, given, validates, None, num_steps)
    if run.train.max_epochs is not None:
        run.train.max_steps = num_steps(run.train)
    validate(run, 1)
    return run, [*batch, *lines]


def test_the_size_of_the_data_decides() -> None:
    for count, size, epochs in ((30, 8, 20), (300, 16, 20), (5000, 32, 12), (10**5, 32, 1)):
        run, lines = chosen(count)
        steps = -(-count // size)
        assert (run.train.global_batch_size, run.train.max_epochs) == (size, epochs)
        assert (run.train.eval_every, run.train.early_stopping.patience) == (steps, 5)
        assert run.schedule.warmup_steps == -(-count * epochs // size) // 10
        assert run.checkpoint.best_metric == "valid_spearman"
        said = "\n".join(lines)
        for words in (
            f"global_batch_size={size}",
            f"max_epochs={epochs}",
            f"eval_every={steps}",
            "lr=0.0005",
        ):
            assert words in said


def test_packs_of_a_pipeline_hold_a_step_with_little_padding() -> None:
    """Elsewhere packs are not padded, and the largest ones are the best."""
    pipeline = ParallelConfig(pipeline_model_parallel_size=2)
    for length, size in ((50, 1), (290, 3), (1000, 4)):
        assert chosen(300, length=length)[0].train.micro_batch_size == 4
        assert _pack_size(16, length + 2, DataConfig(), pipeline) == size
    assert _pack_size(16, 52, DataConfig(max_seq_length=64), pipeline) == 13


def test_what_is_set_wins() -> None:
    words = (
        *("optim.lr=1e-5", "schedule.warmup_steps=7", "train.eval_every=11", "train.max_steps=50"),
        *("train.early_stopping.patience=2", "checkpoint.best_metric=valid_mae", "train.micro_batch_size=2"),
    )
    run, lines = chosen(300, *words)
    assert not lines
    assert (run.optim.lr, run.schedule.warmup_steps, run.train.eval_every) == (1e-5, 7, 11)
    assert (run.train.max_steps, run.train.max_epochs, run.schedule.decay_steps) == (50, None, 45)
    assert (run.train.early_stopping.patience, run.checkpoint.best_metric) == (2, "valid_mae")
    # One key alone; the others go by it.
    run, _ = chosen(300, "train.max_steps=50")
    assert (run.train.max_epochs, run.schedule.warmup_steps, run.train.eval_every) == (None, 5, 19)
    run, _ = chosen(300, "train.eval_every=2")
    assert run.train.early_stopping.patience == 5 * 19 // 2 + 1  # five epochs
    run, _ = chosen(300, "schedule.decay_steps=3")
    assert (run.schedule.warmup_steps, run.schedule.decay_steps) == (2, 3)
    run, _ = chosen(300, "train.global_batch_tokens=8192")
    assert (run.train.micro_batch_tokens, run.train.global_batch_size) == (4096, None)
    run, lines = chosen(300, validates=False)
    assert (run.train.eval_every, run.train.early_stopping.patience) == (0, 0)
    assert run.checkpoint.best_metric == "valid_loss"


def test_the_rate_goes_by_mode_and_size() -> None:
    rates = [learning_rate("full", size) for size in (8 * 10**6, 35 * 10**6, 150 * 10**6, 650 * 10**6)]
    assert rates == [5e-4, 5e-4, 5e-5, 5e-5]
    assert learning_rate("lora", 650 * 10**6) == learning_rate("frozen", 8 * 10**6) == 1e-3


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    lines = [f"{sequence},{len(sequence)}" for sequence in SEQUENCES]
    for name, rows in (("train", lines[:20]), ("valid", lines[20:])):
        (folder / f"{name}.csv").write_text("\n".join(["sequence,target", *rows]) + "\n")
    return folder


def words(finished: TinyRun, tables: Path, *more: str) -> list[str]:
    data = [f"data.{split}={tables / split}.csv" for split in ("train", "valid")]
    return [f"init_from={finished.run_dir}", "task.kind=regression", "task.bootstrap=0", *data, *more]


def test_a_run_says_what_is_chosen_and_goes_on_with_it(
    finished: TinyRun, tables: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = words(finished, tables, f"run_dir={tmp_path / 'run'}")
    assert main(["finetune", *settings, "train.max_steps=6"]) == 0
    said = capfd.readouterr().err
    assert "chosen   train.global_batch_size=8 and train.micro_batch_size=4, for 20 training proteins" in said
    assert "chosen   optim.lr=0.0005, for all weights" in said and "valid_spearman" in said
    saved = run_from_yaml(tmp_path / "run" / "config.yaml")
    assert (saved.optim.lr, saved.train.eval_every, saved.train.global_batch_size) == (5e-4, 3, 8)
    assert (saved.schedule.warmup_steps, saved.schedule.decay_steps) == (0, 5)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "eval"] == [3, 6]
    # A longer run of more proteins keeps what the checkpoint has.
    assert main(["finetune", *settings, "train.max_steps=7", "optim.lr=1e-3"]) == 0
    longer = run_from_yaml(tmp_path / "run" / "config.yaml")
    assert "chosen   as in the checkpoint: schedule.warmup_steps=0" in capfd.readouterr().err
    assert longer.optim.lr == 1e-3 and longer.schedule.decay_steps == 6
    assert replace(longer.train, max_steps=6) == saved.train
    assert longer.checkpoint.best_metric == saved.checkpoint.best_metric


def test_a_run_of_an_earlier_version_goes_on_as_it_began(
    finished: TinyRun, tables: Path, tmp_path: Path
) -> None:
    """It had the defaults of a pretraining."""
    settings = words(finished, tables, f"run_dir={tmp_path / 'run'}")
    begun = ["train.micro_batch_tokens=1024", "train.global_batch_tokens=1024", "schedule.warmup_steps=1"]
    parts = UserParts()
    train_with([*settings, *begun, "train.max_steps=3"], parts, chooses=False)
    saved = run_from_yaml(tmp_path / "run" / "config.yaml")
    assert main(["finetune", *settings, "train.max_steps=4"]) == 0
    now = run_from_yaml(tmp_path / "run" / "config.yaml")
    assert (now.optim, replace(now.train, max_steps=3), now.checkpoint) == (
        *(saved.optim, saved.train, saved.checkpoint),
    )
    assert now.schedule.warmup_steps == 1 and now.train.global_batch_size is None


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_a_trial_leaves_nothing(
    command: str, finished: TinyRun, tables: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The shape of the model is that of `init_from` for both commands."""
    settings = words(finished, tables, f"run_dir={tmp_path / 'runs' / 'x'}")
    if command == "pretrain":
        data = [f"data.train={finished.train}", f"data.valid={finished.valid}", "data.max_seq_length=64"]
        batch = ["train.micro_batch_tokens=128", "train.global_batch_tokens=256", "schedule.warmup_steps=0"]
        settings = [*settings[:1], *data, *batch, settings[-1]]
    assert main([command, *settings, "--fast-dev-run"]) == 0
    output = capfd.readouterr()
    assert "done: step 2, checkpoint" in output.err and "step 2: validation loss" in output.err
    assert "nothing is kept" in output.out
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_a_trial_that_is_stopped_says_that_nothing_is_kept(
    command: str, finished: TinyRun, tables: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = words(finished, tables, f"run_dir={tmp_path / 'runs' / 'x'}", "train.max_minutes=0.0001")
    if command == "pretrain":
        data = [f"data.train={finished.train}", f"data.valid={finished.valid}", "data.max_seq_length=64"]
        batch = ["train.micro_batch_tokens=128", "train.global_batch_tokens=256", "train.max_minutes=0.0001"]
        settings = [*settings[:1], *data, *batch, "schedule.warmup_steps=0", settings[-2]]
    assert main([command, *settings, "--fast-dev-run"]) == 75
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("esm2mega: stopped")]
    assert "stopped by train.max_minutes before the trial" in line and "nothing of it is kept" in line
    assert "saved" not in line and list(tmp_path.rglob("*")) == []


def test_a_trial_evaluates_up_to_the_first_label(
    finished: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its two packs would hold none of the few labels, and the run itself has all of them."""
    (tmp_path / "train.csv").write_text(
        "sequence,target\n" + "".join(f"{text},{len(text)}\n" for text in SEQUENCES)
    )
    rows = [f"M{text},{len(text) if number == 12 else ''}\n" for number, text in enumerate(SEQUENCES)]
    (tmp_path / "valid.csv").write_text("sequence,target\n" + "".join(rows))
    batch = ["data.max_seq_length=32", "train.micro_batch_tokens=32", "train.global_batch_tokens=64"]
    data = [f"data.train={tmp_path / 'train.csv'}", f"data.valid={tmp_path / 'valid.csv'}", *batch]
    start = [f"init_from={finished.run_dir}", f"run_dir={tmp_path / 'run'}", "task.kind=regression"]
    assert main(["finetune", *start, *data, "task.target_columns=[target]", "--fast-dev-run"]) == 0
    assert "step 2: validation loss" in capfd.readouterr().err
