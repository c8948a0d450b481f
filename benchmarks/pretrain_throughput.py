"""Training throughput beside Hugging Face `EsmForMaskedLM`: real tokens per second of whole optimizer steps.

    python benchmarks/pretrain_throughput.py proteins.fasta --sizes 8M 35M --json result.json

All contenders train on the same proteins, cut to the same length, with the same masks, gradient clipping and
AdamW, in fp32 on the same threads. A batch is what one pack holds: as many proteins as fit into
`--batch-tokens` real tokens (by default that of `train.micro_batch_tokens`), or `--batch-size` proteins.
What padding costs, and so every ratio below, depends on it: the more proteins share a batch, the longer is
the longest. Lengths are those of the file: one protein is drawn from each of as many equal slices of it,
ordered by length.

The contenders take turns, one pass over the proteins each, and every round has its own random order, as every
epoch has. A ratio is taken within a round, so that a machine that gets slower or faster strikes all of them.
Tokens are real ones with `<cls>` and `<eos>`; padding is work, but counts as nothing.

    hf-random   padded batches of proteins in random order
    hf-sorted   padded batches of proteins of similar length, in random order
    esm2mega    the proteins of the hf-random batches, packed without padding
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from batches import (
    Batches,
    Batching,
    by_number,
    by_tokens,
    mask_protein,
    pack,
    pad,
    padded_tokens,
    real_tokens,
)
from esm2mega_model import training

from esm2mega import vocabulary
from esm2mega.config.presets import PRESETS
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.data.stream.masking import MaskedTokens

DEFAULT_FASTA = Path(__file__).parents[2] / "shared/data/uniref_sample/uniref90_sample_8000.fasta"
LEARNING_RATE = 1e-4

Pass = Callable[[], None]
"""Trains on every protein once."""

Contender = Callable[[Batches], Pass]
"""Brings batches into the form that the contender trains on, which is not timed."""


def draw_proteins(fasta: Path, number: int, max_residues: int, seed: int) -> list[MaskedTokens]:
    """Draw one protein from each of `number` slices of the FASTA ordered by length, cut and mask them."""
    records = sorted((record.residues for record in FastaReader(fasta)), key=len)
    if number > len(records):
        raise SystemExit(f"--proteins {number} is more than the {len(records)} of {fasta}")
    rng = np.random.default_rng(seed)
    borders = np.linspace(0, len(records), number + 1).astype(int)
    proteins = []
    for chosen in rng.integers(borders[:-1], borders[1:]):
        residues = vocabulary.encode_residues(records[chosen][:max_residues])
        proteins.append(mask_protein(residues, chosen, seed))
    return proteins


def random_order(proteins: Sequence[MaskedTokens], batching: Batching, rng: np.random.Generator) -> Batches:
    """Batches of the proteins in a new random order."""
    return batching([proteins[i] for i in rng.permutation(len(proteins))])


def sorted_order(proteins: Sequence[MaskedTokens], batching: Batching, rng: np.random.Generator) -> Batches:
    """Batches of proteins of similar length, the batches in a new random order."""
    batches = batching(sorted(proteins, key=lambda protein: len(protein.input_ids)))
    return [batches[i] for i in rng.permutation(len(batches))]


@contextmanager
def hf_contender(size: str) -> Iterator[Contender]:
    """Yield `EsmForMaskedLM` on padded batches."""
    from hf_model import config_of
    from transformers import EsmForMaskedLM

    torch.manual_seed(0)
    model = EsmForMaskedLM(config_of(size)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def contender(batches: Batches) -> Pass:
        padded = [pad(batch) for batch in batches]

        def one_pass() -> None:
            for input_ids, attention_mask, labels in padded:
                optimizer.zero_grad()
                model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

        return one_pass

    yield contender


@contextmanager
def esm2mega_contender(size: str) -> Iterator[Contender]:
    """Yield esm2mega's own training step on packs."""
    from esm2mega.train.step import train_step

    with training(size, [f"optim.lr={LEARNING_RATE}", "model.precision=fp32"]) as state:

        def contender(batches: Batches) -> Pass:
            packs = [pack(batch) for batch in batches]

            def one_pass() -> None:
                for pack in packs:
                    train_step(state, [pack])

            return one_pass

        yield contender


@dataclass(frozen=True)
class Result:
    """One contender at one size.

    Attributes:
        size: tag of the model.
        contender: name of the contender.
        tokens_per_second: real tokens per second of each round.
        computed_tokens: computed tokens for each real one, of each round.
    """

    size: str
    contender: str
    tokens_per_second: list[float]
    computed_tokens: list[float]


def measure(
    size: str, proteins: Sequence[MaskedTokens], batching: Batching, rounds: int, seed: int
) -> list[Result]:
    """Let the contenders take turns; the first round warms up caches and allocators, uncounted."""
    results = {name: Result(size, name, [], []) for name in ("hf-random", "hf-sorted", "esm2mega")}
    rng = np.random.default_rng(seed)
    with ExitStack() as stack:
        contenders = {
            "hf-random": stack.enter_context(hf_contender(size)),
            "hf-sorted": stack.enter_context(hf_contender(size)),
            "esm2mega": stack.enter_context(esm2mega_contender(size)),
        }
        for round_number in range(rounds + 1):
            shuffled = random_order(proteins, batching, rng)
            by_length = sorted_order(proteins, batching, rng)
            for name, contender in contenders.items():
                batches = by_length if name == "hf-sorted" else shuffled
                computed = real_tokens(batches) if name == "esm2mega" else padded_tokens(batches)
                one_pass = contender(batches)
                started = time.perf_counter()
                one_pass()
                rate = real_tokens(batches) / (time.perf_counter() - started)
                note = "warm-up" if round_number == 0 else f"round {round_number} of {rounds}"
                print(f"{size:>5} {name:<10} {note}: {rate:,.0f} tokens/s", flush=True)
                if round_number > 0:
                    results[name].tokens_per_second.append(rate)
                    results[name].computed_tokens.append(computed / real_tokens(batches))
    return list(results.values())


def table(results: list[Result]) -> str:
    """Return the medians, and how many times the peers' rate that of esm2mega is."""
    lines = [
        f"{'size':>5} {'contender':<10} {'tokens/s':>9} {'spread':>13} {'computed':>9} {'esm2mega is':>12}"
    ]
    ours = {result.size: result.tokens_per_second for result in results if result.contender == "esm2mega"}
    for result in results:
        rates = result.tokens_per_second
        spread = f"{min(rates):,.0f}-{max(rates):,.0f}"
        computed = f"{statistics.mean(result.computed_tokens):.2f} x"
        within_rounds = [mine / theirs for mine, theirs in zip(ours[result.size], rates, strict=True)]
        ratio = "" if result.contender == "esm2mega" else f"{statistics.median(within_rounds):.2f} x"
        lines.append(
            f"{result.size:>5} {result.contender:<10} {statistics.median(rates):9,.0f} {spread:>13} "
            f"{computed:>9} {ratio:>12}"
        )
    return "\n".join(lines)


def describe(proteins: Sequence[MaskedTokens], options: argparse.Namespace) -> dict[str, object]:
    """Return what a reader needs to judge the numbers."""
    return {
        "processor": _processor(),
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "megatron-core")},
        "proteins": len(proteins),
        "real_tokens": real_tokens([list(proteins)]),
        "batch": f"{options.batch_size} proteins" if options.batch_size else f"{options.batch_tokens} tokens",
        "max_residues": options.max_residues,
        "rounds": options.rounds,
        "seed": options.seed,
    }


def _processor() -> str:
    """Return the processor's name; `platform` knows none on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description="Training throughput beside Hugging Face EsmForMaskedLM.")
    parser.add_argument("fasta", nargs="?", type=Path, default=DEFAULT_FASTA, help="proteins to train on")
    parser.add_argument("--sizes", nargs="+", default=["8M", "35M"], choices=list(PRESETS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--proteins", type=int, default=48, help="drawn from the FASTA")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="real tokens that a batch may hold")
    parser.add_argument("--batch-size", type=int, help="proteins per batch, in place of --batch-tokens")
    parser.add_argument("--max-residues", type=int, default=1022, help="longer proteins are cut")
    parser.add_argument("--rounds", type=int, default=3, help="counted passes of every contender")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    if not options.fasta.exists():
        parser.error(f"no FASTA file at {options.fasta}: name one")
    # A GPU would be taken by some contenders and not by others.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(options.threads)

    if options.batch_tokens < options.max_residues + 2:
        parser.error("--batch-tokens must hold the longest protein, --max-residues and two special tokens")
    batching = by_number(options.batch_size) if options.batch_size else by_tokens(options.batch_tokens)
    proteins = draw_proteins(options.fasta, options.proteins, options.max_residues, options.seed)
    setting = describe(proteins, options)
    print(json.dumps(setting, indent=1))
    results = [
        result
        for size in options.sizes
        for result in measure(size, proteins, batching, options.rounds, options.seed)
    ]
    print(table(results))
    if options.json is not None:
        text = json.dumps({**setting, "results": [asdict(result) for result in results]}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
