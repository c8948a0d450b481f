"""Converts adapters to and from a directory of PEFT: ``adapter_config.json`` and one safetensors file.

Names and keys are those of peft 0.13 to 0.21. Channels of q and k need no reordering: both sides rotate the
pairs ``(i, i + d/2)``.

Legend: ``r`` rank of the adapter, ``i`` and ``o`` inputs and outputs of a linear.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from esm2mega.checkpoint.finite import FiniteCheck
from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.config.lora import LINEARS, Linear, Targets, shortest_patterns
from esm2mega.config.presets import ModelShape, shape_of
from esm2mega.config.schema import LoRAConfig
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate_model
from esm2mega.convert.files.safetensors_writer import write_safetensors
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.files.stores import SafetensorsStore
from esm2mega.convert.formats.esm2mega import run_of
from esm2mega.convert.formats.registry import detect
from esm2mega.convert.heads.contact_head import is_contact_head
from esm2mega.convert.heads.hf_classifiers import dropout_of, find_equal, no_equal
from esm2mega.convert.lazy_weights import flag_from, number_from
from esm2mega.convert.start_point import StartPoint, read_checkpoint, read_start
from esm2mega.errors import UserError
from esm2mega.files import appearing, parse_json, refuse_existing
from esm2mega.lora.base import identify
from esm2mega.lora.checkpoint import AdapterReader, Factors, write_adapters
from esm2mega.lora.hf_head import (
    MODULE,
    PREFIX,
    TASK_TYPES,
    Meaning,
    described,
    has_meaning,
    to_ours,
    to_theirs,
    write_task,
)

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_THEIRS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
"""This table gives peft's name for each of our factors."""

_NAME = re.compile(
    r"base_model\.model\.(?:esm\.)?encoder\.layer\.(?P<layer>\d+)\.(?P<linear>[\w.]+?)\."
    r"(?P<factor>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)

_WITHOUT_EFFECT = {
    "alpha",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
"""These keys are read here, or say nothing that the tensors do not show."""

_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""These values of `init_lora_weights` leave the base as it is."""


def export_adapters(checkpoint: str | Path, target: Path) -> list[str]:
    """Write `target`, a directory that `peft` loads onto an ESM-2 of `transformers` with the same base.

    The head of a task is written too if transformers has an equal one.

    Args:
        checkpoint: A checkpoint of adapters, or the directory of a run with one.
        target: Directory to make; it must not exist, and appears when it is complete.

    Returns:
        Lines of a report for the user.

    Raises:
        UserError: `transformers` has no such model, or `target` exists.
    """
    refuse_existing(target)
    adapters = AdapterReader(read_checkpoint(checkpoint))
    checkpoint = adapters.start.path
    if adapters.run.model.family != "esm2":
        raise UserError(
            f"{checkpoint}: adapters of a model of family {adapters.run.model.family}, which transformers "
            "does not have; use esm2mega lora merge"
        )
    if adapters.of_base:
        raise UserError(
            f"{checkpoint}: {', '.join(adapters.of_base)} were trained beside the adapters, for which a "
            "directory of PEFT has no place; use esm2mega lora merge"
        )
    tensors: dict[str, Tensor] = {}
    for linear in LINEARS:
        for layer in adapters.targets.get(linear.name, ()):
            factors = adapters.read(linear, layer)
            assert factors is not None
            for name, value in factors.present().items():
                tensors[f"base_model.model.{_module(linear, layer)}.{_THEIRS[name]}"] = value
    head = adapters.head()
    architecture = None if head is None else find_equal(head)
    base = Path(adapters.base.path)
    is_theirs = base.exists() and detect(SourceFiles(base)) == "hf"
    config = _their_config(adapters, str(base) if is_theirs else None)
    report = [f"{checkpoint}: {sum(map(len, adapters.targets.values()))} adapters -> {target}"]
    if config["base_model_name_or_path"] is None:
        report.append(f"base     {base}; for transformers: esm2mega convert {base} DIR --to hf")
    if head is not None and architecture is None:
        if is_contact_head(head):
            dropped = (
                "adapters have no place for a contact head; esm2mega lora merge, then convert --to hf, has"
            )
        else:
            dropped = f"{no_equal(head)}; keep it with esm2mega lora merge"
        report.append(f"dropped: {', '.join(head.shapes)}: {dropped}")
    elif head is not None and architecture is not None:
        values = {name: adapters.read_other(name) for name in head.shapes}
        tensors |= to_theirs(architecture, values, head.info)
        config |= {"task_type": TASK_TYPES[architecture], "modules_to_save": [MODULE]}
        report.append(described(architecture, head.info))
    report += _not_finite(tensors)
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    with appearing(target) as directory:
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_safetensors(directory / TENSORS, infos, lambda name: tensors[name])
        if head is not None and architecture is not None:
            write_task(directory, head)
    return report


def _module(linear: Linear, layer: int) -> str:
    """Return the name of the linear in `EsmForMaskedLM` and the other models with a head."""
    return f"esm.encoder.layer.{layer}.{linear.hugging_face}"


def _their_config(adapters: AdapterReader, base: str | None) -> dict[str, Any]:
    lora = adapters.run.lora
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha or 0) else alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _their_targets(adapters.targets, shape_of(adapters.run.model).num_layers),
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _their_targets(targets: Targets, num_layers: int) -> list[str]:
    """Return ends of module names; ``output.dense`` would match two linears, so its layer is written too."""
    names = []
    for linear in LINEARS:
        layers = targets.get(linear.name, ())
        if len(layers) == num_layers and linear.name != "linear_fc2":
            names.append(linear.hugging_face)
        else:
            names += [f"encoder.layer.{layer}.{linear.hugging_face}" for layer in layers]
    return names


def import_adapters(
    source: Path, base: str, target: Path, drop: Sequence[str] = (), meaning: Meaning | None = None
) -> list[str]:
    """Write `target`, a checkpoint of the adapters in the PEFT directory `source`.

    Args:
        source: Directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: Checkpoint with the weights that the adapters were trained on, in any readable format.
        target: Directory to make; it must not exist, and appears when it is complete.
        drop: Shell patterns of tensors that are not adapters and are left out.
        meaning: Meaning of a classifier beside the adapters, for a directory that does not say it.

    Returns:
        Lines of a report for the user.

    Raises:
        UserError: `source` is not such a directory, holds something that has no place here, or does not fit
            the base; or `target` exists.
    """
    refuse_existing(target)
    config = _read_config(source / CONFIG)
    start = read_start(base)
    start.check_whole()
    run = run_of(start.weights.description)
    found = _read_tensors(source, shape_of(run.model), config, drop, has_meaning(source, meaning))
    if meaning is not None and not found.classifier:
        raise UserError(f"{source}: has no {MODULE} to be the head of task {meaning.kind}; leave --task out")
    run.lora = LoRAConfig(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=number_from(source / CONFIG, config, "lora_dropout", 0.0),
        target_modules=shortest_patterns(found.targets, shape_of(run.model).num_layers),
        use_rslora=flag_from(source / CONFIG, config, "use_rslora", False),
        use_dora=flag_from(source / CONFIG, config, "use_dora", False),
    )
    identity = identify(start)
    run.init_from = identity.path
    validate_model(run)
    nothing = dict.fromkeys(("valid_loss", "loop", "data", "schedule", "token_counts"))
    origin = {"format": "peft", "path": str(source), "dropped": found.dropped}
    state = {"step": 0, **nothing, "origin": origin}
    head: dict[str, Tensor] = {}
    if found.classifier:
        hidden_size, dropout = shape_of(run.model).hidden_size, dropout_of(start.path, _base_config(start))
        head, run.task, info = to_ours(source, found.classifier, hidden_size, dropout, meaning)
        run.finetune.mode = "lora"
        # The head of transformers reads <cls>, which only this way of cropping keeps.
        run.data.crop = "start"
        validate_task(run)
        state["task"] = info.to_dict()
    with appearing(target) as directory:
        write_adapters(directory, run, identity, found.factors, state, head)
    return [
        f"{source}: {len(found.factors)} adapters of rank {run.lora.rank} -> {target}, on {identity.path}",
        *([f"head     {', '.join(head)}"] if head else []),
        *(f"dropped: {name}" for name in found.dropped),
        *_not_finite(
            head
            | {
                f"encoder.layers.{layer}.{name}.{factor}": value
                for (name, layer), factors in found.factors.items()
                for factor, value in factors.present().items()
            }
        ),
    ]


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a line about the values that are not finite, if there are any, which are written as they are."""
    finite = FiniteCheck()
    for name, value in tensors.items():
        finite.add(name, value)
    return [f"kept:    {finite.words()}"] if finite else []


def _base_config(base: StartPoint) -> dict[str, Any]:
    """Return ``config.json`` of a base in the format of transformers; for other formats it is empty."""
    return SourceFiles(base.path).config if base.format == "hf" else {}


@dataclass(frozen=True)
class _Found:
    """Holds the tensors of a PEFT directory, sorted by what they are."""

    factors: dict[tuple[str, int], Factors]
    targets: Targets
    classifier: dict[str, Tensor]
    dropped: list[str]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); give a directory that peft saved") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: not the configuration of a LoRA adapter (peft_type LORA)")
    for key, value in config.items():
        is_off = not value or str(value).strip().lower() in ("false", "0", "none")
        harmless = is_off or key in _WITHOUT_EFFECT
        if key == "init_lora_weights":
            harmless = value in _PLAIN_STARTS
        # The modules of `modules_to_save` are among the tensors, each of which is checked.
        if not harmless and key != "modules_to_save":
            raise UserError(
                f"{path}: {key}={json.dumps(value)} is not supported; merge the adapter with peft "
                "(merge_and_unload), save that model, and convert it"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{path}: r is {rank!r}, not a positive number")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        raise UserError(f"{path}: lora_alpha is {alpha!r}, not a positive number")
    return config


def _read_tensors(
    source: Path, shape: ModelShape, config: dict[str, Any], drop: Sequence[str], with_head: bool
) -> _Found:
    path = source / TENSORS
    if not path.is_file():
        raise UserError(f"{source}: no {TENSORS}; save the adapter with save_pretrained(DIR)")
    store = SafetensorsStore(path, [path])
    by_module = {linear.hugging_face: linear for linear in LINEARS}
    ours = {their.removesuffix(".weight"): factor for factor, their in _THEIRS.items()}
    parts: dict[tuple[str, int], dict[str, Tensor]] = {}
    classifier: dict[str, Tensor] = {}
    dropped = []
    for name, info in store.infos.items():
        match = _NAME.fullmatch(name)
        linear = by_module.get(match["linear"]) if match else None
        if match is None or linear is None:
            if any(fnmatchcase(name, pattern) for pattern in drop):
                dropped.append(name)
            elif name.startswith(PREFIX) and with_head:
                classifier[name] = store.read(name)
            else:
                raise UserError(
                    f"{path}: {name} is not an adapter of an encoder's linear; say what a classifier "
                    "predicts with --task, leave it out with --drop PATTERN, or merge the adapter with peft"
                )
            continue
        layer, factor = int(match["layer"]), ours[match["factor"].removesuffix(".weight")]
        expected = _shapes(linear, shape, config["r"])[factor]
        if info.shape != expected or layer >= shape.num_layers:
            raise UserError(
                f"{path}: {name} has shape {list(info.shape)}, but rank {config['r']} and a base of {shape} "
                f"make it {list(expected)} in layers 0 to {shape.num_layers - 1}; give the right --base"
            )
        parts.setdefault((linear.name, layer), {})[factor] = store.read(name)
    if not parts:
        raise UserError(f"{path}: holds no adapter; save the adapter with peft again")
    has_magnitude = flag_from(source / CONFIG, config, "use_dora", False)
    required = {"lora_A", "lora_B", *(["magnitude"] if has_magnitude else [])}
    for (name, layer), present in parts.items():
        if present.keys() != required:
            raise UserError(
                f"{path}: {name} of layer {layer} has {', '.join(sorted(present))}, not "
                f"{', '.join(sorted(required))}; the file is not whole, save the adapter again"
            )
    targets = {
        linear.name: tuple(sorted(layer for name, layer in parts if name == linear.name))
        for linear in LINEARS
    }
    factors = {key: Factors(**value) for key, value in parts.items()}
    return _Found(factors, {name: layers for name, layers in targets.items() if layers}, classifier, dropped)


def _shapes(linear: Linear, shape: ModelShape, rank: int) -> dict[str, tuple[int, ...]]:
    h, f = shape.hidden_size, shape.ffn_hidden_size
    inputs = f if linear.name == "linear_fc2" else h
    outputs = f if linear.name == "linear_fc1" else h
    return {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "magnitude": (outputs,)}
