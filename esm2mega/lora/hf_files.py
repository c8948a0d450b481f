"""Reads a directory of PEFT: its configuration, and its tensors sorted by what they are.

Names and keys are those of peft 0.13 to 0.21.

Legend: ``r`` rank of the adapter, ``i`` and ``o`` inputs and outputs of a linear.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from esm2mega.config.lora import LINEARS, LM_HEAD, Linear, Targets
from esm2mega.config.presets import ModelShape
from esm2mega.config.schema import LoRAConfig
from esm2mega.convert.files import pickles
from esm2mega.convert.files.stores import MemoryStore, SafetensorsStore, TensorStore
from esm2mega.convert.lazy_weights import flag_from, number_from
from esm2mega.errors import UserError
from esm2mega.files import parse_json
from esm2mega.lora.checkpoint import Factors
from esm2mega.lora.hf_head import PREFIX

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
OLD_TENSORS = "adapter_model.bin"

ROOT = "base_model.model."
"""Begins the name of every tensor of a file."""

FACTORS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
"""This table gives peft's name for each of our factors."""

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_BIAS = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.bias")
_LAYER = re.compile(r"esm\.encoder\.layer\.(?P<layer>\d{1,6})\.(?P<linear>.+)")

_BARE = ("encoder.", "embeddings.", "pooler.", "contact_head.")
"""Names within `EsmModel`, for task type FEATURE_EXTRACTION, begin so; elsewhere ``esm.`` is before it."""

_WITHOUT_PLACE = {
    "esm.pooler.": "of the pooler, which nothing here computes with",
    "esm.contact_head.": "of the contact head, which stays that of the base",
}
"""Names the parts of `transformers`' ESM that adapters here do not reach, and why that is no loss."""

_COPIES = re.compile(r"classifier\.(?:modules_to_save\.default|original_module)\..+")
"""With ``bias=all`` peft stores the biases of a classifier that is trained in full two more times."""

_WITHOUT_EFFECT = {
    "alpha",
    "alpha_pattern",
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
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
"""These keys are read here, or say nothing that the tensors do not show."""

_BIASES = ("none", "all", "lora_only")

_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""These values of `init_lora_weights` leave the base as it is."""

_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\\d|\[[\w-]+\]|[*+])+\$?")
"""Matches the keys of `rank_pattern` and `alpha_pattern` that are read: names with simple wildcards.

They are regular expressions out of a stranger's file, of which others could take for ever.
"""

_MOST_REPEATS = 3


@dataclass(frozen=True)
class PeftFiles:
    """Holds the tensors of a PEFT directory, sorted by what they are.

    Attributes:
        lora: Section of the configuration, without the targets. Its rank is the largest of all adapters.
        factors: Factors by name of the linear and layer, in terms of `lora`: those of a smaller rank are
            filled up with zeros, and those of another scale have the ratio in their ``B``.
        targets: Layers that have an adapter.
        biases: Biases by their names in `EsmForMaskedLM`.
        classifier: Tensors of a classifier by their names in the file.
        dropped: Tensors that were left out, and why.
    """

    lora: LoRAConfig
    factors: dict[tuple[str, int], Factors]
    targets: Targets
    biases: dict[str, Tensor] = field(default_factory=dict)
    classifier: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def read_peft(source: Path, shape: ModelShape, drop: Sequence[str], with_head: bool) -> PeftFiles:
    """Read a directory that peft saved.

    Args:
        source: The directory.
        shape: Dimensions of the base.
        drop: Shell patterns of tensors that are left out.
        with_head: Whether a classifier has a known meaning, and is read.

    Raises:
        UserError: It is not such a directory, does not fit the base, or holds what has no place here.
    """
    config = _read_config(source / CONFIG)
    store = _open(source)
    found = PeftFiles(_lora(source / CONFIG, config), {}, {})
    parts: dict[tuple[str, int], dict[str, Tensor]] = {}
    modules: dict[tuple[str, int], str] = {}
    for name in store.infos:
        if (why := _reason_to_drop(store, name, drop)) is not None:
            found.dropped.append(f"{name}{why}")
        elif (place := _place(name)) is not None:
            linear, layer, module, factor = place
            _check_shape(store, name, place, shape, _rank(config, module))
            parts.setdefault((linear.name, layer), {})[factor] = store.read(name)
            modules[linear.name, layer] = module
        elif name.startswith(PREFIX) and with_head:
            found.classifier[name] = store.read(name)
        elif config.get("bias") in _BIASES[1:] and (bias := _BIAS.fullmatch(_within(name))) is not None:
            found.biases[f"{bias['module']}.bias"] = store.read(name)
        else:
            raise UserError(
                f"{store.location}: {name} is not an adapter of a linear that can have one here; say what "
                "a classifier predicts with --task, leave it out with --drop PATTERN, or merge the adapter "
                "with peft"
            )
    if not parts:
        raise UserError(f"{store.location}: holds no adapter; save the adapter with peft again")
    required = {"lora_A", "lora_B", *(["magnitude"] if found.lora.use_dora else [])}
    for (linear_name, layer), present in parts.items():
        if present.keys() != required:
            raise UserError(
                f"{store.location}: {linear_name} of layer {layer} has {', '.join(sorted(present))}, not "
                f"{', '.join(sorted(required))}; the file is not whole, save the adapter again"
            )
    found.lora.rank = max(len(present["lora_A"]) for present in parts.values())
    for key, present in parts.items():
        found.factors[key] = _uniform(Factors(**present), found.lora, _scaling(config, modules[key]))
    for linear in (*LINEARS, LM_HEAD):
        if layers := sorted(layer for name, layer in parts if name == linear.name):
            found.targets[linear.name] = tuple(layers)
    return found


def module_of(linear: Linear, layer: int) -> str:
    """Return the name of a linear in `EsmForMaskedLM` and the other models with a head."""
    return linear.hugging_face if linear is LM_HEAD else f"esm.encoder.layer.{layer}.{linear.hugging_face}"


def _open(source: Path) -> TensorStore:
    new, old = source / TENSORS, source / OLD_TENSORS
    if new.is_file():
        return SafetensorsStore(new, [new])
    if old.is_file():
        return MemoryStore(old, pickles.flat_tensors(old, pickles.load_pickle(old)))
    raise UserError(f"{source}: no {TENSORS} or {OLD_TENSORS}; save the adapter with save_pretrained(DIR)")


def _within(name: str) -> str:
    """Return the name of a tensor within `EsmForMaskedLM`, also for one of `EsmModel`."""
    name = name.removeprefix(ROOT)
    return f"esm.{name}" if name.startswith(_BARE) else name


def _place(name: str) -> tuple[Linear, int, str, str] | None:
    """Return linear, layer, module in the file, and factor; None if it is no factor of a linear of ours."""
    if (found := _FACTOR.fullmatch(name.removeprefix(ROOT))) is None:
        return None
    ours = {theirs.removesuffix(".weight"): factor for factor, theirs in FACTORS.items()}
    module, factor = found["module"], ours[found["factor"]]
    if module == LM_HEAD.hugging_face:
        return LM_HEAD, 0, module, factor
    layer = _LAYER.fullmatch(_within(module))
    by_module = {linear.hugging_face: linear for linear in LINEARS}
    if layer is None or layer["linear"] not in by_module:
        return None
    return by_module[layer["linear"]], int(layer["layer"]), module, factor


def _reason_to_drop(store: TensorStore, name: str, drop: Sequence[str]) -> str | None:
    """Return why a tensor is left out, in words for behind its name; None if it is not.

    An adapter of the contact head is trained by no loss of a model with a head, so its ``B`` is still zero.
    """
    if any(fnmatchcase(name, pattern) for pattern in drop):
        return ""
    inside = _within(name)
    if _COPIES.fullmatch(inside):
        return ", a copy"
    why = next((why for start, why in _WITHOUT_PLACE.items() if inside.startswith(start)), None)
    if why is None:
        return None
    factor = _FACTOR.fullmatch(inside)
    if inside.startswith("esm.contact_head.") and factor is not None:
        other = name.removesuffix(inside.removeprefix(factor["module"])) + ".lora_B.weight"
        if other not in store.infos or store.read(other).any():
            return None
        why = "of the contact head, which does nothing, since its B is zero"
    return f", {why}"


def _check_shape(
    store: TensorStore, name: str, place: tuple[Linear, int, str, str], shape: ModelShape, rank: int
) -> None:
    linear, layer, _, factor = place
    expected = _shapes(linear, shape, rank)[factor]
    last = 0 if linear is LM_HEAD else shape.num_layers - 1
    if store.infos[name].shape != expected or layer > last:
        raise UserError(
            f"{store.location}: {name} has shape {list(store.infos[name].shape)}, but rank {rank} and a base "
            f"of {shape} make it {list(expected)} in layers 0 to {last}; give the right --base"
        )


def _shapes(linear: Linear, shape: ModelShape, rank: int) -> dict[str, tuple[int, ...]]:
    h, f = shape.hidden_size, shape.ffn_hidden_size
    inputs = f if linear.name == "linear_fc2" else h
    outputs = f if linear.name == "linear_fc1" else h
    return {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "magnitude": (outputs,)}


def _uniform(factors: Factors, lora: LoRAConfig, scaling: float) -> Factors:
    """Return factors of the rank and the scale of `lora` that give the same product: ``s B A``."""
    assert lora.rank is not None
    missing, ratio = lora.rank - len(factors.lora_A), scaling / lora.scaling
    wide = torch.promote_types(factors.lora_B.dtype, torch.float32)
    scaled = factors.lora_B if ratio == 1 else (factors.lora_B.to(wide) * ratio).to(factors.lora_B.dtype)
    return Factors(pad(factors.lora_A, (0, 0, 0, missing)), pad(scaled, (0, missing)), factors.magnitude)


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
        if key == "bias":
            harmless = value in _BIASES
        # The modules of `modules_to_save` are among the tensors, each of which is checked.
        if not harmless and key != "modules_to_save":
            raise UserError(
                f"{path}: {key}={json.dumps(value)} is not supported; merge the adapter with peft "
                "(merge_and_unload), save that model, and convert it"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{path}: r is {rank!r}, not a positive number")
    if not _is_scale(alpha):
        raise UserError(f"{path}: lora_alpha is {alpha!r}, not a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, key, config.get(key) or {})
    return config


def _is_scale(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def _check_patterns(path: Path, key: str, patterns: Any) -> None:
    """Refuse what is not a mapping of simple patterns to positive numbers, whole ones for ranks."""
    if not isinstance(patterns, Mapping):
        raise UserError(f"{path}: {key} is {json.dumps(patterns)}, not a mapping of names to numbers")
    for pattern, value in patterns.items():
        repeats = pattern.count("*") + pattern.count("+")
        if not _is_scale(value) or (key == "rank_pattern" and not isinstance(value, int)):
            raise UserError(f"{path}: {key} of {pattern} is {value!r}, not a positive number")
        if not _PATTERN.fullmatch(pattern) or repeats > _MOST_REPEATS or not _compiles(pattern):
            raise UserError(
                f"{path}: {key} has {json.dumps(pattern)}, which is more than a name with simple wildcards; "
                "merge the adapter with peft (merge_and_unload), save that model, and convert it"
            )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as peft does."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            return value
    return default


def _rank(config: Mapping[str, Any], module: str) -> int:
    return int(_of_module(config.get("rank_pattern"), module, config["r"]))


def _scaling(config: Mapping[str, Any], module: str) -> float:
    rank, alpha = _rank(config, module), _of_module(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config["use_rslora"] else rank)


def _lora(path: Path, config: dict[str, Any]) -> LoRAConfig:
    """Return the section of the configuration, without targets; truth values in `config` become such."""
    for key in ("use_rslora", "use_dora"):
        config[key] = flag_from(path, config, key, False)
    return LoRAConfig(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=number_from(path, config, "lora_dropout", 0.0),
        use_rslora=config["use_rslora"],
        use_dora=config["use_dora"],
        bias=config.get("bias") or "none",
    )
