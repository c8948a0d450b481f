"""Commands load PyTorch's compiler only if they compile, and fused functions of Megatron-Core still work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esm2mega.megatron_import import PACKAGE, _compiling_later
from tests.infer_models import make_reference, random_proteins, write_fasta

pytest.importorskip("transformers")

# Embeds, then calls a function that Megatron-Core decorates.
_PROGRAM = """
import sys
from esm2mega.cli.app import main

def is_loaded():
    return sorted(name for name in sys.modules if name in ("torch._dynamo", "torch._inductor.compile_fx"))

assert "torch" not in sys.modules
code = main(["embed", *sys.argv[1:]])
print(code, is_loaded())
import megatron.core, torch
from importlib.machinery import SourceFileLoader
from megatron.core.activations import squared_relu
assert type(megatron.core.__spec__.loader) is SourceFileLoader and torch.compile.__module__ == "torch"
assert squared_relu.__name__ == "squared_relu"
x = torch.randn(4, 8)
print(torch.equal(squared_relu(x), x.relu() ** 2), "torch._dynamo" in is_loaded())
"""


def test_a_command_loads_no_compiler(tmp_path: Path) -> None:
    """In an interpreter of its own, since those of the tests have loaded it long ago."""
    checkpoint = make_reference(tmp_path).checkpoint
    fasta = write_fasta(tmp_path / "x.fasta", [("a", random_proteins([40])[0])])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(checkpoint), str(fasta), "--out", str(tmp_path / "x.h5")],
        capture_output=True,
        text=True,
        timeout=300,
        # The compiler is loaded and gives the function back as it is: a real compilation takes half a minute.
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["0 []", "True True"]


def test_functions_are_compiled_once_when_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stand_in(function, **options):
        calls.append((function.__name__, options))
        return lambda x: ("compiled", function(x))

    monkeypatch.setattr(torch, "compile", stand_in)
    with _compiling_later():

        @torch.compile
        def plain(x: int) -> int:
            """Has words."""
            return x + 1

        @torch.compile(dynamic=True)
        def dynamic(x: int) -> int:
            return x + 2

    assert torch.compile is stand_in and not calls and plain.__doc__ == "Has words."
    assert [plain(1), plain(2), dynamic(1)] == [("compiled", 2), ("compiled", 3), ("compiled", 3)]
    assert calls == [("plain", {}), ("dynamic", {"dynamic": True})]
    # What is compiled around a function takes it in.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert plain(1) == 2
    with pytest.raises(ZeroDivisionError), _compiling_later():
        raise ZeroDivisionError
    assert torch.compile is stand_in


def test_the_import_is_met_once() -> None:
    import megatron.core

    assert PACKAGE in sys.modules and not any(type(x).__name__ == "_Finder" for x in sys.meta_path)
    assert megatron.core.__spec__ is not None
