"""A checkpoint's index is read only when it can do nothing but describe tensors."""

from __future__ import annotations

import enum
import os
import pickle
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.safe_index import checked_index
from esm2mega.errors import UserError
from tests.unit.conftest import TinyRun


@pytest.fixture
def honest(finished: TinyRun) -> bytes:
    return (layout.step_dir(finished.run_dir, 4) / "model" / ".metadata").read_bytes()


def _refusal(folder: Path, content: bytes) -> str:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(UserError) as error:
        checked_index(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / '.metadata'}: ")
    assert "\n" not in message
    return message


def test_honest_index_passes(honest: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(honest)
    checked_index(tmp_path)


class _ByAttribute(pickle.Pickler):
    """Stores members of enumerations as Python 3.11.2 does."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_enumerations_as_attributes_pass(honest: bytes, tmp_path: Path) -> None:
    with (tmp_path / ".metadata").open("wb") as file:
        _ByAttribute(file).dump(pickle.loads(honest))
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    checked_index(tmp_path)


@pytest.mark.parametrize("arguments", [(torch.Size, "__init__"), (_MEM_FORMAT_ENCODING, "mro"), ("x",)])
def test_other_attributes_are_refused(tmp_path: Path, arguments: tuple[Any, ...]) -> None:
    content = pickle.dumps({"state_dict_metadata": Call(getattr, *arguments)})
    assert "refused: it would load builtins.getattr" in _refusal(tmp_path, content)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.system, subprocess.getoutput, eval])
def test_a_call_is_refused_and_not_made(tmp_path: Path, function: Any, protocol: int) -> None:
    trace = tmp_path / "trace"
    order = f"open({str(trace)!r}, 'w')" if function is eval else f"touch {trace}"
    message = _refusal(tmp_path, pickle.dumps({"state_dict_metadata": Call(function, order)}, protocol))
    assert "refused: it would load" in message
    assert function.__name__ in message
    assert not trace.exists()
    pickle.loads(pickle.dumps(Call(function, order)))
    assert trace.exists(), "the call would have left its trace"


@pytest.mark.parametrize("function", [torch.load, torch.hub.load, torch.zeros, getattr])
def test_functions_of_allowed_modules_are_refused_too(tmp_path: Path, function: Any) -> None:
    assert "refused" in _refusal(tmp_path, pickle.dumps(Call(function, "x")))


def test_dotted_names_do_not_reach_through_an_allowed_class(tmp_path: Path) -> None:
    """Protocol 4 may ask for an attribute of a name: `torch`, `Size.__init__`."""
    content = b"\x80\x04\x8c\x05torch\x8c\x0dSize.__init__\x93."
    assert "refused: it would load torch.Size.__init__" in _refusal(tmp_path, content)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_index_is_refused(honest: bytes, tmp_path: Path, share: float) -> None:
    assert "damaged" in _refusal(tmp_path, honest[: int(share * len(honest))])


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_refused(tmp_path: Path, seed: int) -> None:
    _refusal(tmp_path, b"\x80\x04" * (seed % 2) + random.Random(seed).randbytes(200))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(None),
        pickle.dumps({"a": 1}),
        b"\x80\x04\x96" + b"\xff" * 8 + b".",  # a byte array of 2^64 - 1 bytes
        b"\x80\x04T\xff\xff\xff\x7f.",  # a string of 2 GB
        b"\x80\x04]r\xff\xff\xff\xef.",  # a table of 4 billion objects, in C
        b"\x80\x04Vtwo\\u000alines\nQ.",
    ],
    ids=["none", "dict", "too large", "memory", "table", "persistent id"],
)
def test_other_pickles_are_no_index(tmp_path: Path, content: bytes) -> None:
    assert "not an index of tensors" in _refusal(tmp_path, content)


def test_damaged_bytes_never_raise_anything_else(honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    refused = 0
    for seed in range(150):
        generator = random.Random(seed)
        content = bytearray(honest)
        for _ in range(20):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content)
        try:
            checked_index(tmp_path)
        except UserError:
            refused += 1
    assert refused > 75


def test_missing_index_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "COMPLETE").touch()
    with pytest.raises(UserError, match=r"\.metadata: is missing; use another checkpoint"):
        checked_index(tmp_path)
