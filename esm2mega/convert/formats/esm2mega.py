"""Reads and writes our own format, a checkpoint directory, without a model, process group or GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.auxiliary import AUXILIARY, write_auxiliary
from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.checkpoint.digests import write_digests
from esm2mega.checkpoint.tensor_filter import TASK_HEAD
from esm2mega.config.load import load_run
from esm2mega.config.presets import PRESETS, shape_of
from esm2mega.config.scalars import as_word
from esm2mega.config.schema import DataConfig, Run, TaskConfig
from esm2mega.convert.files.distributed_writer import write_distributed
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.files.stores import DistributedStore, JoinedStore, SafetensorsStore
from esm2mega.convert.heads.user_code import recorded_code
from esm2mega.convert.lazy_weights import Description, HeadDescription, Weights
from esm2mega.convert.name_table import (
    BODY,
    CONTACT_HEAD,
    FINAL_NORM,
    FREQUENCIES,
    OUTPUT_BIAS,
    POOLER,
    POSITIONS,
    TABLE,
    NameTable,
    Shape,
    TableRow,
    padded_vocabulary,
)
from esm2mega.convert.reading import from_store
from esm2mega.convert.writing import OutputReader, outputs
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.model.build import DTYPES
from esm2mega.model.esm2 import padded_vocab_size

IS_DIRECTORY = True
FAMILIES = ("esm2", "proteinbert_preln", "proteinbert_postln")


def _kept(prefix: str) -> TableRow:
    """Return the row of tensors in ``auxiliary.safetensors``, which most checkpoints do not have."""
    return TableRow(prefix + "{p}", prefix + "{p}", optional=True)


# Zeros suffice for the bias too, since the model cuts off the logits of padding before any softmax.
_PADDED = padded_vocabulary(padded_vocab_size(1))
_COMMON = (
    TableRow(TABLE, TABLE, _PADDED),
    *(TableRow(name, name) for name in BODY),
    TableRow(OUTPUT_BIAS, OUTPUT_BIAS, _PADDED),
)
NAMES = NameTable((*_COMMON, TableRow(FREQUENCIES, FREQUENCIES), _kept(CONTACT_HEAD)))
BERT_NAMES = NameTable((*_COMMON, TableRow(POSITIONS, POSITIONS), _kept(POOLER)))


def matches(source: SourceFiles) -> bool:
    """Tell whether this is the directory of a checkpoint or of a run."""
    path = source.path
    names = (layout.COMPLETE, layout.MODEL, "checkpoints")
    is_run = path.name == "checkpoints" or any((path / name).exists() for name in names)
    return path.is_dir() and (is_run or re.fullmatch(r"step_\d{8}", path.name) is not None)


def read(source: SourceFiles, drop: Sequence[str] = (), partial: bool = False) -> Weights:
    """Read a checkpoint, or the one that a run means, without its optimizer.

    Commands have it verified before, where they find their source.
    """
    checkpoint = choose_checkpoint(source.path).path
    run, state = layout.read_config(checkpoint), layout.read_state(checkpoint)
    return read_checkpoint(checkpoint, run, state, drop, partial)


def refuse_adapters(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without the weights under its adapters where whole ones are needed.

    Args:
        checkpoint: Directory of the checkpoint.
        state: Content of its ``train_state.json``.

    Raises:
        UserError: The checkpoint holds adapters and not the weights under them.
    """
    if "base" in state:
        raise UserError(
            f"{checkpoint}: holds adapters and not the weights under them; make a whole checkpoint with "
            f"`esm2mega lora merge {checkpoint} --out DIR`"
        )


def task_head(
    task: TaskConfig, state: Mapping[str, Any], shapes: Mapping[str, Shape], location: Path
) -> HeadDescription | None:
    """Describe the head of a task, or return None if the head is that of masked language modelling.

    Args:
        task: Section ``task`` of the checkpoint's configuration.
        state: Content of its ``train_state.json``.
        shapes: Shapes of the head's tensors where they are known, else empty.
        location: The checkpoint, for messages.
    """
    if task.kind is None:
        return None
    return HeadDescription(task, TargetInfo.from_dict(state["task"]), shapes, recorded_code(state, location))


def read_checkpoint(
    checkpoint: Path,
    run: Run,
    state: Mapping[str, Any],
    drop: Sequence[str] = (),
    partial: bool = False,
) -> Weights:
    """Read the tensors of a checkpoint whose other files have been read.

    Args:
        checkpoint: Directory of a complete checkpoint.
        run: Its configuration.
        state: Content of its ``train_state.json``.
        drop: As for `read`.
        partial: As for `from_store`.

    Raises:
        UserError: The checkpoint holds adapters, or tensors that do not fit.
    """
    refuse_adapters(checkpoint, state)
    model = run.model
    description = Description(
        shape_of(model),
        model.layernorm_epsilon,
        model.activation,
        family=model.family,
        final_layernorm=model.final_layernorm,
        max_positions=model.max_positions,
    )
    auxiliary = checkpoint / AUXILIARY
    extra = [SafetensorsStore(auxiliary, [auxiliary])] if auxiliary.exists() else []
    store = JoinedStore(checkpoint, [DistributedStore(checkpoint, layout.MODEL), *extra])
    shapes = {name: i.shape for name, i in store.infos.items() if name.startswith(TASK_HEAD)}
    if (head := task_head(run.task, state, shapes, checkpoint)) is not None:
        description = replace(description, head=head)
    return from_store(store, _names(description), description, drop=drop, partial=partial)


def _names(description: Description) -> NameTable:
    table = NAMES if description.family == "esm2" else BERT_NAMES
    if not description.final_layernorm:
        # A model that does not apply it has none, unless it was kept from another format.
        kept = _kept(FINAL_NORM)
        table = NameTable(tuple(kept if row.ours == kept.ours else row for row in table.rows))
    if (head := description.task) is None:
        return table
    return table.with_head([TableRow(name, name) for name in head.shapes])


def write(weights: Weights, path: Path, run: Run | None = None) -> None:
    """Write a checkpoint of step 0 without optimizer into the directory `path`.

    Args:
        weights: A model with a head.
        path: An existing, empty directory.
        run: Configuration to write; None for one made of the model's description and defaults.

    Raises:
        UserError: The model has no head.
    """
    if weights.description.head is None:
        raise UserError(
            "an esm2mega checkpoint has a head, this model has none; start a fine-tuning from it directly, "
            "with `esm2mega finetune init_from=SRC`"
        )
    run = run or run_of(weights.description)
    planned = outputs(weights, _names(weights.description))
    parts = OutputReader(weights, planned)
    kept = is_auxiliary(weights.description)
    auxiliary = [name for name in planned if kept(name)]
    model = {name: output.info for name, output in planned.items() if name not in auxiliary}
    write_distributed(path / layout.MODEL, model, parts, weights.description.shape.num_layers)
    write_auxiliary(path, {name: parts(name).clone() for name in auxiliary})
    layout.write_description(path, run, _state(weights))
    write_digests(path)


def is_auxiliary(description: Description) -> Callable[[str], bool]:
    """Return a test for the names of tensors that are kept beside a model of this kind."""
    always = (CONTACT_HEAD, POOLER)
    prefixes = always if description.final_layernorm else (*always, FINAL_NORM)
    return lambda name: name.startswith(prefixes)


def run_of(description: Description) -> Run:
    """Return the configuration of a checkpoint that no run wrote: the model, the task, and defaults.

    Raises:
        UserError: The weights have a dtype that this package does not compute in.
    """
    precisions = {dtype: name for name, dtype in DTYPES.items()}
    if description.dtype not in precisions:
        raise UserError(
            f"weights of {description.dtype} have no place in an esm2mega checkpoint; "
            "`esm2mega convert --dtype fp32` makes it of them"
        )
    shape = description.shape
    is_esm2 = description.family == "esm2"
    size = next((name for name, preset in PRESETS.items() if preset == shape and is_esm2), None)
    settings: dict[str, Any] = {
        "model.size": size,
        **{f"model.{key}": value for key, value in shape._asdict().items()},
        "model.precision": precisions[description.dtype],
        "model.layernorm_epsilon": description.layernorm_epsilon,
        "model.activation": description.activation,
        "model.family": description.family,
        "model.final_layernorm": description.final_layernorm,
        "model.max_positions": description.max_positions,
        # The default warm-up is for a long pretraining, and exceeds the default number of steps.
        "schedule.warmup_steps": 0,
    }
    if description.max_positions is not None:
        settings["data.max_seq_length"] = min(DataConfig().max_seq_length, description.max_positions)
    run = load_run(None, [as_word(key, value) for key, value in settings.items()])
    if (head := description.task) is not None:
        run.task = head.task
    return run


def default_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of `dtype` are stored by default: fp16 becomes fp32, exactly."""
    return dtype if dtype in DTYPES.values() and dtype != torch.float16 else torch.float32


def _state(weights: Weights) -> dict[str, Any]:
    """Return the content of ``train_state.json`` for weights that no run trained, with nothing to resume."""
    head = weights.description.task
    return {
        "step": 0,
        "valid_loss": None,
        "loop": None,
        "data": None,
        "schedule": None,
        "token_counts": None,
        "origin": {**weights.origin, **asdict(weights.notes)},
        **({} if head is None else {"task": head.info.to_dict()}),
        **({} if head is None or head.code is None else head.code.as_state()),
    }
