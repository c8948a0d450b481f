"""Saves and loads weights, optimizer and training state, at any parallel layout."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import CheckpointException

from esm2mega.checkpoint import common_state, layout
from esm2mega.checkpoint.digests import unreadable
from esm2mega.checkpoint.optimizer_state import (
    ask_for,
    begin_states,
    count_in_whole_steps,
    form_of_names,
    form_of_optimizer,
    ignored,
    make_loadable,
    place_count,
    separate_steps,
    translate,
)
from esm2mega.checkpoint.safe_index import checked_index
from esm2mega.checkpoint.tensor_filter import ALL, OPTIMIZER, TensorFilter, compare_tensors
from esm2mega.checkpoint.tensors import TensorReader, os_error_in
from esm2mega.errors import MachineError, UserError
from esm2mega.files import first_of
from esm2mega.parallel.errors import lost_peer

SHARDING = {
    # The only format of the distributed optimizer that every TP, PP and DP size can read.
    "distrib_optim_sharding_type": "fully_reshardable",
    # Its shards meet on one data-parallel rank over gloo, in host memory, not on every GPU.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}

# What the readers of Megatron-Core and PyTorch raise for absent or truncated files and for other shapes.
_UNREADABLE = (
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    CheckpointingException,
    CheckpointException,
)

DISK = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "Permission denied",
    "Not a directory",
    "Read-only file system",
)

_EXTRA_STATE = "_extra_state"
"""Names of byte objects of parallel linears end so. They are empty without FP8 and are read as pickles, so
they are neither written nor read.
"""

_SHOWN = 4
"""This many names of tensors are listed in an error."""

_SETTINGS = ("lr", "max_lr", "min_lr", "weight_decay", "betas", "eps", "fused")
"""A parameter group takes these values from the configuration of this start, not from the checkpoint."""


def reason_of(error: BaseException) -> str:
    """Return the system's own words for an error where there are any, else its first line."""
    if isinstance(error, CheckpointException) and error.failures:
        # The failures of all ranks are in there; the text of the exception may name no more than the ranks.
        return reason_of(next(iter(error.failures.values()))[0])
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    # PyTorch's writer of tensors describes a truncated write in the first way, and Megatron-Core 0.19 any
    # failure of its writing processes in the second.
    if "unexpected pos" in str(error) or "Worker failure" in str(error):
        return "a file could not be written whole: the disk is full, or the file reached a size limit"
    for known in DISK:
        if known in str(error):
            return known
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_training_state(
    checkpoint: Path, model: Sequence[Any], optimizer: MegatronOptimizer, tensor_filter: TensorFilter = ALL
) -> None:
    """Restore weights and optimizer in place, whatever layout wrote them.

    The checkpoint must hold every tensor that `tensor_filter` chooses, and no other.

    Raises:
        UserError: Tensors are missing, unexpected or unreadable.
    """
    make_loadable(optimizer)
    own, saved = form_of_optimizer(optimizer), form_of_names(TensorReader(checkpoint).index)
    request = sharded_state(model, optimizer, True, tensor_filter)
    ask_for(request["optimizer"], saved, own)
    loaded = _load(checkpoint, request, lambda name: not ignored(name, saved, own))
    # The weights first: main weights that the checkpoint lacks are views of them.
    _put_weights(model, loaded, tensor_filter)
    _load_optimizer(optimizer, translate(loaded["optimizer"], saved, own))


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    settings = [{key: group[key] for key in _SETTINGS if key in group} for group in optimizer.param_groups]
    _adopt_rates(state, optimizer)
    place_count(state, optimizer)
    optimizer.load_state_dict(state)
    for group, configured in zip(optimizer.param_groups, settings, strict=True):
        group.update(configured)
    separate_steps(optimizer)


def _adopt_rates(state: dict[str, Any], optimizer: MegatronOptimizer) -> None:
    """Give the loaded parameter groups the bounds of the learning rate of this start.

    Megatron-Core 0.19 matches loaded groups with its own by these bounds, and refuses groups without a match.
    """
    configured = {
        group["lr_mult"]: {key: group[key] for key in ("max_lr", "min_lr")}
        for group in optimizer.param_groups
    }
    for holder in (state, state.get("optimizer", {})):
        for group in holder.get("param_groups", []):
            rates = configured[group["lr_mult"]]
            group.update({key: value for key, value in rates.items() if key in group})


def load_weights(checkpoint: Path, model: Sequence[Any], tensor_filter: TensorFilter = ALL) -> list[str]:
    """Restore the weights alone, in place; tensors of the optimizer are not read.

    Args:
        checkpoint: A ``step_XXXXXXXX`` directory.
        model: The chunks of this rank.
        tensor_filter: Chooses the tensors to restore.

    Returns:
        What was not restored, a line each; empty unless `tensor_filter` is lenient.

    Raises:
        UserError: A weight is missing, or the checkpoint holds one that the model has no place for.
    """
    request, not_restored = sharded_state(model, None, True, tensor_filter), []
    if not tensor_filter.strict:
        shapes = {
            name: info.shape
            for name, info in TensorReader(checkpoint).index.items()
            if not name.startswith(OPTIMIZER)
        }
        entries = [entry for tensors in request.values() for entry in tensors.values()]
        report = compare_tensors(entries, shapes, tensor_filter, str(checkpoint))
        not_restored = report.lines()
        tensor_filter = report.narrowed(tensor_filter)
        request = sharded_state(model, None, True, tensor_filter)
    loaded = _load(
        checkpoint, request, lambda name: not name.startswith(OPTIMIZER) and not tensor_filter.unused(name)
    )
    _put_weights(model, loaded, tensor_filter)
    return not_restored


def _load(checkpoint: Path, request: dict[str, Any], matters: Callable[[str], bool]) -> dict[str, Any]:
    """Load the tensors of `request`; a missing tensor is an error, as is an unexpected one that `matters`."""
    model_dir = checkpoint / layout.MODEL
    index = checked_index(model_dir)
    try:
        # Megatron-Core takes the model's point of view: what it calls missing is in the checkpoint, and was
        # not requested.
        loaded, unexpected, missing = dist_checkpointing.load(
            request,
            str(model_dir),
            strict=StrictHandling.RETURN_ALL,
            **common_state.load_options(model_dir, index),
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{model_dir}: holds more than tensors and plain values; use an earlier checkpoint"
        ) from error
    except _UNREADABLE as error:
        if lost_peer(error) is not None:
            raise
        logging.getLogger(__name__).debug("loading %s failed", model_dir, exc_info=error)
        if isinstance(error, torch.OutOfMemoryError):
            raise MachineError(f"{model_dir}: cannot be read: {reason_of(error)}") from error
        if (cause := os_error_in(error)) is not None:
            raise unreadable(Path(cause.filename or model_dir), cause) from error
        raise UserError(f"{model_dir}: cannot be loaded into this model: {reason_of(error)}") from error
    unexpected = {name for name in unexpected if matters(name) and name != common_state.NAME}
    if missing or unexpected:
        raise UserError(
            f"{model_dir}: cannot be loaded into this model: missing {first_of(sorted(missing), _SHOWN)}, "
            f"unexpected {first_of(sorted(unexpected), _SHOWN)}"
        )
    return loaded


def _put_weights(model: Sequence[Any], loaded: dict[str, Any], tensor_filter: TensorFilter) -> None:
    for number, chunk in enumerate(unwrap_model(list(model))):
        result = chunk.load_state_dict(loaded[f"model{number}"], strict=False)
        kept = {
            name
            for name, entry in _sharded_tensors(chunk).items()
            if tensor_filter.excluded(entry.key, entry.data)
        }
        missing = [
            name for name in result.missing_keys if not name.endswith(_EXTRA_STATE) and name not in kept
        ]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


def _sharded_tensors(chunk: Any) -> dict[str, Any]:
    """Return Megatron-Core's descriptions of the tensors by their names in this chunk."""
    return {
        name: entry
        for name, entry in chunk.sharded_state_dict(metadata=dict(SHARDING)).items()
        if not name.endswith(_EXTRA_STATE)
    }


def sharded_state(
    model: Sequence[Any],
    optimizer: MegatronOptimizer | None,
    is_loading: bool,
    tensor_filter: TensorFilter = ALL,
) -> dict[str, Any]:
    """Return this rank's part of what is saved or asked for: a dictionary of tensors for each chunk.

    Args:
        model: The chunks of this rank.
        optimizer: Their optimizer, whose state is entered under ``optimizer``; None for none.
        is_loading: Whether the tensors are asked for. To save them, ranks may gather them: a collective.
        tensor_filter: Chooses the tensors of the model.
    """
    state: dict[str, Any] = {
        f"model{number}": {
            name: entry
            for name, entry in _sharded_tensors(chunk).items()
            if not tensor_filter.excluded(entry.key, entry.data)
        }
        for number, chunk in enumerate(unwrap_model(list(model)))
    }
    if optimizer is not None:
        begin_states(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=dict(SHARDING)
        )
        count_in_whole_steps(state["optimizer"])
        # Ranks that hold no part of a gathered state say None, which Megatron-Core warns of as a difference.
        if state["optimizer"].get("param_state", state) is None:
            del state["optimizer"]["param_state"]
    return state
