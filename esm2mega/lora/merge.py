"""Merges adapters into the weights under them, tensor by tensor, and writes an ordinary checkpoint."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.config.lora import LINEARS, LM_HEAD
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import FinetuneConfig, LoRAConfig, Run
from esm2mega.convert.files.distributed_writer import stacked_name
from esm2mega.convert.finite import counted, note_not_finite
from esm2mega.convert.formats import esm2mega as own_format
from esm2mega.convert.formats.esm2mega import default_dtype
from esm2mega.convert.history import TRAINING, as_record, history_of
from esm2mega.convert.lazy_weights import HeadDescription, Weights, dtype_name
from esm2mega.convert.start_point import StartPoint, read_checkpoint, read_start
from esm2mega.convert.tensors import fuse_qkv, split_qkv
from esm2mega.files import appearing, refuse_existing
from esm2mega.lora.base import check_base, identify, with_base
from esm2mega.lora.checkpoint import AdapterReader, Factors
from esm2mega.model.build import DTYPES

_WEIGHT = re.compile(r"encoder\.layers\.(\d+)\.(?:self_attention|mlp)\.(linear_\w+)\.weight")


def merge(checkpoint: str | Path, target: Path, base: str | None = None) -> list[str]:
    """Write `target`, a checkpoint of the whole model with the adapters of `checkpoint` merged into it.

    It has the head of the task if `checkpoint` has one.

    Args:
        checkpoint: A checkpoint of adapters, or the directory of a run with one.
        target: Directory to make; it must not exist, and appears when it is complete.
        base: Where the weights under the adapters are; None for where they were in training.

    Returns:
        Lines of a report for the user.

    Raises:
        UserError: The base is missing or has other weights, or `target` exists.
    """
    refuse_existing(target)
    start = read_checkpoint(checkpoint)
    adapters = AdapterReader(start)
    cure = "say where it is with --base PATH"
    under = read_start(base) if base is not None else with_base(start, None, cure=cure).base
    assert under is not None
    check_base(start, identify(under))
    weights = _merged_with_head(under.weights, adapters)
    weights.origin |= {"format": "merged adapters", "path": str(start.path)}
    if (history := history_of(start.path)) is not None:
        weights.origin[TRAINING] = as_record(replace(history, adapters="merged"))
    head = adapters.head()
    run = None if head is None else _merged_run(start.run, weights)
    weights, finite = counted(weights)
    with appearing(target) as directory:
        own_format.write(weights, directory, run)
    note_not_finite(weights, finite)
    count = sum(map(len, adapters.targets.values()))
    dtype = dtype_name(weights.description.dtype)
    return [
        f"{start.path}: {count} adapters merged into {under.path} -> {target}, {dtype}",
        *([f"head     {', '.join(head.shapes)}"] if head is not None and head.shapes else []),
        *([f"weights  {', '.join(adapters.of_base)}, trained beside"] if adapters.of_base else []),
        *weights.notes.lines(),
    ]


def whole_weights(start: StartPoint) -> Weights:
    """Return all weights of an open checkpoint; adapters are merged into those of the base that it came with.

    The base is not compared with the one of the training, which loading the model does.
    """
    if start.base is None:
        return start.weights
    return _merged_with_head(start.base.weights, AdapterReader(start))


def _merged_with_head(weights: Weights, adapters: AdapterReader) -> Weights:
    """Return `merged` weights with the head that was trained beside the adapters, if there is one."""
    head, weights = adapters.head(), merged(weights, adapters)
    return weights if head is None or not head.shapes else _with_head(weights, head, adapters)


def _with_head(weights: Weights, head: HeadDescription, adapters: AdapterReader) -> Weights:
    """Replace the head of the base by the head that was trained beside the adapters."""
    dtype, read = weights.description.dtype, weights.read
    description = replace(weights.description, head=head)
    encoder = description.shapes.keys() - head.shapes
    infos = {name: info for name, info in weights.infos.items() if name in encoder}
    if dropped := [name for name in weights.infos if name not in infos]:
        weights.notes.dropped.append(f"{', '.join(dropped)}: the head of the base")
    return replace(
        weights,
        description=description,
        infos=infos | {name: TensorInfo(shape, dtype) for name, shape in head.shapes.items()},
        read=lambda name: adapters.read_other(name).to(dtype) if name in head.shapes else read(name),
    )


def _merged_run(run: Run, weights: Weights) -> Run:
    """Return the configuration of a fine-tuned model whose adapters are merged into its weights."""
    run = copy.deepcopy(run)
    run.model.precision = next(name for name, dtype in DTYPES.items() if dtype == weights.description.dtype)
    run.lora, run.finetune, run.init_from = LoRAConfig(), FinetuneConfig(), None
    return run


def merged(weights: Weights, adapters: AdapterReader) -> Weights:
    """Return `weights` with the adapters added to their tensors when these are read.

    The dtype becomes the wider one of that of the weights and that of the training. The sum is computed in
    fp32 at least and rounded once.
    """
    trained = DTYPES[adapters.run.model.precision]
    weights = weights.cast(torch.promote_types(default_dtype(weights.description.dtype), trained))
    heads = shape_of(adapters.run.model).num_attention_heads
    infos: dict[str, TensorInfo] = weights.infos
    read, of_base = weights.read, set(adapters.of_base)

    def read_merged(name: str) -> Tensor:
        if (bias := adapters.read_bias(name)) is not None:
            return bias.to(infos[name].dtype)
        stacked, number = stacked_name(name)
        value = adapters.read_other(stacked, number) if stacked in of_base else read(name)
        value, found = value.to(infos[name].dtype), _WEIGHT.fullmatch(name)
        if name == f"{LM_HEAD.name}.weight":
            return _folded(value, adapters.read(LM_HEAD, 0), adapters.run.lora.scaling).to(infos[name].dtype)
        if found is None:
            return value
        layer = int(found[1])
        linears = [linear for linear in LINEARS if linear.fused == found[2]]
        parts = split_qkv(value, heads) if len(linears) > 1 else (value,)
        changed = [
            _folded(part, adapters.read(linear, layer), adapters.run.lora.scaling)
            for part, linear in zip(parts, linears, strict=True)
        ]
        result = fuse_qkv(changed[0], changed[1], changed[2], heads) if len(changed) > 1 else changed[0]
        return result.to(infos[name].dtype)

    return replace(weights, read=read_merged)


def _folded(weight: Tensor, factors: Factors | None, scaling: float) -> Tensor:
    """Return ``W + s B A``, or with a magnitude ``m (W + s B A) / |W + s B A|`` by rows, ``[o, i]``."""
    if factors is None:
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    result = weight.to(wide) + scaling * (factors.lora_B.to(wide) @ factors.lora_A.to(wide))
    if factors.magnitude is None:
        return result
    return result * (factors.magnitude.to(wide) / result.norm(dim=1)).unsqueeze(1)
