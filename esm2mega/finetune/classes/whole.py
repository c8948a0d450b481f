"""Builds the model of a configuration outside of a training, to look at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate
from esm2mega.convert.into_model import load_for_task
from esm2mega.finetune.user_code import GivenCode
from esm2mega.model.build import build_model
from esm2mega.model.heads import head_of_task
from esm2mega.model.heads.task import MakeModel
from esm2mega.parallel.initialize import process_groups
from esm2mega.train.start import load_run_with_start


def whole_model(settings: Sequence[str], code: GivenCode, make_model: MakeModel) -> Any:
    """Return this process's chunk of a model with its initial weights.

    Args:
        settings: The configuration, ``key=value``.
        code: The user's head; a configured one gets a single output.
        make_model: Makes the model.
    """
    run, start = load_run_with_start(None, settings)
    validate(run, world_size_from_environment())
    validate_task(run)
    make_head = code.make_head or head_of_task(run.task, 1)
    with process_groups(run.parallel, run.seed) as ranks:
        device = ranks.device
        chunks = build_model(run.model, run.parallel, device, run.seed, make_head, make_model=make_model)
        if start is not None:
            load_for_task(start, run, chunks)
    return chunks[0]
