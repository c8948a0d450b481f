"""Compiles the package's C++ for the processor of this machine, and loads it.

A source is compiled once per processor, without anything of PyTorch, and kept in the cache of the user.
Without a C++ compiler the package uses PyTorch's own operations.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from esm2mega import processor
from esm2mega.errors import MachineError, UserError
from esm2mega.files import replacing, user_cache
from esm2mega.processes import end_with_parent

COMPILERS = ("g++", "clang++")

# Nothing reads errno or floating-point traps. The package does not link OpenMP itself: the name libgomp.so.1
# finds the one that PyTorch has loaded, whose threads are then shared.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC", "-shared"),
)

CONTRACTION = {"native_attention": "fast", "native_rotary": "off"}
"""Says whether a product and a sum may become one instruction, for each source."""

HEADER = "native_numbers.h"
"""Is what the sources have in common."""

SECONDS = 120.0
"""Limits how long compiling a source takes: 3 s on an idle machine."""

PREFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
"""Gives the first part of the names of a source's functions for each data type."""


class NotCompiledError(Exception):
    """Says in one line why there is no compiled code on this machine."""


def defect() -> str | None:
    """Return why compiled code cannot run here, or None if it can; the first call may compile for seconds."""
    try:
        for name in CONTRACTION:
            library(name)
    except NotCompiledError as error:
        return str(error)
    return None


def library(name: str) -> ctypes.CDLL:
    """Load a source of `CONTRACTION` for this processor, compiled now if it has not been.

    Of several processes one compiles, and the others wait for it.

    Raises:
        NotCompiledError: There is no compiler, or nothing that it made can be loaded.
    """
    found = _loaded(name)
    if isinstance(found, str):
        raise NotCompiledError(found)
    return found


@functools.cache
def _loaded(name: str) -> ctypes.CDLL | str:
    """Return the library, or why there is none, which is found out once."""
    try:
        return _load(name)
    except NotCompiledError as error:
        return str(error)


def _load(name: str) -> ctypes.CDLL:
    flags = (*FLAGS, f"-ffp-contract={CONTRACTION[name]}")
    source = Path(__file__).with_name(f"{name}.cpp")
    sources = (source.read_text(), source.with_name(HEADER).read_text())
    identity = "\0".join((*sources, *flags, processor.identity()))
    try:
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        path = user_cache() / "kernels" / f"{name}-{digest}.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with FileLock(f"{path}.lock", timeout=SECONDS):
                if not path.exists():
                    with replacing(path) as partial:
                        _compile(source, flags, partial)
        if path.stat().st_uid != os.geteuid():
            raise NotCompiledError(f"{path} belongs to another user; set XDG_CACHE_HOME to a folder of yours")
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            path.unlink()  # whoever comes next compiles it again
            raise
    except (MachineError, OSError, Timeout, UserError) as error:
        raise NotCompiledError(str(error)) from None


def call(name: str, function: str, tensors: Sequence[Tensor], *numbers: ctypes._SimpleCData) -> None:
    """Call ``<data type>_<function>`` of a library with pointers to tensors, then numbers, then the threads.

    The data type is that of the first tensor; the library reads and writes while the call lasts.
    """
    called = getattr(library(name), f"{PREFIXES[tensors[0].dtype]}_{function}")
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    called(*pointers, *numbers, ctypes.c_int(torch.get_num_threads()))


def operation(
    name: str, fake: Callable[..., Any], mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of CPU tensors the operation ``esm2mega::NAME`` of PyTorch.

    Calling what `torch.library.custom_op` makes would load PyTorch's compiler, which takes a second. Unlike
    that, an operation without a registered gradient passes none on, silently.

    Args:
        name: Name of the operation.
        fake: Takes the same arguments, and returns tensors of the shapes and data types of the results.
        mutates: Names of the arguments that the function writes to.
    """

    def define(function: Callable[..., Any]) -> Any:
        qualified = f"esm2mega::{name}"
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "cpu", function)
        torch.library.register_fake(qualified, fake)
        return getattr(torch.ops.esm2mega, name).default

    return define


def strides(tensors: Sequence[Tensor]) -> Tensor:
    """Return token and head strides, in elements, of tensors ``[T, n, d]``, one after the other: int64."""
    return torch.tensor([stride for x in tensors for stride in x.stride()[:2]])


def _compile(source: Path, flags: Sequence[str], target: Path) -> None:
    compiler = next((found for each in COMPILERS if (found := shutil.which(each))), None)
    if compiler is None:
        raise NotCompiledError(f"no C++ compiler ({' or '.join(COMPILERS)}) on the PATH")
    try:
        done = subprocess.run(
            [compiler, *flags, str(source), "-o", str(target)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            preexec_fn=end_with_parent,
        )
    except subprocess.TimeoutExpired:
        raise NotCompiledError(f"{compiler} took longer than {SECONDS:.0f} s") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise NotCompiledError(f"{compiler} failed: {said.strip()}")
