"""What a checkpoint's configuration says about machines counts on no other one."""

from __future__ import annotations

import dataclasses
from typing import Any

from esm2mega.config.machine import on_this_machine
from esm2mega.config.schema import LoggingConfig, Run, flatten, map_paths

PATHS = {
    *("run_dir", "init_from", "data.train", "data.valid", "data.test", "data.cache_dir", "data.wild_type"),
    *("checkpoint.resume", "task.label_file", "task.mask_file"),
}
OTHERS = {
    "logging.tensorboard": True,
    "logging.wandb": True,
    "logging.wandb_project": "theirs",
    "logging.wandb_run_name": "theirs",
    "logging.samples": True,
    "data.workers": 64,
    "data.limit": 3,
    "parallel.timeout_minutes": 1e9,
    "model.layer_spec": "te",
    "model.attention_backend": "flash",
    "model.recompute": "full",
    "model.compile": True,
    "model.fp8": "hybrid",
    "model.fp8_recipe": "mxfp8",
}


def _set(section: Any, key: str, value: Any) -> None:
    *names, last = key.split(".")
    for name in names:
        section = getattr(section, name)
    setattr(section, last, value)


def test_every_key_about_a_machine_has_its_default_and_no_other_has() -> None:
    run, defaults = Run(), flatten(Run())
    for key, value in {**dict.fromkeys(PATHS, "theirs"), **OTHERS}.items():
        _set(run, key, value)
    run.seed, run.data.max_seq_length, run.model.hidden_size = 7, 99, 24
    here = flatten(on_this_machine(run))
    assert {key for key in here if here[key] != defaults[key]} == {
        *("seed", "data.max_seq_length", "model.hidden_size")
    }
    assert run.run_dir == "theirs"  # what was read stays for the reader


def test_the_keys_are_all_there_are() -> None:
    """A new path or tracker comes into these lists, and its default must then be a place of the user's."""
    seen: set[str] = set()
    run = Run()
    for key in ("init_from", "data.train", "data.valid", "data.test", "data.cache_dir", "data.wild_type"):
        _set(run, key, "x")
    run.task.label_file = run.task.mask_file = "x"
    map_paths(run, lambda key, path: seen.add(key) or path)
    assert seen == PATHS
    logging = {f"logging.{field.name}" for field in dataclasses.fields(LoggingConfig)}
    assert logging <= OTHERS.keys()
