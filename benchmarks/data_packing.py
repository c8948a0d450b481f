"""Fill, planning rate and memory of packing, and the rate of the loader beside that of a model.

    python benchmarks/data.py packing proteins.fasta --json result.json

The lengths of the FASTA are drawn with replacement to stores of any size. Rates are of one process: those of
the planner and of building batches in seconds of processor time, which other work on the machine hardly
changes; those of the loader and the model in seconds of the clock. Tokens are real ones with `<cls>` and
`<eos>`.

    plan      planning packs, the order of the samples included, until --seconds are over
    memory    peak of what Python and numpy allocate while a whole epoch is planned; the lengths themselves
              are a memory map
    loader    `TrainStream` alone, batches built in a thread or in processes, and building them in a loop
    model     training steps on batches that are there already
    balance   what attention costs the rank that it costs most in a step, over the mean of the ranks, if packs
              were dealt in turn and as they are divided; then the same of all products of a 650M model. `cut`
              are the proteins of the FASTA, `long` the same with one in a hundred as long as a pack
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm2mega.benchmark.data import building, loading
from esm2mega.config.presets import PRESETS
from esm2mega.config.schema import DataConfig
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.balance import share_out
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.packing import PackCursor, PackPlan, PackShape
from esm2mega.data.stream.samples import TrainSamples

DEFAULT_FASTA = Path(__file__).parents[2] / "shared/data/uniref_sample/uniref90_sample_8000.fasta"
SEED = 1


class Lengths:
    """A store that knows lengths alone, which is all that planning looks at."""

    clusters = None
    fingerprint = "0" * 64

    def __init__(self, lengths: npt.NDArray[np.int32]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)


def plan_of(
    lengths: npt.NDArray[np.int32], tokens: int, packing: str = "pack", num_samples: int | None = None
) -> PackPlan:
    """Return the packs of proteins of these lengths, cropped to 1024 tokens."""
    samples = TrainSamples([Lengths(lengths)], DataConfig(), SEED)  # type: ignore[list-item]
    return PackPlan(samples, SEED, PackShape(tokens, 1024, packing=packing), num_samples)


@dataclass(frozen=True)
class Planned:
    """Packs of one size over one store."""

    packing: str
    micro_batch_tokens: int
    sequences: int
    fill: float
    sequences_per_second: float


def measure_plan(lengths: npt.NDArray[np.int32], tokens: int, packing: str, seconds: float) -> Planned:
    """Plan windows until the time is over; the first one, which fills caches, is not counted."""
    plan = plan_of(lengths, tokens, packing)
    plan.window(0)
    planned = packs = real = 0
    started = time.process_time()
    for number in itertools.count(1):
        window = plan.window(number)
        planned, packs, real = (
            planned + len(window.pieces),
            packs + len(window),
            real + sum(window.num_tokens),
        )
        spent = time.process_time() - started
        if spent >= seconds:
            break
    return Planned(packing, tokens, len(lengths), real / (packs * tokens), planned / spent)


def measure_memory(lengths: npt.NDArray[np.int32], sequences: int, tokens: int) -> int:
    """Return the peak in bytes of planning an epoch of so many sequences, drawn from `lengths`."""
    random = np.random.default_rng(SEED)
    with tempfile.NamedTemporaryFile() as file:
        for first in range(0, sequences, 1 << 20):
            drawn = random.integers(0, len(lengths), size=min(1 << 20, sequences - first))
            file.write(lengths[drawn].astype("<i4").tobytes())
        file.flush()
        mapped = np.memmap(file.name, dtype="<i4", mode="r").view(np.ndarray)
        tracemalloc.start()
        for _ in plan_of(mapped, tokens, num_samples=sequences).windows():
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


def measure_balance(
    lengths: npt.NDArray[np.int32], tokens: int, dp_size: int, micro_batches: int, steps: int = 50
) -> tuple[float, float, float, float]:
    """Return the largest over the mean cost of the ranks, on average over steps: four numbers.

    They are of attention dealt in turn and divided, and of the whole step of a 650M model likewise. A layer
    has 24 h^2 operations for each token, and 4 h for each product of tokens.
    """
    samples = TrainSamples([Lengths(lengths)], DataConfig(max_seq_length=tokens), SEED)  # type: ignore[list-item]
    plan = PackPlan(samples, SEED, PackShape(tokens, tokens))
    count = dp_size * micro_batches
    linear = 6 * PRESETS["650M"].hidden_size * tokens * micro_batches
    cursor, found = PackCursor(), []
    for _ in range(steps):
        packs, cursor = plan.take(cursor, count)
        costs = np.array([pack.cost for pack in packs])
        in_turn = costs.reshape(micro_batches, dp_size).sum(axis=0)
        divided = np.array([costs[share].sum() for share in share_out(costs.tolist(), dp_size)])
        found.append(
            [x.max() / x.mean() for added in (0, linear) for x in (in_turn + added, divided + added)]
        )
    in_turn_mean, divided_mean, step_in_turn, step_divided = np.mean(found, axis=0).tolist()
    return in_turn_mean, divided_mean, step_in_turn, step_divided


def measure_building(store: TokenStore, spec: BatchSpec, packs: int) -> float:
    """Return tokens per second of processor time of building batches from planned packs."""
    work = building(store, spec, packs)
    started = time.process_time()
    work.run()
    return work.units / (time.process_time() - started)


def measure_loader(store: TokenStore, spec: BatchSpec, packs: int) -> float:
    """Return tokens per second of the stream when nobody else works; the start is not counted."""
    with loading(store, spec, packs) as work:
        started = time.perf_counter()
        work.run()
        return work.units / (time.perf_counter() - started)


def measure_model(store: TokenStore, spec: BatchSpec, size: str, steps: int, threads: int) -> float:
    """Return tokens per second of training steps of one pack each; the first one is not counted."""
    import torch

    from esm2mega.benchmark.machine import synchronize
    from esm2mega.benchmark.ours import training
    from esm2mega.data.stream.loader import TrainStream
    from esm2mega.train.step import train_step

    torch.set_num_threads(threads)
    changes = ["model.precision=fp32"] if not torch.cuda.is_available() else []
    with training(size, changes) as state, TrainStream([store], spec) as stream:
        batches = list(itertools.islice(stream, steps + 1))
        train_step(state, batches[:1])
        synchronize()
        started = time.perf_counter()
        for batch in batches[1:]:
            train_step(state, [batch])
        synchronize()
        return sum(batch.num_tokens for batch in batches[1:]) / (time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="data.py packing", description="Fill, rate and memory of packing; the loader's rate."
    )
    parser.add_argument("fasta", nargs="?", type=Path, default=DEFAULT_FASTA, help="whose lengths to take")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 16384, 65536])
    parser.add_argument("--balance-tokens", nargs="*", type=int, default=[4096, 16384], help="T of balance")
    parser.add_argument("--sequences", nargs="+", type=int, default=[10**5, 10**6, 10**7])
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time of each planning rate")
    parser.add_argument("--loader-tokens", type=int, default=4096, help="T of loader, model and memory")
    parser.add_argument("--packs", type=int, default=2000, help="packs of each loader rate")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="*", default=["8M"], choices=list(PRESETS), help="models beside it")
    parser.add_argument("--steps", type=int, default=5, help="steps of each model")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the model, on CPU")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    if not options.fasta.exists():
        parser.error(f"no FASTA file at {options.fasta}: name one")

    with tempfile.TemporaryDirectory() as folder:
        prepare_fasta([options.fasta], Path(folder) / "store")
        store = TokenStore(Path(folder) / "store" / "train")
        drawn = np.random.default_rng(SEED).integers(0, len(store), size=max(options.sequences))
        many = store.lengths[drawn]

        plans = []
        print(f"{'packing':>7} {'T':>6} {'sequences':>10} {'fill':>8} {'planned sequences/s':>20}")
        for packing, tokens in itertools.product(("pack", "bucket"), options.tokens):
            for lengths in (store.lengths, many):
                plan = measure_plan(lengths, tokens, packing, options.seconds)
                plans.append(plan)
                print(
                    f"{packing:>7} {tokens:6} {plan.sequences:10} {plan.fill:8.2%} "
                    f"{plan.sequences_per_second:20,.0f}",
                    flush=True,
                )

        balances = []
        print("attention, and a 650M step: largest over mean of the ranks, in turn and divided")
        for tokens, (dp_size, micro_batches) in itertools.product(
            options.balance_tokens, ((4, 4), (8, 16), (64, 4))
        ):
            long = many[:100_000].copy()
            long[::100] = tokens - 2
            for kind, drawn in (("cut", many[:100_000]), ("long", long)):
                ratios = measure_balance(drawn, tokens, dp_size, micro_batches)
                balances.append([kind, tokens, dp_size, micro_batches, *ratios])
                print(
                    f"{kind:>5} T {tokens:6} DP {dp_size:3} x {micro_batches:2}:",
                    "{:.2f} {:.2f}   {:.3f} {:.3f}".format(*ratios),
                    flush=True,
                )

        memory = {}
        for sequences in options.sequences:
            memory[sequences] = measure_memory(store.lengths, sequences, options.loader_tokens)
            print(
                f"planning an epoch of {sequences:>9}: peak {memory[sequences] / 2**20:.1f} MiB", flush=True
            )

        rates = {}
        spec = BatchSpec(DataConfig(), options.loader_tokens, SEED)
        rates["building"] = measure_building(store, spec, options.packs)
        for workers in options.workers:
            with_workers = replace(spec, data=replace(spec.data, workers=workers))
            rates[f"loader, workers={workers}"] = measure_loader(store, with_workers, options.packs)
        for size in options.sizes:
            rates[f"model {size}"] = measure_model(store, spec, size, options.steps, options.threads)
        for name, rate in rates.items():
            print(f"{name:>18}: {rate:14,.0f} tokens/s")

    if options.json:
        result = {
            "plans": [asdict(plan) for plan in plans],
            "balance": balances,
            "peak_bytes": memory,
            "tokens_per_second": rates,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
