"""Trackers receive the log's numbers, and one that is asked for but not installed is a clear error."""

import sys
import types

import pytest

from esm2mega.config.schema import LoggingConfig
from esm2mega.errors import MachineError, UserError
from esm2mega.report.external import open_trackers, scalars

RECORD = {
    "kind": "eval",
    "step": 20,
    "valid_loss": 2.5,
    "note": "x",
    "flag": True,
    "gap": None,
    "nan": float("nan"),
}


class FakeWriter:
    """Keeps what TensorBoard's SummaryWriter would write."""

    made: list = []

    def __init__(self, log_dir, purge_step):
        self.log_dir, self.purge_step, self.rows, self.closed = log_dir, purge_step, [], False
        FakeWriter.made.append(self)

    def add_scalar(self, name, value, step):
        self.rows.append((name, value, step))

    def close(self):
        self.closed = True


class FakeRun:
    """Keeps what a W&B run would log."""

    def __init__(self, arguments):
        self.arguments, self.rows, self.finished = arguments, [], False

    def log(self, values, step):
        self.rows.append((values, step))

    def finish(self):
        self.finished = True


@pytest.fixture
def tensorboard(monkeypatch):
    FakeWriter.made = []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**arguments):
        module.runs.append(FakeRun(arguments))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_only_finite_numbers_are_scalars():
    assert list(scalars(RECORD)) == [("eval/valid_loss", 2.5)]


def test_nothing_is_opened_by_default(tmp_path):
    assert open_trackers(LoggingConfig(), tmp_path, {}) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_names_key_and_cure(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        UserError, match=rf"logging\.{name}=true, but .* not installed; pip install 'esm2mega\[logging\]'"
    ):
        open_trackers(LoggingConfig(**{name: True}), tmp_path, {})


def test_tensorboard_gets_every_number_and_hides_events_after_the_resume_point(tensorboard, tmp_path):
    (tracker,) = open_trackers(LoggingConfig(tensorboard=True), tmp_path, {}, finished_steps=10)
    tracker.write(RECORD)
    tracker.close()
    (writer,) = FakeWriter.made
    assert writer.log_dir == str(tmp_path / "tensorboard")
    assert writer.purge_step == 11
    assert writer.rows == [("eval/valid_loss", 2.5, 20)]
    assert writer.closed


def test_wandb_resumes_the_run_of_the_directory(wandb, tmp_path):
    settings = LoggingConfig(wandb=True, wandb_project="proteins")
    for _ in range(2):
        (tracker,) = open_trackers(settings, tmp_path / "run", {"seed": 1})
        tracker.write(RECORD)
        tracker.close()
    first, second = wandb.runs
    assert first.arguments["id"] == second.arguments["id"]
    assert first.arguments["project"] == "proteins"
    assert first.arguments["name"] == "run"
    assert first.arguments["config"] == {"seed": 1}
    assert first.rows == [({"eval/valid_loss": 2.5}, 20)]
    assert first.finished


def test_wandb_that_does_not_start_is_one_line(wandb, tmp_path):
    def refuse(**arguments):
        raise RuntimeError("no API key\nmore")

    wandb.init = refuse
    with pytest.raises(MachineError, match=r"did not start: no API key; log in with"):
        open_trackers(LoggingConfig(wandb=True), tmp_path, {})
