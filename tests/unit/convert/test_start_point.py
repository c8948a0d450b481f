"""What a checkpoint is found to be when it is opened, here and on the ranks that it is sent to."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.auxiliary import read_auxiliary
from esm2mega.convert.start_point import StartPoint, open_checkpoint, read_checkpoint, read_start
from esm2mega.errors import UserError
from tests import foreign
from tests.unit.conftest import TinyRun

pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as a directory of Hugging Face, a file of fair-esm, and a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("sources")
    truth = foreign.truth(torch.float16)
    foreign.write_sources(truth, folder)
    return folder


@pytest.mark.parametrize(("name", "format"), [("hf", "hf"), ("esm2_x.pt", "fair-esm"), ("run", "esm2mega")])
def test_one_model_is_the_same_in_every_format(sources: Path, name: str, format: str) -> None:
    start = read_start(sources / name)
    newest = sources / "run" / "checkpoints" / "step_00000002"
    assert start.path == (newest if name == "run" else sources / name)
    assert (start.format, start.head, start.task, start.base) == (format, "lm", None, None)
    assert start.has_contact_head and start.auxiliary().keys() == read_auxiliary(newest).keys()
    # Stored in fp16, and computed in fp32.
    assert (start.run.model.precision, start.run.model.num_layers) == ("fp32", foreign.L)
    assert start.run.model == layout.read_config(newest).model
    start.check_whole()


def test_what_has_been_opened_is_not_looked_up_again(finished: TinyRun, tmp_path: Path) -> None:
    start = open_checkpoint(finished.run_dir)
    assert start.path == layout.step_dir(finished.run_dir, 4) and start.state["step"] == 4
    assert not start.has_contact_head and start.run.model.hidden_size == 24
    assert open_checkpoint(start) is start


def test_what_cannot_be_opened(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: no such checkpoint; give a step_XXXXXXXX directory"):
        read_start(tmp_path / "absent")
    with pytest.raises(UserError, match="in none of the formats esm2mega, hf, "):
        read_start(tmp_path)
    with pytest.raises(UserError, match="hf: is a checkpoint in the format hf, .* those of esm2mega"):
        read_checkpoint(sources / "hf")
    start = StartPoint(tmp_path, "esm2mega", read_start(sources / "run").run, "lm", False, {"base": {}})
    with pytest.raises(UserError, match="holds adapters and not the weights under them; make a whole"):
        start.check_whole()


def test_a_start_that_was_sent_to_another_rank_reads_the_same(sources: Path, tmp_path: Path) -> None:
    """Without open files, and without looking again which checkpoint is the newest."""
    run_dir = tmp_path / "run"
    shutil.copytree(sources / "run", run_dir)
    for path in (sources / "hf", sources / "esm2_x.pt", run_dir):
        here = read_start(path)
        expected = here.weights
        there = pickle.loads(pickle.dumps(here))
        assert there == here
        if path == run_dir:
            shutil.copytree(layout.step_dir(run_dir, 1), layout.step_dir(run_dir, 3))
            (layout.step_dir(run_dir, 3) / "config.yaml").unlink()
        assert there.weights.infos == expected.infos and there.weights is not expected
        for name in expected.infos:
            assert torch.equal(there.weights.read(name), expected.read(name))
