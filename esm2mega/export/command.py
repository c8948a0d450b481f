"""`export` writes a model as a program, and compares the file with the model before it gets its name."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from esm2mega.convert.heads.contact_head import BIAS, WEIGHT
from esm2mega.convert.lazy_weights import Weights, dtype_name
from esm2mega.convert.start_point import StartPoint
from esm2mega.errors import MachineError, UserError
from esm2mega.export.ours import Outputs, expected
from esm2mega.export.padded import CONTACTS, ENCODER, HEAD, PaddedESM2
from esm2mega.export.padded_heads import why_not
from esm2mega.export.programs import FORMATS, Run, beside, traced
from esm2mega.export.proteins import batches, proteins
from esm2mega.files import appearing, refuse_existing
from esm2mega.infer.source import ModelSource, source_of
from esm2mega.lora.base import MERGE_THEM, read_with_base
from esm2mega.lora.merge import whole_weights

BOUND = 1e-4
"""This is the largest allowed difference of any output, absolute; of numbers that a head predicts, in
standard deviations of the labels. It allows for fp32 sums in another order.
"""

OUTPUTS = (ENCODER, HEAD, CONTACTS)


def export(checkpoint: str, to: str, out: Path, include: Sequence[str] | None = None) -> list[str]:
    """Export a model in fp32, whatever its weights are stored in; adapters are merged into their base.

    Args:
        checkpoint: A checkpoint or a run, or a model in any format that `esm2mega convert` reads.
        to: One of `FORMATS`.
        out: File to make; it must not exist, and appears when it has been compared with the model.
        include: Which of `OUTPUTS` the program computes; None for the encoder, and the head if there is one.

    Returns:
        Lines of a report for the user.

    Raises:
        UserError: The model cannot be read or has no such output, `out` exists, or a package is missing.
        MachineError: The program computes something else. Nothing is left behind.
    """
    program_format = FORMATS[to]
    program_format.check(out)
    for path in (out, *([beside(out)] if to == "onnx" else [])):
        refuse_existing(path)
    start = read_with_base(checkpoint, cure=MERGE_THEM)
    source = source_of(start)
    outputs = _outputs(start, source, include)
    ids = proteins()
    ours = expected(start, outputs, ids)
    if not all(bool(value.isfinite().all()) for each in ours for value in each.values()):
        raise UserError(f"{start.path}: gives values that are not finite; export an earlier checkpoint")
    stored = start.weights if start.base is None else start.base.weights
    with appearing(out, is_directory=False) as path:
        model = padded_model(start, source, outputs)
        program_format.write(traced(model), model.output_names, path)
        del model
        # What was traced and what is read back are the size of the model each.
        gc.collect()
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        largest = _differences(program_format.load(path), ids, ours, _scale(start))
        if not all(value <= BOUND for value in largest.values()):
            raise MachineError(
                f"{out}: the program differs from {start.path} by {_words(largest)}, and {BOUND:g} is "
                f"allowed; nothing was written: try the other format with --to, or another version of "
                f"{_runner(to)}"
            )
    merged = "" if start.base is None else ", adapters merged"
    return [
        f"{start.path}: {', '.join(outputs)} in fp32 from {dtype_name(stored.description.dtype)}{merged} -> "
        f"{out}, {size / 1e6:,.1f} MB",
        "inputs: input_ids and attention_mask, int64 [batch, length]; outputs: " + ", ".join(largest),
        f"compared on {len(ids)} proteins of {min(map(len, ids))} to {max(map(len, ids))} tokens, run by "
        f"{_runner(to)}: largest difference {_words(largest)}; {BOUND:g} is allowed",
    ]


def _outputs(start: StartPoint, source: ModelSource, include: Sequence[str] | None) -> list[str]:
    """Return what to export, in a fixed order, after checking that the model has it."""
    family = start.run.model.family
    if family != "esm2":
        raise UserError(
            f"{start.path}: holds a model of family {family}, and ESM-2 alone is exported; write it for its "
            "own package with `esm2mega convert`"
        )
    no_head = None if start.task is None else why_not(start.task)
    if start.head is None:
        no_head = "it has no head; give --include encoder"
    if include is None:
        return [ENCODER, *([HEAD] if no_head is None else [])]
    for name in include:
        if name not in OUTPUTS:
            raise UserError(f"--include {name} is not one of {', '.join(OUTPUTS)}")
    if HEAD in include and no_head is not None:
        raise UserError(f"{start.path}: its head cannot be exported: {no_head}")
    if CONTACTS in include and source.contact_head is None:
        raise UserError(
            f"{start.path}: has no contact head, so it gives no contacts; leave contacts out of --include"
        )
    return [name for name in OUTPUTS if name in include]


def padded_model(start: StartPoint, source: ModelSource, outputs: Sequence[str]) -> PaddedESM2:
    """Return the model on padded batches, in fp32 on the CPU."""
    weights: Weights = whole_weights(start)
    description = weights.description
    task = description.task if HEAD in outputs else None
    with torch.device("meta"):
        model = PaddedESM2(
            description.shape,
            description.layernorm_epsilon,
            description.activation == "gelu_tanh",
            outputs,
            task,
        )
    values = {}
    for name in model.state_dict():
        if name == WEIGHT and source.contact_head is not None:
            values[name] = source.contact_head[0].float()[None]
        elif name == BIAS and source.contact_head is not None:
            values[name] = torch.tensor([source.contact_head[1]])
        else:
            # A copy in memory of its own: what was read may be a view of a mapped file.
            values[name] = weights.read(name).to(torch.float32, copy=True)
    model.load_state_dict(values, assign=True)
    return model.eval().requires_grad_(False)


def _scale(start: StartPoint) -> Tensor | None:
    """Return what differences of predicted numbers are divided by at least, ``[k]``; None for others."""
    return torch.tensor(start.task.info.std) if start.task is not None and start.task.info.std else None


def _differences(run: Run, ids: Sequence[Tensor], ours: Outputs, scale: Tensor | None) -> dict[str, float]:
    """Return the largest difference of each output of a program over all proteins."""
    differences: dict[str, list[Tensor]] = {}
    for some, input_ids, mask in batches(ids):
        with torch.no_grad():
            found = run(input_ids, mask)
        for name, values in found.items():
            for value, own in zip(values, ours[some], strict=True):
                # Padding follows the tokens and the residues.
                difference = (value[tuple(map(slice, own[name].shape))] - own[name]).abs()
                if name == "logits" and scale is not None:
                    # Rounding of a number grows with it, also where it was not scaled in training.
                    difference = difference / torch.maximum(scale, own[name].abs())
                differences.setdefault(name, []).append(difference.max())
    # The largest of values that include NaN is NaN.
    return {name: float(torch.stack(values).max()) for name, values in differences.items()}


def _words(largest: dict[str, float]) -> str:
    return ", ".join(f"{value:.1e} ({name})" for name, value in largest.items())


def _runner(to: str) -> str:
    package = "onnxruntime" if to == "onnx" else "torch"
    return f"{package} {version(package)}"
