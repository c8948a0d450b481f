"""Words what a run says of itself at its start and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.utils import unwrap_model

from esm2mega.checkpoint.choice import best_checkpoint
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import Run, TrainConfig, flatten
from esm2mega.config.task import PAIR_KIND
from esm2mega.convert.start_point import StartPoint
from esm2mega.data.stream.loader import PackStream
from esm2mega.files import first_of
from esm2mega.model.arithmetic import arithmetic
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.decimals import four_decimals
from esm2mega.train.incidents import Incidents
from esm2mega.train.loop import LoopState, out_of_patience


def _stages(config: Any) -> str:
    """Return the number of layers of each pipeline stage, as in 17+16."""
    layout = config.pipeline_model_parallel_layout
    ranks = range(layout.pipeline_model_parallel_size)
    return "+".join(str(layout.get_num_layers_to_build(vp_stage=0, pp_rank=rank)) for rank in ranks)


def describe_run(run: Run, ranks: Ranks, model: list[Any]) -> list[str]:
    """Describe the model, the layout and the batch of the run."""
    config = unwrap_model(model)[0].config
    return [
        f"model    {run.model.size or 'own shape'}: {shape_of(run.model)}; "
        f"{arithmetic(config, ranks.device)}, attention {config.packed_attention}",
        f"layout   {ranks.world_size} x {ranks.device.type}: "
        f"TP {ranks.tp_size}, PP {ranks.pp_size}, DP {ranks.dp_size}"
        + (f", CP {ranks.cp_size} by {config.context_exchange}" if ranks.cp_size > 1 else "")
        + (", SP" if run.parallel.sequence_parallel else "")
        + (f"; stages of {_stages(config)} layers" if config.pipeline_model_parallel_layout else ""),
        f"batch    {_batch(run.train)}",
        *_limits_of_context_parallelism(run),
    ]


def _limits_of_context_parallelism(run: Run) -> list[str]:
    """Say where context parallelism saves no memory."""
    size, tokens = run.parallel.context_parallel_size, run.train.micro_batch_tokens
    if size == 1:
        return []
    if tokens // size < run.data.max_seq_length:
        return [
            "note     a head of contacts keeps its maps of all pairs on every process: "
            f"parallel.context_parallel_size={size} saves nothing of these"
        ] * (run.task.kind == PAIR_KIND)
    proteins = run.train.micro_batch_size
    smaller = f"train.micro_batch_tokens={tokens // size}"
    if proteins is not None:
        smaller = f"train.micro_batch_size={proteins // size}"
    return [
        f"note     context parallelism saves nothing here: the longest protein ({run.data.max_seq_length} "
        f"tokens) fits into the part of a pack that one process has ({tokens // size}); "
        f"parallel.context_parallel_size=1 {smaller} needs no more memory and exchanges nothing"
    ]


def _batch(train: TrainConfig) -> str:
    """Return what a step takes, in the unit in which the configuration counts."""
    if train.global_batch_size is not None:
        return (
            f"{train.global_batch_size} proteins a step in packs of up to {train.micro_batch_tokens} tokens"
        )
    return f"{train.global_batch_tokens} tokens a step in packs of {train.micro_batch_tokens}"


def describe_small_data(train: TrainConfig, stream: PackStream[Any]) -> list[str]:
    """Say that a step takes more proteins than there are, since it then takes some of them repeatedly."""
    passes = stream.passes_of(train.global_batch_tokens // train.micro_batch_tokens)
    if passes <= 1.0:
        return []
    size = stream.samples.size
    line = f"data     data.train has {size} proteins, and a step takes each of them {passes:.3g} times"
    if size == 1:
        line = f"data     data.train has one protein, and a step takes it {passes:.3g} times"
    if train.max_epochs is not None:
        steps = "1 step" if train.max_steps == 1 else f"{train.max_steps} steps"
        line += f", so that train.max_epochs={train.max_epochs} is {steps}"
    if train.global_batch_size is not None:
        return [f"{line}; for smaller steps lower train.global_batch_size={train.global_batch_size}"]
    return [
        f"{line}; for smaller steps lower train.global_batch_tokens={train.global_batch_tokens} and "
        f"train.micro_batch_tokens={train.micro_batch_tokens}"
    ]


def describe_skipped(incidents: Incidents) -> list[str]:
    """Say which packs are left out of training."""
    packs = [str(number) for number in sorted(incidents.skipped)]
    return [f"data     without pack{'s' * (len(packs) > 1)} {first_of(packs)}; see {incidents.path}"] * bool(
        packs
    )


def describe_start(run: Run, start: StartPoint | None) -> list[str]:
    """Describe where the run is written to and what it starts from."""
    if start is None:
        return [f"run      {run.run_dir}"]
    if not start.is_resumed:
        return [f"run      {run.run_dir}, weights from {start.path}"]
    lines = [f"run      {run.run_dir}, resumed from {start.path.name} at step {start.state['step']}"]
    if run.init_from is not None:
        lines[0] += f"; init_from={run.init_from} is not used"
    before, now = flatten(start.run), flatten(run)
    changed = [
        f"{key} {before[key]} -> {now[key]}"
        for key in now
        if before[key] != now[key] and key not in ("run_dir", "checkpoint.resume")
    ]
    if changed:
        lines.append(f"changed since the checkpoint: {', '.join(changed)}")
    return lines


def describe_ending(run: Run, begun: LoopState, loop: LoopState, last: Path | None) -> str:
    """Describe in one line how the run ended, and where its last and its best weights are."""
    if out_of_patience(loop, run.train):
        count = loop.evaluations_without_improvement
        text = f"stopped early: no improvement in {count} evaluations; step {loop.step}, checkpoint {last}"
    elif loop == begun:
        text = f"nothing to do: step {loop.step} of {run.train.max_steps} is done, checkpoint {last}"
    else:
        text = f"done: step {loop.step}, checkpoint {last}"
    best = best_checkpoint(run.run_dir)
    if best is not None and best.step == loop.step:
        text += f", which is the best {best}"
    elif best is not None:
        text += f"; best {best}: step {best.step}, checkpoint {best.path}"
    elif loop.best_value is not None and not run.checkpoint.keep_best:
        value = f"{run.checkpoint.best_metric} ({four_decimals(loop.best_value)})"
        text += f"; best by {value}: step {loop.best_step}, not kept (checkpoint.keep_best=0)"
    return text
