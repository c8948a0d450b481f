"""Every script of tools/ converts, and back where it says so."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from esm2mega.convert.formats import READABLE, WRITABLE, open_weights
from tests import foreign

pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")

TOOLS = Path(__file__).parents[2] / "tools"
WRITERS: dict[str, tuple[Callable[[foreign.Truth, Path], Path], str | None]] = {
    "convert_hf.py": (foreign.write_hf, "back"),
    "convert_fair_esm.py": (foreign.write_fair_esm, "esm2_back.pt"),
    "convert_te.py": (foreign.write_te, "back"),
    "convert_cerebras.py": (foreign.write_cerebras, "back.mdl"),
    "convert_nemo.py": (foreign.write_nemo1, None),
}


def run(script: str, *arguments: str | Path) -> None:
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / script), run_name="__main__")
    finally:
        sys.argv = argv
    assert ended.value.code == 0


def test_every_script_is_tried_and_every_format_has_one() -> None:
    assert {path.name for path in TOOLS.glob("*.py")} == set(WRITERS)
    assert len(READABLE) == 7 and set(WRITABLE) < set(READABLE)


@pytest.mark.parametrize("script", WRITERS)
def test_script(script: str, tmp_path: Path) -> None:
    write, back = WRITERS[script]
    source = write(foreign.truth(torch.float32), tmp_path)
    run(script, source, tmp_path / "ours")
    if back is None:
        return
    run(script, "--reverse", tmp_path / "ours", tmp_path / back)
    first, second = open_weights(source), open_weights(tmp_path / back)
    assert first.infos == second.infos
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.infos)
