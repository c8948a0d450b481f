"""Reads pickled tensors of PyTorch under an allow-list, memory-mapped and checked before they are opened.

A ``.pt`` file is a ZIP archive with a pickle and one uncompressed entry per tensor, or, when old, a bare
pickle.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esm2mega.checkpoint.digests import unreadable
from esm2mega.checkpoint.zip_crc import check_crcs, is_zip
from esm2mega.convert.files import foreign
from esm2mega.errors import UserError

_STATE_KEYS = ("model", "state_dict", "model_state_dict")
"""Under one of these, programs store the state dict beside optimizer and settings."""

_GLOBAL = re.compile(r"GLOBAL (\S+)")


def load_pickle(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """Read a file of ``torch.save`` that may hold tensors, plain values and instances of `allowed`.

    The entries of `allowed` are classes, or pairs of a function and the name that the pickle has for it.

    Raises:
        UserError: The file asks for anything else, is not an archive as PyTorch writes it, or is damaged.
    """
    if not path.is_file():
        what = "a directory, not a file of PyTorch" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}")
    zipped = is_zip(path)
    if zipped:
        _check_archive(path)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        reason = (
            f"it would load {found[1]}" if found else "its pickle holds more than tensors and plain values"
        )
        if (name := foreign.named_by_tensors(dict.fromkeys(_strings(path), ()))) is not None:
            raise UserError(f"{foreign.refusal(path, name)} ({reason})") from error
        raise UserError(
            f"{path}: refused: {reason}; only tensors and plain values are read, as torch.save writes a "
            "state_dict()"
        ) from error
    except MemoryError as error:
        raise UserError(f"{path}: refused: asks for more memory than there is") from error
    except Exception as error:
        # Damaged bytes make a pickle ask for anything: absent attributes, impossible sizes.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable file of PyTorch ({reason})") from error
    _check_tensors(path, content)
    return content


def _strings(path: Path) -> set[str]:
    """Return the strings in the pickle of an archive, such as names of tensors, without loading anything."""
    if not is_zip(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        member = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        content = b"" if member is None else archive.read(member)
    found: set[str] = set()
    # Of a damaged pickle, what stands before the damage.
    with contextlib.suppress(Exception):
        for _, value, _ in pickletools.genops(content):
            if isinstance(value, str):
                found.add(value)
    return found


def state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """Return the tensors of a file that is a state dict, or holds one among other entries.

    Raises:
        UserError: It holds none.
    """
    if isinstance(content, Mapping):
        inside = (content.get(key) for key in _STATE_KEYS)
        content = next((state for state in inside if isinstance(state, Mapping)), content)
    return flat_tensors(path, content)


def numpy_states() -> list[Any]:
    """Return what numpy arrays of plain numbers are made of, as in states of random generators."""
    make = np.zeros(1).__reduce__()[0]
    return [
        (make, "numpy.core.multiarray._reconstruct"),
        (make, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(name)) for name in ("uint8", "uint32", "uint64", "int64", "float64")),
    ]


def _check_archive(path: Path) -> None:
    """Refuse an archive unless its entries are as PyTorch writes them: uncompressed, in the file, and whole.

    PyTorch itself reads an entry that was changed after it was written, whatever its CRC says.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{path}: not a readable file of PyTorch ({error})") from error
    for entry in entries:
        name = PurePosixPath(entry.filename)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{path}: refused: its entry {entry.filename!r} points outside the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(f"{path}: refused: its entry {entry.filename!r} is compressed")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{path}: refused: its entries claim more bytes than the file has")
    try:
        check_crcs(path, entries)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise UserError(
            f"{path}: is damaged: {error}; copy the file again from where it came from"
        ) from error


def _check_tensors(path: Path, content: Any) -> None:
    """Refuse a tensor that is larger than its stored data (a stride of 0 makes a huge one of nothing)."""
    if isinstance(content, dict):
        for value in content.values():
            _check_tensors(path, value)
    elif isinstance(content, Tensor) and content.layout == torch.strided:
        if content.numel() * content.element_size() > content.untyped_storage().nbytes():
            raise UserError(f"{path}: refused: holds a tensor larger than its data")
    elif isinstance(content, Tensor):
        raise UserError(f"{path}: refused: holds a sparse tensor; only dense ones are read")


def save_pickle(path: Path, content: Any) -> None:
    """Write `content` with ``torch.save``, flushed to the disk."""
    with path.open("wb") as file:
        torch.save(content, file)


def flat_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """Return `content` as a state dict of names to tensors, without its ``None`` entries.

    Raises:
        UserError: It holds anything else.
    """
    with contextlib.suppress(AttributeError):
        entries = {name: value for name, value in content.items() if value is not None}
        if all(isinstance(n, str) and isinstance(v, Tensor) for n, v in entries.items()):
            return entries
    raise UserError(f"{path}: not a state dict of tensors")
