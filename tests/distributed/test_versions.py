"""A run goes on under another version of Megatron-Core, which needs another Python, in either direction.

``make versions`` makes the environment of the other version, `.venv/py312`, and runs this.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import full_tensors
from tests.distributed.runs import SETTINGS, outcome
from tests.ranks import REPOSITORY

OTHER = Path(os.environ.get("ESM2MEGA_OTHER_PYTHON", REPOSITORY / ".venv/py312/bin/python"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not OTHER.exists(), reason=f"{OTHER} is not there: `make versions` makes it"),
]


def _version(python: str) -> str:
    words = (
        "import warnings; warnings.simplefilter('ignore'); import megatron.core as m; print(m.__version__)"
    )
    return subprocess.run([python, "-c", words], capture_output=True, text=True, check=True).stdout.strip()


def _train(python: str, run_dir: Path, store: Path, steps: int) -> None:
    given = [f"run_dir={run_dir}", f"data.train={store}", *SETTINGS, "model.precision=bf16"]
    given += [f"train.max_steps={steps}", "checkpoint.save_every=2", "checkpoint.keep_last=9"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [python, "-m", "esm2mega", "-v", "pretrain", *given]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("later_first", [True, False], ids=["later_to_earlier", "earlier_to_later"])
def test_a_run_goes_on_under_another_version(later_first: bool, store: Path, tmp_path: Path) -> None:
    """In bf16, whose main weights are kept besides; the losses are those of the run that stayed."""
    pythons = {_version(python): python for python in (sys.executable, str(OTHER))}
    assert len(pythons) == 2, pythons
    first, second = (pythons[version] for version in sorted(pythons, reverse=later_first))
    _train(first, tmp_path / "stays", store, 4)
    _train(first, tmp_path / "moves", store, 2)
    _train(second, tmp_path / "moves", store, 4)
    expected, found = outcome(tmp_path / "stays"), outcome(tmp_path / "moves")
    # Both compute the same, up to the order of sums in fp32; without the state of Adam it would be 1e-2.
    assert found.losses == pytest.approx(expected.losses, abs=1e-4)
    saved = full_tensors(tmp_path / "moves" / "checkpoints" / "step_00000004")
    assert saved.keys() == full_tensors(tmp_path / "stays" / "checkpoints" / "step_00000004").keys()
