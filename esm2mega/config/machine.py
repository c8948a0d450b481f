"""Takes out of a checkpoint's configuration what the machine that reads it decides, and not its writer."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from esm2mega.config.schema import DataConfig, LoggingConfig, ModelConfig, ParallelConfig, Run


def on_this_machine(run: Run) -> Run:
    """Return the configuration of a checkpoint as far as it holds on the machine that reads it.

    Wherever the checkpoint comes from, it chooses no file or directory here, be it to read or to write, no
    tracker, no number of loading processes, no part of a file (`data.limit`), no numbering of its residues
    (`data.first_residue`), no waiting time, and no kernels: these keys have their defaults, which the
    settings of this start replace. What decides the numbers of the model stays. The parallel layout stays as
    well, for `esm2mega.train.evaluate.adapt_layout` to adapt.

    Args:
        run: Configuration that the checkpoint holds.
    """
    run = copy.deepcopy(run)
    _forget_paths(run)
    run.logging = LoggingConfig()
    run.data.workers = DataConfig.workers
    run.data.limit = DataConfig.limit
    run.data.first_residue = DataConfig.first_residue
    run.parallel.timeout_minutes = ParallelConfig.timeout_minutes
    for key in ("layer_spec", "attention_backend", "recompute", "compile", "fp8", "fp8_recipe"):
        setattr(run.model, key, getattr(ModelConfig, key))
    return run


def _forget_paths(section: Any) -> None:
    """Give each path of a section, and of the sections in it, its default, in place."""
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            _forget_paths(value)
        elif entry.metadata.get("is_path"):
            factory = entry.default_factory
            default = entry.default if factory is dataclasses.MISSING else factory()
            setattr(section, entry.name, default)
