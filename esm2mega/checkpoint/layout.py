"""Names the directories of checkpoints, finds the complete ones, and reads what they say about themselves.

This module deals with files, not with tensors.

``RUN_DIR/checkpoints/step_00000010/`` holds ``model/`` (Megatron-Core's distributed format), ``config.yaml``
(the run's configuration and its tokenizer), ``train_state.json`` and, written last, ``COMPLETE``. While it is
being written the directory has another name; a directory without ``COMPLETE`` is not a checkpoint.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from esm2mega.checkpoint.digests import Entries, write_digests
from esm2mega.config.load import run_from_yaml, save_resolved
from esm2mega.config.scalars import read_yaml
from esm2mega.config.schema import Run
from esm2mega.errors import UserError
from esm2mega.files import parse_json, sync_tree, write_json
from esm2mega.version import __version__
from esm2mega.vocabulary import TOKENIZER_HASH, VOCAB

FORMAT_VERSION = 1
MODEL = "model"
CONFIG = "config.yaml"
STATE = "train_state.json"
COMPLETE = "COMPLETE"
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
    """Tell whether the checkpoint was written to its end."""
    return (directory / COMPLETE).is_file()


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
    header = {"format_version": FORMAT_VERSION, "esm2mega_version": __version__}
    write_json(checkpoint / STATE, {**header, **state})


def complete(partial: Path, directory: Path, entries: Entries | None = None) -> None:
    """Mark a written checkpoint as complete, flush it to the disk and give it its name.

    `files.appearing` is for one process; here many write, and a checkpoint of the same step is replaced.

    Args:
        partial: Directory of the written files.
        directory: Its name as a checkpoint.
        entries: Digests of the files that other processes have digested, as for `write_digests`.
    """
    write_digests(partial, entries or {})
    sync_tree(partial)
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def read_config(checkpoint: Path) -> Run:
    """Return the configuration of the run that wrote the checkpoint.

    Raises:
        UserError: The file is missing or unreadable, or the checkpoint was made with another tokenizer.
    """
    path = checkpoint / CONFIG
    try:
        content, _ = read_yaml(path.read_text(encoding="utf-8"))
        tokenizer_hash = content.get("tokenizer", {}).get("hash")
    except (OSError, ValueError, RecursionError, yaml.YAMLError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read: {str(error).splitlines()[0]}; the checkpoint is damaged"
        ) from error
    if tokenizer_hash != TOKENIZER_HASH:
        raise UserError(
            f"{path}: made with another tokenizer ({tokenizer_hash}); this version has {TOKENIZER_HASH}; "
            "use the esm2mega that wrote it"
        )
    return run_from_yaml(path, ignore=("tokenizer",))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of ``train_state.json``; a format version unknown to this code is an error."""
    path = checkpoint / STATE
    try:
        state = parse_json(path.read_text())
        version = state["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); the checkpoint is damaged, use an earlier one"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, this esm2mega reads {FORMAT_VERSION}; "
            "use the esm2mega that wrote it"
        )
    return state
