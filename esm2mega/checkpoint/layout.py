"""Names the directories of checkpoints, finds the complete ones, and reads what they say about themselves.

This module deals with files, not with tensors.

``RUN_DIR/checkpoints/step_00000010/`` holds ``model/`` (Megatron-Core's distributed format), ``config.yaml``
(the run's configuration and its tokenizer), ``train_state.json``, ``digests.json`` and, written last,
``COMPLETE``. While it is being written the directory has another name; without ``COMPLETE`` it is none.
"""

from __future__ import annotations

import re
import shutil
import stat
from pathlib import Path
from typing import Any

import yaml

from esm2mega.checkpoint.digests import (
    ABSENT,
    COMPLETE,
    CURE,
    STATE,
    Entries,
    has_digests,
    read_small,
    unreadable,
    write_digests,
)
from esm2mega.config.load import run_from_yaml
from esm2mega.config.resolved import save_resolved
from esm2mega.config.scalars import read_yaml
from esm2mega.config.schema import Run
from esm2mega.errors import DamagedError, MachineError, UserError
from esm2mega.files import json_sha256, parse_json, sync_tree, write_json
from esm2mega.version import __version__
from esm2mega.vocabulary import TOKENIZER_HASH, VOCAB

FORMAT_VERSION = 1
MODEL = "model"
CONFIG = "config.yaml"
_CHECKSUM = "sha256"
DATA_SETS = "data_sets"
"""Names the entry of ``train_state.json`` with the proteins of a run, see `esm2mega.train.session`."""
_ENTRIES = ("esm2mega_version", "step", "valid_loss", "data")
"""These entries are in every ``train_state.json``; a training that resumes looks up what else it needs."""

_DAMAGED = ".damaged"
_NAME = re.compile(r"step_(\d{8})")


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Return the directory in which a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def step_dir(run_dir: str | Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` optimizer steps."""
    return checkpoints_dir(run_dir) / f"step_{step:08d}"


def step_of(directory: Path) -> int:
    """Return the number of optimizer steps after which a ``step_XXXXXXXX`` directory was saved."""
    return int(directory.name.removeprefix("step_"))


def partial_dir(directory: Path) -> Path:
    """Return the path under which a checkpoint is written before it gets its final name."""
    return directory.with_name(f"{directory.name}.partial")


def is_complete(directory: Path) -> bool:
    """Tell whether the checkpoint was written to its end.

    Raises:
        MachineError: The directory cannot be read, which does not mean that there is none.
    """
    path = directory / COMPLETE
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if isinstance(error, ABSENT):
            return False
        raise unreadable(path, error) from error


def is_checkpoint_name(directory: Path) -> bool:
    """Tell whether a directory is named as a checkpoint is, be it complete or not."""
    return _NAME.fullmatch(directory.name) is not None


def find_checkpoints(run_dir: str | Path) -> tuple[list[Path], list[Path]]:
    """Return the complete checkpoints of a run, oldest first, and the directories of incomplete ones."""
    folder = checkpoints_dir(run_dir)
    named = sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []
    return [p for p in named if is_complete(p)], [p for p in named if not is_complete(p)]


def write_description(directory: Path, run: Run, state: dict[str, Any]) -> None:
    """Write ``config.yaml`` and ``train_state.json`` into a checkpoint that is being written."""
    config = directory / CONFIG
    save_resolved(run, config)
    tokenizer = {"tokenizer": {"hash": TOKENIZER_HASH, "vocabulary": list(VOCAB)}}
    with config.open("a") as file:
        file.write(yaml.safe_dump(tokenizer, default_flow_style=None))
    write_state(directory, state)


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write ``train_state.json``; that of a finished checkpoint is replaced in one step."""
    content = {"format_version": FORMAT_VERSION, "esm2mega_version": __version__, **state}
    write_json(checkpoint / STATE, {**content, _CHECKSUM: json_sha256(content)})


def complete(partial: Path, directory: Path, entries: Entries | None = None) -> None:
    """Mark a written checkpoint as complete, flush it to the disk and give it its name.

    `files.appearing` is for one process; here many write, and a checkpoint of the same step is replaced.

    Args:
        partial: Directory of the written files.
        directory: Its name as a checkpoint.
        entries: Digests of the files that other processes have digested, as for `write_digests`.
    """
    write_digests(partial, entries)
    sync_tree(partial)
    if directory.exists() or directory.is_symlink():
        remove(directory)
    partial.rename(directory)


def remove(directory: Path) -> None:
    """Remove a checkpoint; of one that was moved away and linked, the link.

    A kill meanwhile leaves an incomplete checkpoint, not a complete one with missing files.
    """
    if directory.is_symlink():
        directory.unlink()
        return
    (directory / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(directory)


def set_aside(directory: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for one, and return its new path.

    Raises:
        MachineError: It cannot be renamed.
    """
    name = f"{directory.name}{_DAMAGED}"
    taken = {path.name for path in directory.parent.iterdir()}
    names = (name, *(f"{name}.{number}" for number in range(1, len(taken) + 2)))
    aside = directory.with_name(next(free for free in names if free not in taken))
    try:
        return directory.rename(aside)
    except OSError as error:
        reason = error.strerror or error
        raise MachineError(
            f"{directory}: is damaged, and cannot be renamed to {aside.name}: {reason}"
        ) from error


def find_set_aside(run_dir: str | Path) -> list[Path]:
    """Return the damaged checkpoints of a run that `set_aside` renamed."""
    return sorted(checkpoints_dir(run_dir).glob(f"step_*{_DAMAGED}*"))


def read_config(checkpoint: Path) -> Run:
    """Return the configuration of the run that wrote the checkpoint.

    Raises:
        DamagedError: The file is missing, or no configuration.
        MachineError: It cannot be read.
        UserError: The checkpoint was made with another tokenizer.
    """
    path = checkpoint / CONFIG
    text = read_small(path)
    try:
        content, _ = read_yaml(text.decode())
        tokenizer_hash = content.get("tokenizer", {}).get("hash")
    except (ValueError, RecursionError, yaml.YAMLError, AttributeError) as error:
        raise DamagedError(path, f"is damaged ({str(error).splitlines()[0]})", CURE) from error
    if tokenizer_hash != TOKENIZER_HASH:
        raise UserError(
            f"{path}: made with another tokenizer ({tokenizer_hash}); this version has {TOKENIZER_HASH}; "
            "use the esm2mega that wrote it"
        )
    return run_from_yaml(path, ignore=("tokenizer",))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of ``train_state.json``.

    Raises:
        DamagedError: The file is missing, or does not agree with the checksum in it.
        MachineError: It cannot be read.
        UserError: This code does not know its format version.
    """
    path = checkpoint / STATE
    content = read_small(path)
    try:
        state = dict(parse_json(content))
        recorded = state.pop(_CHECKSUM, None)
        version = state["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(path, f"is damaged ({error})", CURE) from error
    if recorded != json_sha256(state) and (recorded is not None or has_digests(checkpoint)):
        raise DamagedError(
            path, f"is damaged: its content does not have the checksum {_CHECKSUM} in it", CURE
        )
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, this esm2mega reads {FORMAT_VERSION}; "
            "use the esm2mega that wrote it"
        )
    return state


def check_state(checkpoint: Path) -> None:
    """Read ``train_state.json`` as `read_state` does, and refuse one without what every checkpoint says.

    Raises:
        DamagedError: An entry is absent, too.
    """
    state = read_state(checkpoint)
    if absent := [name for name in _ENTRIES if name not in state]:
        raise DamagedError(checkpoint / STATE, f"is damaged: it has no entry {absent[0]!r}", CURE)
