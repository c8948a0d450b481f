"""Plans a training that does not run: the layouts of a number of GPUs, or the one that is configured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from esm2mega.config.load import load_run
from esm2mega.config.presets import PRESETS
from esm2mega.config.schema import ModelConfig, ParallelConfig, Run
from esm2mega.config.validate import validate
from esm2mega.errors import UserError
from esm2mega.files import check_out, write_json
from esm2mega.plan.estimate import LayoutPlan, estimate
from esm2mega.plan.hardware import HARDWARE, Hardware
from esm2mega.plan.layouts import GB, RESERVE, Failed, lack, rank_layouts, usable
from esm2mega.plan.report import as_json, layout_lines, overrides, ranking_lines
from esm2mega.plan.stage import Device


def plan(
    model: str | None,
    config: str | None,
    words: Sequence[str],
    gpus: int,
    memory_gb: float,
    hardware: Hardware,
    length: int | None = None,
    out: str | None = None,
) -> list[str]:
    """Plan layouts for GPUs, or the layout that the configuration names; return what to print.

    Args:
        model: Size of the model, which takes the shipped configuration of that size.
        config: Path or name of a configuration in place of it.
        words: ``key=value`` over the configuration; a layout among them is the only one that is planned.
        gpus: Processes of the job.
        memory_gb: Memory of each GPU, in GB of 2^30 bytes.
        hardware: Rates for the time of a step.
        length: Tokens of each protein; None for `data.max_seq_length`.
        out: File for all numbers, as JSON.

    Raises:
        UserError: The configuration is not one of a pretraining, or its layout is impossible or does not fit.
    """
    if out is not None:
        check_out(Path(out))
    run = _configured(model, config, words)
    length = _length(run, length)
    is_given = run.parallel != ParallelConfig(timeout_minutes=run.parallel.timeout_minutes)
    if is_given or any(word.startswith("parallel.") for word in words):
        validate(run, gpus)
        planned = estimate(run, gpus, "cuda", hardware, length)
        fits = planned.worst.total <= usable(memory_gb)
        failed = [] if fits else [Failed(run.parallel, lack(planned))]
        lines = [*layout_lines(planned), "", _verdict(planned, memory_gb)]
        fitting: Sequence[LayoutPlan] = [planned]
    else:
        ranking = rank_layouts(run, gpus, memory_gb, "cuda", hardware, length)
        fitting, failed = ranking.fitting, list(ranking.failed)
        lines = ranking_lines(ranking)
        if fitting:
            lines += ["", "The first line is", "  " + " ".join(overrides(fitting[0]))]
    assumed = {
        **{"gpus": gpus, "memory_gb": memory_gb, "reserve": RESERVE, "length": length},
        **{"micro_batch_tokens": run.train.micro_batch_tokens, "rates": asdict(hardware)},
    }
    if out is not None:
        write_json(Path(out), as_json(fitting, failed, assumed))
    return [_heading(run, gpus, memory_gb, hardware, length), "", *lines]


def dry_run(run: Run, world_size: int) -> list[str]:
    """Plan the job at hand on this machine's device; return what to print.

    Args:
        run: A valid configuration.
        world_size: Processes of the job.
    """
    _check_is_pretraining(run)
    import torch

    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    memory_gb = torch.cuda.get_device_properties(0).total_memory / GB if device == "cuda" else None
    planned = estimate(run, world_size, device, None, _length(run, None))
    lines = layout_lines(planned)
    return lines if memory_gb is None else [*lines, "", _verdict(planned, memory_gb)]


def with_rates(
    name: str, tflops: float | None, link: float | None, network: float | None, per_host: int
) -> Hardware:
    """Return the rates of a named GPU, with those replaced that are given: TFLOP/s, and GB/s of 10^9."""
    hardware = replace(HARDWARE[name], per_host=per_host)
    if tflops is not None:
        hardware = replace(hardware, half=tflops, full=tflops)
    if link is not None:
        hardware = replace(hardware, link=link * 1e9)
    if network is not None:
        hardware = replace(hardware, network=network * 1e9)
    return hardware


def _configured(model: str | None, config: str | None, words: Sequence[str]) -> Run:
    if model is not None and config is not None:
        raise UserError(f"--model {model} and --config {config} both name a model; give one of them")
    if model is None and config is None:
        raise UserError(f"no model is named: give --model, one of {', '.join(PRESETS)}, or --config")
    if model is not None and model not in PRESETS:
        near = next((size for size in PRESETS if size.lower() == model.lower()), None)
        hint = f"; did you mean {near}?" if near else ", or give --config with another shape"
        raise UserError(f"--model {model} is not one of {', '.join(PRESETS)}{hint}")
    run = load_run(config or f"pretrain_esm2_{model}", words)
    _check_is_pretraining(run)
    return run


def _check_is_pretraining(run: Run) -> None:
    for key, value in (("task.kind", run.task.kind), ("lora.rank", run.lora.rank)):
        if value is not None:
            raise UserError(
                f"{key}={value} is of a fine-tuning, and only pretrainings are planned; set {key}=null"
            )


def _length(run: Run, length: int | None) -> int:
    longest = min(run.data.max_seq_length, run.train.micro_batch_tokens)
    if length is not None and length > longest:
        raise UserError(f"--length {length}: proteins have at most data.max_seq_length={longest} tokens here")
    return longest if length is None else length


def _heading(run: Run, gpus: int, memory_gb: float, hardware: Hardware, length: int) -> str:
    model: ModelConfig = run.model
    rate = hardware.products(model.precision) / 1e12
    return (
        f"{model.size or 'model'} in {model.precision}, T {run.train.micro_batch_tokens}, proteins of "
        f"{length} tokens, {gpus} GPUs of {memory_gb:g} GB; {hardware.name} at {rate:g} TFLOP/s, "
        f"{hardware.link / 1e9:g} GB/s within and {hardware.network / 1e9:g} GB/s between hosts"
    )


def _verdict(planned: LayoutPlan, memory_gb: float) -> str:
    total = planned.worst.total / GB
    if planned.worst.total <= usable(memory_gb):
        return (
            f"fits: {total:.1f} of {memory_gb:g} GB, of which {RESERVE:.0%} stay free for what is not tensors"
        )
    return (
        f"does not fit: {total:.1f} GB and {RESERVE:.0%} for what is not tensors are more than "
        f"{memory_gb:g} GB; lower train.micro_batch_tokens, set model.recompute=full, or split the model more"
    )
