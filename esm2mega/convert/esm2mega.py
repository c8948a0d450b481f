"""Our own format: a complete checkpoint directory, written without a model, a process group or a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.auxiliary import AUXILIARY, write_auxiliary
from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.checkpoint.writer import StackedTensor, write_weights
from esm2mega.config.load import load_run
from esm2mega.config.presets import PRESETS, shape_of
from esm2mega.config.schema import DataConfig, Run
from esm2mega.convert.classifiers import find_classifier, is_lm_head
from esm2mega.convert.mapping import (
    BODY,
    CLASSIFIER,
    CONTACT_HEAD,
    FINAL_NORM,
    FREQUENCIES,
    LAYER,
    LM_HEAD,
    OUTPUT_BIAS,
    PADDED_VOCABULARY,
    POOLER,
    POSITIONS,
    TABLE,
    NameTable,
    Row,
)
from esm2mega.convert.reading import from_store
from esm2mega.convert.stores import DistributedStore, JoinedStore, SafetensorsStore
from esm2mega.convert.weights import Description, Weights
from esm2mega.convert.writing import OutputReader, outputs
from esm2mega.errors import UserError
from esm2mega.model.build import DTYPES

IS_DIRECTORY = True
FAMILIES = ("esm2", "proteinbert_preln", "proteinbert_postln")


def _kept(prefix: str) -> Row:
    """Tensors in ``auxiliary.safetensors``, which most checkpoints do not have."""
    return Row(prefix + "{p}", prefix + "{p}", optional=True)


_COMMON = (
    Row(TABLE, TABLE, PADDED_VOCABULARY),
    *(Row(name, name) for name in BODY),
    Row(OUTPUT_BIAS, OUTPUT_BIAS, PADDED_VOCABULARY),
)
NAMES = NameTable((*_COMMON, Row(FREQUENCIES, FREQUENCIES), _kept(CONTACT_HEAD)))
BERT_NAMES = NameTable((*_COMMON, Row(POSITIONS, POSITIONS), _kept(POOLER)))


def matches(path: Path) -> bool:
    """Whether `path` is a checkpoint or a run."""
    names = (layout.COMPLETE, layout.MODEL, "checkpoints")
    is_run = path.name == "checkpoints" or any((path / name).exists() for name in names)
    return path.is_dir() and (is_run or re.fullmatch(r"step_\d{8}", path.name) is not None)


def read(path: Path, drop: Sequence[str] = ()) -> Weights:
    """Read a checkpoint, or the newest one of a run; not its optimizer."""
    checkpoint = layout.resolve_checkpoint(path)
    if "base" in layout.read_state(checkpoint):
        raise UserError(
            f"{checkpoint}: holds adapters and not the weights under them; make a whole checkpoint with "
            f"`esm2mega lora merge {checkpoint} --out DIR`"
        )
    model = layout.read_config(checkpoint).model
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
    if find_classifier(checkpoint, store.infos, {}, drop) is not None:
        settings = (layout.read_state(checkpoint).get("origin") or {}).get("classifier") or {}
        classifier = find_classifier(checkpoint, store.infos, settings, drop)
        description = replace(description, classifier=classifier)
    return from_store(store, _names(description), description, drop=drop)


def _names(description: Description) -> NameTable:
    table = NAMES if description.family == "esm2" else BERT_NAMES
    classifier = description.classifier
    return table if classifier is None else NameTable((*table.rows, *classifier.rows()))


def write(weights: Weights, path: Path) -> None:
    """Write a checkpoint of step 0 without optimizer into the directory `path`."""
    _write(weights, path, _names(weights.description), {})
    layout.write_description(path, run_of(weights.description), _state(weights))
    (path / layout.COMPLETE).write_text("")


def write_for_task(weights: Weights, path: Path, run: Run, head: Mapping[str, Tensor], info: Any) -> None:
    """The same for a model with the head of a task in the place of that of the language model.

    Args:
        weights: The model.
        path: Existing and empty.
        run: Configuration, with the task.
        head: Tensors of the head by their names in the model.
        info: What predictions mean, see `esm2mega.data.targets.TargetInfo.to_dict`.
    """
    weights.notes.dropped.append(f"{LM_HEAD}*, {OUTPUT_BIAS}: the head of masked language modelling")
    kept = {name: entry for name, entry in weights.infos.items() if not is_lm_head(name)}
    table = _names(weights.description)
    table = replace(table, rows=tuple(row for row in table.rows if not is_lm_head(row.ours)))
    dtype = weights.description.dtype
    _write(replace(weights, infos=kept), path, table, {name: value.to(dtype) for name, value in head.items()})
    layout.write_description(path, run, {**_state(weights), "task": info})
    (path / layout.COMPLETE).write_text("")


def _write(weights: Weights, path: Path, table: NameTable, head: Mapping[str, Tensor]) -> None:
    """Write all tensors."""
    wanted = outputs(weights, table)
    parts = OutputReader(weights, wanted)
    kept = is_auxiliary(weights.description)
    auxiliary = [name for name in wanted if kept(name)]
    whole: dict[str, StackedTensor] = {}
    for name, output in wanted.items():
        if name not in auxiliary:
            stacked, layer = stacked_name(name)
            layers = None if layer is None else weights.description.shape.num_layers
            shape = output.info.shape if layers is None else (layers, *output.info.shape)
            whole[stacked] = StackedTensor(TensorInfo(shape, output.info.dtype), layers)

    whole |= {name: StackedTensor(TensorInfo(tuple(v.shape), v.dtype), None) for name, v in head.items()}

    def read_chunk(name: str, layer: int | None) -> Tensor:
        if name in head:
            return head[name]
        return parts(name if layer is None else name.replace("encoder.layers.", LAYER.format(n=layer), 1))

    write_weights(path / layout.MODEL, whole, read_chunk)
    write_auxiliary(path, {name: parts(name).clone() for name in auxiliary})


def is_auxiliary(description: Description) -> Callable[[str], bool]:
    """Which tensors a model of this kind is not made of: they are kept beside it."""
    always = (CONTACT_HEAD, POOLER, CLASSIFIER)
    prefixes = always if description.final_layernorm else (*always, FINAL_NORM)
    return lambda name: name.startswith(prefixes)


def stacked_name(name: str) -> tuple[str, int | None]:
    """The stored name, and the layer that left it."""
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name)
    return (f"encoder.layers.{match[2]}", int(match[1])) if match else (name, None)


def run_of(description: Description) -> Run:
    """The configuration of a checkpoint that no run wrote: the model's section, and defaults.

    Raises:
        UserError: A dtype that this model does not compute in.
    """
    precisions = {dtype: name for name, dtype in DTYPES.items()}
    if description.dtype not in precisions:
        raise UserError(
            f"weights of {description.dtype} have no place in an esm2mega checkpoint; use --dtype fp32"
        )
    shape = description.shape
    is_esm2 = description.family == "esm2"
    size = next((name for name, preset in PRESETS.items() if preset == shape and is_esm2), None)
    settings: dict[str, Any] = {
        "model.size": "null" if size is None else size,
        **{f"model.{key}": value for key, value in shape._asdict().items()},
        "model.precision": precisions[description.dtype],
        "model.layernorm_epsilon": description.layernorm_epsilon,
        "model.activation": description.activation,
        "model.family": description.family,
        "model.final_layernorm": str(description.final_layernorm).lower(),
        "model.max_positions": "null" if description.max_positions is None else description.max_positions,
    }
    if description.max_positions is not None:
        settings["data.max_seq_length"] = min(DataConfig().max_seq_length, description.max_positions)
    return load_run(None, [f"{key}={value}" for key, value in settings.items()])


def default_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that weights of `dtype` are stored in unless told otherwise: fp16 becomes fp32, exactly."""
    return dtype if dtype in DTYPES.values() else torch.float32


def _state(weights: Weights) -> dict[str, Any]:
    """``train_state.json``: nothing has been trained here, so there is nothing to resume."""
    classifier = weights.description.classifier
    settings = {} if classifier is None else {"classifier": dict(classifier.settings)}
    return {
        "step": 0,
        "valid_loss": None,
        "loop": None,
        "data": None,
        "schedule": None,
        "token_counts": None,
        "origin": {**weights.origin, **asdict(weights.notes), **settings},
    }
