"""The weights under adapters are those that were opened first, wherever they are now."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from esm2mega.checkpoint import layout
from esm2mega.convert.start_point import read_start
from esm2mega.lora.base import with_base
from tests.unit.conftest import TinyRun


def test_a_base_that_has_moved_is_not_looked_up_again(finished: TinyRun, tmp_path: Path) -> None:
    """`init_from` names the run that holds it now, in which a newer checkpoint appears."""
    run_dir = tmp_path / "moved"
    shutil.copytree(finished.run_dir, run_dir)
    opened = read_start(run_dir)
    shutil.copytree(layout.step_dir(run_dir, 4), layout.step_dir(run_dir, 5))
    recorded = {"base": {"path": str(tmp_path / "absent"), "sha256": "0"}}
    start = replace(opened, state={**opened.state, **recorded})
    assert with_base(start, str(run_dir), opened).base is opened
    other = with_base(start, str(run_dir)).base
    assert other is not None and other.path == layout.step_dir(run_dir, 5)
