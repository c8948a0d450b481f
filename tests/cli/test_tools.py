"""Every script of tools/ converts, and back where it says so."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esm2mega.convert.formats.registry import READABLE, WRITABLE, open_weights
from tests import foreign, foreign_bert

for package in ("esm", "tape"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install esm2mega[dev]")

TOOLS = Path(__file__).parents[2] / "tools"
WRITERS: dict[str, tuple[Callable[[Any, Path], Path], str | None]] = {
    "convert_hf.py": (foreign.write_hf, "back"),
    "convert_fair_esm.py": (foreign.write_fair_esm, "esm2_back.pt"),
    "convert_te.py": (foreign.write_te, "back"),
    "convert_cerebras.py": (foreign.write_cerebras, "back.mdl"),
    "convert_nemo.py": (foreign.write_nemo1, None),
    "convert_tape.py": (foreign_bert.write_tape, "back"),
    "convert_proteinlm.py": (foreign_bert.write_proteinlm, "back"),
    "convert_megatron.py": (foreign_bert.write_megatron, None),
}
BERTS = ("convert_tape.py", "convert_proteinlm.py", "convert_megatron.py")


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
    # nemo1 and nemo2 share one, and our own needs none.
    assert len(READABLE) == len(WRITERS) + 2 and set(WRITABLE) < set(READABLE)


@pytest.mark.parametrize("script", WRITERS)
def test_script(script: str, tmp_path: Path) -> None:
    write, back = WRITERS[script]
    truth = foreign_bert.truth if script in BERTS else foreign.truth
    source = write(truth(torch.float32), tmp_path)
    run(script, source, tmp_path / "ours")
    if back is None:
        return
    run(script, "--reverse", tmp_path / "ours", tmp_path / back)
    first, second = open_weights(source), open_weights(tmp_path / back)
    assert first.infos == second.infos
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.infos)
