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
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from esm2mega.benchmark.batches import (
    Batches,
    Batching,
    by_number,
    by_tokens,
    mask_protein,
    random_order,
    real_tokens,
    sorted_order,
)
from esm2mega.benchmark.ours import training, training_pass
from esm2mega.benchmark.peers import LEARNING_RATE, HuggingFaceTrainer
from esm2mega.benchmark.proteins import draw, read_proteins
from esm2mega.benchmark.turns import Prepare, ratios, take_turns
from esm2mega.config.presets import PRESETS
from esm2mega.data.stream.masking import MaskedTokens
from esm2mega.errors import UserError
from esm2mega.processor import model_name

DEFAULT_FASTA = Path(__file__).parents[2] / "shared/data/uniref_sample/uniref90_sample_8000.fasta"


def draw_proteins(fasta: Path, number: int, max_residues: int, seed: int) -> list[MaskedTokens]:
    """Draw one protein from each of `number` slices of the FASTA ordered by length, cut and mask them."""
    drawn = draw(read_proteins(fasta, max_residues), number, seed)
    return [mask_protein(residues, number, seed) for number, residues in enumerate(drawn)]


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
    """Let the contenders take turns; all have the same batches in a round but for `hf-sorted`."""

    def batches(number: int, order: Callable[..., Batches]) -> Batches:
        return order(proteins, batching, np.random.default_rng([seed, number]))

    def told(name: str, number: int, rate: float) -> None:
        note = f"round {number} of {rounds}" if number else "warm-up"
        print(f"{size:>5} {name:<10} {note}: {rate:,.0f} tokens/s", flush=True)

    trainer = HuggingFaceTrainer(size, "fp32", torch.device("cpu"))
    sorted_trainer = HuggingFaceTrainer(size, "fp32", torch.device("cpu"))
    with training(size, [f"optim.lr={LEARNING_RATE}", "model.precision=fp32"]) as state:
        contenders: dict[str, Prepare] = {
            "hf-random": lambda number: trainer.pass_over(batches(number, random_order)),
            "hf-sorted": lambda number: sorted_trainer.pass_over(batches(number, sorted_order)),
            "esm2mega": lambda number: training_pass(state, batches(number, random_order)),
        }
        turns = take_turns(contenders, rounds, told)
    return [Result(size, name, one.rates, one.computed) for name, one in turns.items()]


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
        within_rounds = ratios(ours[result.size], rates)
        ratio = "" if result.contender == "esm2mega" else f"{statistics.median(within_rounds):.2f} x"
        lines.append(
            f"{result.size:>5} {result.contender:<10} {statistics.median(rates):9,.0f} {spread:>13} "
            f"{computed:>9} {ratio:>12}"
        )
    return "\n".join(lines)


def describe(proteins: Sequence[MaskedTokens], options: argparse.Namespace) -> dict[str, object]:
    """Return what a reader needs to judge the numbers."""
    return {
        "processor": model_name(),
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "megatron-core")},
        "proteins": len(proteins),
        "real_tokens": real_tokens([list(proteins)]),
        "batch": f"{options.batch_size} proteins" if options.batch_size else f"{options.batch_tokens} tokens",
        "max_residues": options.max_residues,
        "rounds": options.rounds,
        "seed": options.seed,
    }


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
    try:
        proteins = draw_proteins(options.fasta, options.proteins, options.max_residues, options.seed)
    except UserError as error:
        parser.error(str(error))
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
