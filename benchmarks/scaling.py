"""Scaling from 8 to 1,024 GPUs on paper: what `esm2mega plan` computes for the same layout on more GPUs.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --sizes 650M --gpus 8 64 512

Nothing is measured: rates are those of `--gpu`, and the page docs/performance.md lists what is assumed. Each
table has two parts. With the published batch of 2,097,152 tokens each GPU has the less to do the more there
are; with a batch that grows, each GPU has 65,536 tokens a step. `efficiency` is the rate of one GPU beside
that in the first line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from esm2mega.config.load import load_run
from esm2mega.config.schema import Run
from esm2mega.config.validate import validate
from esm2mega.plan.estimate import LayoutPlan, estimate
from esm2mega.plan.hardware import HARDWARE, Hardware
from esm2mega.plan.layouts import GB, usable

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
MEMORY_GB = 80
LENGTH = 320
"""Tokens of each protein: about the mean of UniRef90."""

PUBLISHED_TOKENS = 2_097_152
GROWN_TOKENS = 65_536


@dataclass(frozen=True)
class Job:
    """A size with the layout that it has on every number of GPUs.

    Attributes:
        size: Tag of a preset.
        tensor_parallel: GPUs that share every layer.
        tokens: T where a GPU has enough of them.
    """

    size: str
    tensor_parallel: int
    tokens: int

    def run(self, gpus: int, global_tokens: int) -> Run:
        """The configuration of a number of GPUs."""
        replicas = gpus // self.tensor_parallel
        words = {
            "parallel.tensor_model_parallel_size": self.tensor_parallel,
            "parallel.sequence_parallel": str(self.tensor_parallel > 1).lower(),
            "parallel.distributed_optimizer": str(replicas > 1).lower(),
            "train.micro_batch_tokens": min(self.tokens, global_tokens // replicas),
            "train.global_batch_tokens": global_tokens,
        }
        run = load_run(f"pretrain_esm2_{self.size}", [f"{key}={value}" for key, value in words.items()])
        validate(run, gpus)
        return run


JOBS = {job.size: job for job in (Job("650M", 1, 16384), Job("3B", 1, 8192), Job("15B", 8, 16384))}


def planned(job: Job, gpus: int, hardware: Hardware) -> tuple[LayoutPlan, LayoutPlan]:
    """The plans with the published batch and with one that grows."""
    grown = GROWN_TOKENS * gpus
    return tuple(
        estimate(job.run(gpus, tokens), gpus, "cuda", hardware, LENGTH)
        for tokens in (PUBLISHED_TOKENS, grown)
    )  # type: ignore[return-value]


def table(job: Job, gpus: Sequence[int], hardware: Hardware) -> Iterator[str]:
    """Yield a table in Markdown, line by line."""
    yield (
        "| GPUs | DP | T | step, s | tokens/s | efficiency | grown batch: step, s | tokens/s | efficiency | "
        "sent to replicas, GB | memory, GB |"
    )
    yield "|---" * 11 + "|"
    first: tuple[float, float] | None = None
    for count in gpus:
        published, grown = planned(job, count, hardware)
        rates = [plan.tokens_per_second / count for plan in (published, grown)]
        first = first or (rates[0], rates[1])
        memory = max(plan.worst.total for plan in (published, grown))
        fits = "" if memory <= usable(MEMORY_GB) else " (too much)"
        cells = [
            f"{count:,}",
            f"{published.data_parallel_size:,}",
            f"{min(job.tokens, PUBLISHED_TOKENS // published.data_parallel_size):,}",
            f"{published.step_seconds:.3g}",
            f"{published.tokens_per_second:,.0f}",
            f"{rates[0] / first[0]:.0%}",
            f"{grown.step_seconds:.3g}",
            f"{grown.tokens_per_second:,.0f}",
            f"{rates[1] / first[1]:.0%}",
            f"{grown.sent['data'] / GB:.2f}",
            f"{memory / GB:.1f}{fits}",
        ]
        yield f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description="Scaling on paper, from the planner's model.")
    parser.add_argument("--sizes", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS), help="numbers of GPUs")
    parser.add_argument("--gpu", default="h100", choices=list(HARDWARE), help="rates that are assumed")
    options = parser.parse_args(arguments)
    for number, size in enumerate(options.sizes):
        job = JOBS[size]
        layout = f"TP {job.tensor_parallel}, data parallel over the rest, distributed optimizer"
        print(f"{'' if number == 0 else chr(10)}{size}: {layout}\n")
        for line in table(job, options.gpus, HARDWARE[options.gpu]):
            print(line, flush=True)


if __name__ == "__main__":
    main()
