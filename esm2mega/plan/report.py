"""Shows plans: a table of layouts, the stages of one layout, and both as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from esm2mega.config.schema import ParallelConfig
from esm2mega.plan.estimate import LayoutPlan
from esm2mega.plan.layouts import GB, Failed, Ranking

_COLUMNS = (
    *("TP", "PP", "CP", "DP", "recompute", "weights", "grads", "optim", "activ.", "GB"),
    *("sent GB", "bubble", "step s", "tokens/s"),
)
_STAGE_COLUMNS = ("stage", "layers", "in flight", "weights", "grads", "optim", "activ.", "batches", "GB")


def ranking_lines(ranking: Ranking) -> list[str]:
    """Return the table of the layouts that fit, the fastest first, and a line for each that does not."""
    rows = [_row(plan) for plan in ranking.fitting]
    lines = _table(_COLUMNS, rows) if rows else []
    if ranking.failed:
        lines += ["", "Layouts that cannot run:"] if lines else ["No layout can run:"]
        lines += [f"  {_name(failed.parallel)}: {failed.reason}" for failed in ranking.failed]
    return lines


def layout_lines(plan: LayoutPlan) -> list[str]:
    """Return a line on one layout, and the table of its stages."""
    rows = [
        [
            *(str(number), str(stage.layers), str(stage.in_flight)),
            *_gigabytes(stage.states.parameters, stage.states.gradients, max(stage.states.optimizer)),
            *_gigabytes(stage.activations, stage.batches, stage.total),
        ]
        for number, stage in enumerate(plan.stages)
    ]
    sent = ", ".join(f"{name} {size / GB:.2f}" for name, size in plan.sent.items())
    words = [
        f"{_name(plan.parallel)} DP {plan.data_parallel_size}, recompute {plan.model.recompute}, "
        f"{plan.micro_batches} micro-batches per step and rank",
        f"sent per rank and step, GB: {sent}; bubble {plan.bubble:.1%}",
    ]
    if plan.step_seconds is not None:
        words.append(f"estimated step {plan.step_seconds:.3g} s, {plan.tokens_per_second:,.0f} tokens/s")
    return [*words, "", *_table(_STAGE_COLUMNS, rows)]


def overrides(plan: LayoutPlan) -> list[str]:
    """Return what makes a configuration use a layout, as words of the command line."""
    parallel = plan.parallel
    words = [
        f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size}",
        f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}",
        *[f"parallel.context_parallel_size={size}" for size in [parallel.context_parallel_size] if size > 1],
        f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}",
        f"parallel.distributed_optimizer={str(parallel.distributed_optimizer).lower()}",
    ]
    return [*words, f"model.recompute={plan.model.recompute}"]


def as_json(
    fitting: Sequence[LayoutPlan], failed: Sequence[Failed], assumed: dict[str, Any]
) -> dict[str, Any]:
    """Return plans as plain values: bytes and seconds; states of the optimizer by data-parallel rank."""
    return {
        "assumed": assumed,
        "layouts": [
            {
                "parallel": asdict(plan.parallel),
                "data_parallel_size": plan.data_parallel_size,
                "recompute": plan.model.recompute,
                "micro_batches": plan.micro_batches,
                "bytes": plan.worst.total,
                "stages": [asdict(stage) for stage in plan.stages],
                "sent_bytes": plan.sent,
                "bubble": plan.bubble,
                "step_seconds": plan.step_seconds,
                "tokens_per_second": plan.tokens_per_second,
            }
            for plan in fitting
        ],
        "failed": [{"parallel": asdict(one.parallel), "reason": one.reason} for one in failed],
    }


def _row(plan: LayoutPlan) -> list[str]:
    parallel, worst = plan.parallel, plan.worst
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    return [
        *(str(size) for size in (*sizes, plan.data_parallel_size)),
        plan.model.recompute,
        *_gigabytes(worst.states.parameters, worst.states.gradients, max(worst.states.optimizer)),
        *_gigabytes(worst.activations, worst.total, sum(plan.sent.values())),
        f"{plan.bubble:.1%}",
        "" if plan.step_seconds is None else f"{plan.step_seconds:.3g}",
        "" if plan.tokens_per_second is None else f"{plan.tokens_per_second:,.0f}",
    ]


def _name(parallel: ParallelConfig) -> str:
    virtual = parallel.virtual_pipeline_model_parallel_size
    interleaved = "" if virtual is None else f" VPP {virtual}"
    sizes = (
        f"TP {parallel.tensor_model_parallel_size} PP {parallel.pipeline_model_parallel_size}{interleaved}"
    )
    return f"{sizes} CP {parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else sizes


def _gigabytes(*sizes: float) -> list[str]:
    return [f"{size / GB:.2f}" for size in sizes]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in (header, *rows)]
