"""Writes resolved configurations as YAML, which `esm2mega.config.load.run_from_yaml` reads back."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from omegaconf import OmegaConf

from esm2mega.config.batches import derived_keys
from esm2mega.config.scalars import each_text, escaped
from esm2mega.config.schema import Run
from esm2mega.files import replacing
from esm2mega.version import __version__

FIRST_WORDS = "# Resolved configuration, written by esm2mega"
"""Begins every file that `save_resolved` writes."""


def save_resolved(run: Run, path: str | os.PathLike[str]) -> None:
    """Write YAML that `run_from_yaml` reads back to an equal `Run`; `path` is replaced in one step."""
    with replacing(Path(path)) as partial:
        partial.write_text(resolved_text(run), encoding="utf-8")


def resolved_text(run: Run) -> str:
    """Return what `save_resolved` writes."""
    content = each_text(dataclasses.asdict(run), escaped)
    for key in derived_keys(run.train):
        section, _, name = key.partition(".")
        del content[section][name]
    return f"{FIRST_WORDS} {__version__}.\n{OmegaConf.to_yaml(OmegaConf.create(content))}"
