"""`tools/convert.py` converts each format, and back where it can be written; its README lists both."""

from __future__ import annotations

import re
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
    "hf": (foreign.write_hf, "back"),
    "fair-esm": (foreign.write_fair_esm, "esm2_back.pt"),
    "te": (foreign.write_te, "back"),
    "cerebras": (foreign.write_cerebras, "back.mdl"),
    "nemo1": (foreign.write_nemo1, None),
    "nemo2": (foreign.write_nemo2, "back"),
    "tape": (foreign_bert.write_tape, "back"),
    "proteinlm": (foreign_bert.write_proteinlm, "back"),
    "megatron": (foreign_bert.write_megatron, None),
}
BERTS = ("tape", "proteinlm", "megatron")


def run(*arguments: str | Path) -> int | None:
    argv, sys.argv = sys.argv, ["convert.py", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / "convert.py"), run_name="__main__")
    finally:
        sys.argv = argv
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code


def test_every_format_is_tried() -> None:
    assert set(WRITERS) == set(READABLE) - {"esm2mega"}
    assert {name for name, (_, back) in WRITERS.items() if back} == set(WRITABLE) - {"esm2mega"}


def test_readme_lists_the_commands_of_every_format() -> None:
    commands = re.findall(
        r"`python (tools/\S+) (\S+) SRC DST( --reverse)?", (TOOLS / "README.md").read_text()
    )
    assert {script for script, _, _ in commands} == {"tools/convert.py"}
    assert {name for _, name, reverse in commands if not reverse} == set(WRITERS)
    assert {name for _, name, reverse in commands if reverse} == set(WRITABLE) - {"esm2mega"}


@pytest.mark.parametrize("name", WRITERS)
def test_format(name: str, tmp_path: Path) -> None:
    write, back = WRITERS[name]
    truth = foreign_bert.truth if name in BERTS else foreign.truth
    source = write(truth(torch.float32), tmp_path)
    assert run(name, source, tmp_path / "ours") == 0
    if back is None:
        assert run(name, tmp_path / "ours", tmp_path / "back", "--reverse") == 2
        assert not (tmp_path / "back").exists()
        return
    assert run(name, "--reverse", tmp_path / "ours", tmp_path / back) == 0
    first, second = open_weights(source), open_weights(tmp_path / back)
    assert first.infos == second.infos
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.infos)


def test_options_of_the_command_are_handed_on(tmp_path: Path) -> None:
    source = foreign_bert.write_megatron(foreign_bert.truth(torch.float32), tmp_path)
    options = ("--to", "proteinlm", "--dtype", "bf16")
    assert run("megatron", *options, source, tmp_path / "tape") == 0
    weights = open_weights(tmp_path / "tape")
    assert weights.origin["format"] == "proteinlm"
    assert {info.dtype for info in weights.infos.values()} == {torch.bfloat16}


def test_unknown_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("onnx", tmp_path / "a", tmp_path / "b") == 2
    assert "invalid choice: 'onnx'" in capsys.readouterr().err
