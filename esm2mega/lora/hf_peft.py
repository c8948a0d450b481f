"""Converts adapters to and from a directory of PEFT: ``adapter_config.json`` and one file of tensors.

Channels of q and k need no reordering: both sides rotate the pairs ``(i, i + d/2)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from esm2mega.checkpoint.finite import FiniteCheck
from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.config.hub import shared_name
from esm2mega.config.lora import LINEARS, LM_HEAD, Targets, is_trained_bias, shortest_patterns
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import Run
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate_model
from esm2mega.convert.files.safetensors_writer import write_safetensors
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.formats.esm2mega import run_of
from esm2mega.convert.formats.hf import NAMES
from esm2mega.convert.formats.registry import detect
from esm2mega.convert.heads.contact_head import is_contact_head
from esm2mega.convert.heads.hf_classifiers import dropout_of, find_equal, no_equal
from esm2mega.convert.history import history_of
from esm2mega.convert.lazy_weights import Description, HeadDescription, Weights
from esm2mega.convert.model_card import Card, check_license, write_card
from esm2mega.convert.name_table import is_lm_head
from esm2mega.convert.start_point import StartPoint, read_checkpoint, read_start
from esm2mega.errors import UserError
from esm2mega.files import appearing, first_of, refuse_existing
from esm2mega.lora.base import identify
from esm2mega.lora.checkpoint import AdapterReader, Factors, write_adapters
from esm2mega.lora.hf_files import CONFIG, FACTORS, ROOT, TENSORS, module_of, read_peft
from esm2mega.lora.hf_head import (
    MODULE,
    TASK_TYPES,
    Meaning,
    described,
    has_meaning,
    to_ours,
    to_theirs,
    write_task,
)
from esm2mega.model.build import DTYPES


def export_adapters(
    checkpoint: str | Path, target: Path, bare: bool = False, license: str | None = None
) -> list[str]:
    """Write `target`, a directory that `peft` loads onto an ESM-2 of `transformers` with the same base.

    The head of a task is written too if transformers has an equal one.

    Args:
        checkpoint: A checkpoint of adapters, or the directory of a run with one.
        target: Directory to make; it must not exist, and appears when it is complete.
        bare: Whether it is for `EsmModel`, the encoder without a head, and not for a model with one.
        license: Identifier of the licence on the Hub, for the model card.

    Returns:
        Lines of a report for the user.

    Raises:
        UserError: `transformers` has no such model, or `target` exists.
    """
    check_license(license)
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
            f"{checkpoint}: {', '.join(adapters.of_base)} were trained together with the adapters, and a "
            "PEFT directory has no place for them; use esm2mega lora merge"
        )
    factors = {module: _trimmed(value) for module, value in _factors(adapters)}
    tensors = {
        f"{ROOT}{module}.{FACTORS[name]}": value
        for module, found in factors.items()
        for name, value in found.present().items()
    }
    tensors |= {f"{ROOT}{name}": value for name, value in _biases(adapters, factors.keys())}
    head = adapters.head()
    architecture = None if head is None or bare else find_equal(head)
    base = Path(adapters.base.path)
    is_theirs = base.exists() and detect(SourceFiles(base)) == "hf"
    # A model of the Hub is found by its name wherever the directory goes.
    shared = shared_name(base)
    named = shared if "/" in shared else str(base)
    config = _their_config(adapters, named if is_theirs else None, factors)
    beyond: list[str] = []
    if bare:
        beyond = [name for name in tensors if not name.startswith(f"{ROOT}esm.")]
        inside = {n: value for n, value in tensors.items() if n not in beyond}
        tensors = {name.replace(f"{ROOT}esm.", ROOT): value for name, value in inside.items()}
        config["task_type"] = "FEATURE_EXTRACTION"
    report = [f"{checkpoint}: {sum(map(len, adapters.targets.values()))} adapters -> {target}"]
    if config["base_model_name_or_path"] is None:
        report.append(f"base     {base}; for transformers: esm2mega convert {base} DIR --to hf")
    if beyond:
        report.append(f"dropped: {first_of(beyond)}: of the head, which EsmModel does not have")
    if head is not None and architecture is None:
        if bare:
            dropped = "EsmModel has no head; leave --bare out"
        elif is_contact_head(head):
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
        lacks_head = bare or (head is not None and architecture is None)
        write_card(_card(adapters, target.name, None if lacks_head else head or "lm", license), directory)
    return report


def _card(
    adapters: AdapterReader, name: str, head: Literal["lm"] | HeadDescription | None, license: str | None
) -> Card:
    """Return what the model card of adapters says; `head` is that of the adapters, or of their base."""
    model = adapters.run.model
    description = Description(
        shape_of(model),
        model.layernorm_epsilon,
        model.activation,
        DTYPES[model.precision],
        head=head,
    )
    return Card(
        name,
        description,
        history=history_of(adapters.start.path),
        license=license,
        base=shared_name(adapters.base.path),
    )


def _factors(adapters: AdapterReader) -> Iterator[tuple[str, Factors]]:
    """Yield the factors by the names of their linears in `EsmForMaskedLM`."""
    for linear in (*LINEARS, LM_HEAD):
        for layer in adapters.targets.get(linear.name, ()):
            factors = adapters.read(linear, layer)
            assert factors is not None
            yield module_of(linear, layer), factors


def _trimmed(factors: Factors) -> Factors:
    """Return factors without their last ranks where both are zero, as after the import of a smaller rank."""
    used = (factors.lora_A.ne(0).any(dim=1) | factors.lora_B.ne(0).any(dim=0)).nonzero()
    rank = max(1, int(used.max()) + 1 if len(used) else 1)
    return replace(
        factors, lora_A=factors.lora_A[:rank].contiguous(), lora_B=factors.lora_B[:, :rank].contiguous()
    )


def _biases(adapters: AdapterReader, modules: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained biases by the names that peft has for them."""
    shape = shape_of(adapters.run.model)
    for entry in NAMES.entries(shape):
        if (value := adapters.read_bias(entry.ours)) is None:
            continue
        for name, part in zip(
            entry.theirs, entry.kind.to_theirs(value, shape, len(entry.theirs)), strict=True
        ):
            module = name.removesuffix(".bias")
            yield f"{module}.base_layer.bias" if module in modules else name, part.contiguous()


def _their_config(
    adapters: AdapterReader, base: str | None, factors: Mapping[str, Factors]
) -> dict[str, Any]:
    lora = adapters.run.lora
    assert lora.rank is not None
    alpha = lora.rank if lora.alpha is None else lora.alpha
    ranks = {module: len(found.lora_A) for module, found in factors.items()}
    others = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha or 0) else alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _their_targets(adapters.targets, shape_of(adapters.run.model).num_layers),
        "rank_pattern": others,
        # The scale is that of all adapters: alpha over the rank, or over its root.
        "alpha_pattern": {
            module: lora.scaling * (math.sqrt(rank) if lora.use_rslora else rank)
            for module, rank in others.items()
        },
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "bias": lora.bias,
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
    return names + [LM_HEAD.hugging_face] * (LM_HEAD.name in targets)


def import_adapters(
    source: Path, base: str, target: Path, drop: Sequence[str] = (), meaning: Meaning | None = None
) -> list[str]:
    """Write `target`, a checkpoint of the adapters in the PEFT directory `source`.

    Args:
        source: Directory with ``adapter_config.json``, and ``adapter_model.safetensors`` or ``.bin``.
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
    start = read_start(base)
    start.check_whole()
    run = run_of(start.weights.description)
    found = read_peft(source, shape_of(run.model), drop, has_meaning(source, meaning))
    if meaning is not None and not found.classifier:
        raise UserError(f"{source}: has no {MODULE} to be the head of task {meaning.kind}; leave --task out")
    patterns = shortest_patterns(found.targets, shape_of(run.model).num_layers)
    run.lora = replace(found.lora, target_modules=patterns)
    if LM_HEAD.name in found.targets and (found.classifier or start.head != "lm"):
        raise UserError(
            f"{source}: adapts {LM_HEAD.hugging_face}, but there is no head of a language model; give a "
            f"--base that has one, or leave the adapter out with --drop '*{LM_HEAD.hugging_face}*'"
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
    biases = _our_biases(source, run, start.weights, found.biases, found.targets)
    with appearing(target) as directory:
        write_adapters(directory, run, identity, found.factors, state, head | biases)
    return [
        f"{source}: {len(found.factors)} adapters of rank {run.lora.rank} -> {target}, on {identity.path}",
        *([f"head     {', '.join(head)}"] if head else []),
        *([_about_biases(source, len(found.biases), run.lora.bias)] if biases else []),
        *(f"dropped: {name}" for name in found.dropped),
        *_not_finite(
            head
            | biases
            | {
                f"encoder.layers.{layer}.{name}.{factor}": value
                for (name, layer), factors in found.factors.items()
                for factor, value in factors.present().items()
            }
        ),
    ]


def _our_biases(
    source: Path, run: Run, base: Weights, found: Mapping[str, Tensor], targets: Targets
) -> dict[str, Tensor]:
    """Return the biases that `lora.bias` trains, by our names; those that peft did not train are the base's.

    Args:
        source: The directory, named in errors.
        run: Configuration of the adapters.
        base: The weights under them.
        found: Biases in the directory by their names in `EsmForMaskedLM`.
        targets: Linears that have an adapter.
    """
    shape, has_task = shape_of(run.model), run.task.kind is not None
    biases: dict[str, Tensor] = {}
    unused = dict(found)
    for entry in NAMES.entries(shape):
        if not is_trained_bias(entry.ours, run.lora, targets) or entry.ours not in base.infos:
            continue
        if has_task and is_lm_head(entry.ours):
            continue
        theirs = entry.kind.to_theirs(base.read(entry.ours), shape, len(entry.theirs))
        parts = dict(zip(entry.theirs, theirs, strict=True))
        for name, part in parts.items():
            value = unused.pop(name, part)
            if value.shape != part.shape:
                raise UserError(
                    f"{source}: {name} has shape {list(value.shape)}, and {list(part.shape)} in the base; "
                    "give the right --base"
                )
            parts[name] = value.to(part.dtype)
        biases[entry.ours] = entry.kind.to_ours(list(parts.values()), shape)
    if unused:
        raise UserError(
            f"{source}: {next(iter(unused))} has no place in the base; give the right --base, or leave it "
            "out with --drop"
        )
    return biases


def _about_biases(source: Path, count: int, bias: str) -> str:
    """Return a line about the biases of a directory; versions of peft, such as 0.19, save none."""
    if count:
        return f"biases   {count}, bias={bias}"
    return f"biases   {source} holds none, though bias={bias} trains some: those of the base are taken"


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a line about the values that are not finite, if there are any, which are written as they are."""
    finite = FiniteCheck()
    for name, value in tensors.items():
        finite.add(name, value)
    return [f"kept:    {finite.words()}"] if finite else []


def _base_config(base: StartPoint) -> dict[str, Any]:
    """Return ``config.json`` of a base in the format of transformers; for other formats it is empty."""
    return SourceFiles(base.path).config if base.format == "hf" else {}
