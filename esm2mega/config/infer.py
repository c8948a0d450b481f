"""Makes the configuration of `embed` and `score` from the checkpoint's and from the settings of this start.

It is pure Python, like `esm2mega.config.validate`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from esm2mega.config.batches import data_parallel_size
from esm2mega.config.load import load_run_over
from esm2mega.config.machine import on_this_machine
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import DataConfig, InferConfig, ModelConfig, ParallelConfig, Run
from esm2mega.config.validate import validate_model
from esm2mega.errors import UserError

OUTPUTS = ("residue", "pooled", "logits", "contacts")


def validate_inference(run: Run, world_size: int) -> None:
    """Refuse what `embed` and `score` cannot do; rules about training do not apply to them.

    Args:
        run: Resolved configuration, from `inference_run`.
        world_size: Number of processes.

    Raises:
        UserError: A rule does not hold; it is the first one that does not.
    """
    validate_model(run)
    data_parallel_size(run.parallel, world_size)
    infer = run.infer
    for key in ("sequence_parallel", "virtual_pipeline_model_parallel_size", "distributed_optimizer"):
        if getattr(run.parallel, key):
            raise UserError(f"parallel.{key} only matters in training; remove it")
    for name in infer.outputs:
        if name not in OUTPUTS:
            near = difflib.get_close_matches(name, OUTPUTS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"infer.outputs={name} is not one of {', '.join(OUTPUTS)}{hint}")
    if not infer.outputs or not infer.layers:
        raise UserError("infer.outputs and infer.layers must name at least one each")
    absolute_layers(infer, run.model)
    width = window_tokens(infer, run.data)
    if run.model.max_positions is not None and width > run.model.max_positions:
        raise UserError(
            f"infer.max_seq_length={width} is more than the {run.model.max_positions} positions that this "
            f"model has learned; set it to {run.model.max_positions} or less"
        )
    if infer.overlap is not None and infer.overlap >= width - 2:
        raise UserError(
            f"infer.overlap={infer.overlap} leaves no step between windows of {width} tokens; "
            f"set it below {width - 2}"
        )


def in_int8(run: Run) -> bool:
    """Return whether the layers multiply in int8."""
    return run.infer.precision == "int8"


def validate_int8(run: Run) -> None:
    """Refuse what cannot be computed in int8 with the same bits everywhere.

    Args:
        run: Resolved configuration, from `inference_run`.

    Raises:
        UserError: A rule does not hold.
    """
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        if (size := getattr(run.parallel, key)) > 1:
            raise UserError(
                f"parallel.{key}={size}: in int8 every process computes its proteins with the whole model; "
                f"set parallel.{key}=1, and the processes share the proteins"
            )
    if run.lora.rank is not None:
        raise UserError(
            "--precision int8 has no adapters; merge them into the weights with `esm2mega lora merge`, or "
            "use --precision fp32"
        )
    if not 0 < run.infer.max_drift <= 1:
        raise UserError(
            f"infer.max_drift={run.infer.max_drift:g} is not above 0 and at most 1; 0.02 is the default"
        )


def refuse_int8(run: Run, what: str) -> None:
    """Refuse int8 where its drift from fp32 is not measured.

    Args:
        run: Resolved configuration, from `inference_run`.
        what: What cannot compute in int8.

    Raises:
        UserError: int8 is asked for.
    """
    if in_int8(run):
        raise UserError(
            "infer.precision=int8 works in `esm2mega embed` alone, which measures its drift from fp32; "
            f"{what} computes in fp32, bf16, fp16 or fp64"
        )


def absolute_layers(infer: InferConfig, model: ModelConfig) -> list[int]:
    """Return `infer.layers` counted from 0, ascending, each once.

    Raises:
        UserError: The model does not have one of the layers.
    """
    states = shape_of(model).num_layers + 1
    for layer in infer.layers:
        if not -states <= layer < states:
            raise UserError(
                f"infer.layers={layer}: this model has hidden states 0 to {states - 1} (or -{states} to -1)"
            )
    return sorted({layer % states for layer in infer.layers})


def window_tokens(infer: InferConfig, data: DataConfig) -> int:
    """Return how many tokens the model sees of one protein at once, with `<cls>` and `<eos>`."""
    return infer.max_seq_length or data.max_seq_length


def inference_run(checkpoint: Run, overrides: Sequence[str], config: str | None = None) -> Run:
    """Return the checkpoint's model with the settings of this start.

    The layout of training is not kept: every process holds the whole model unless `overrides` say otherwise.

    Args:
        checkpoint: Configuration of the run that wrote the checkpoint.
        overrides: `key=value` settings that replace those of the file.
        config: Path or name of a configuration file; None for none.
    """
    base = on_this_machine(checkpoint)
    base.parallel = ParallelConfig()
    base.infer = InferConfig()
    # Columns of the training tables say nothing about the input.
    base.data.sequence_column, base.data.id_column = DataConfig.sequence_column, None
    base.data.mutation_column = DataConfig.mutation_column
    run = load_run_over(base, overrides, config)
    if run.data.limit is not None:
        raise UserError(
            f"data.limit={run.data.limit} is for training and evaluation, and this computes all of its "
            "input; remove it, and give a file with fewer proteins"
        )
    # In int8 the products of the layers are computed; all else is in fp32, the weights before too.
    run.model.precision = "fp32" if in_int8(run) else run.infer.precision or run.model.precision
    run.model.recompute = "none"
    return run
