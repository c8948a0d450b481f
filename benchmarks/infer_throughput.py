"""Embedding throughput beside fair-esm and Hugging Face: real tokens per second, proteins to vectors.

    python benchmarks/infer_throughput.py proteins.fasta --size 35M --json result.json

All contenders compute the last layer's vector of every residue, on the same proteins, threads and machine,
with random weights of the same shape. Longer proteins are cut. The contenders take turns, one pass over the
proteins each, in an order that rotates from round to round; a ratio is taken within a round, so that a
machine that gets slower or faster strikes all of them. Tokens are real ones with `<cls>` and `<eos>`;
padding is work, but counts as nothing. Tokenising and sorting are not timed.

The whole file is sorted by length and cut into batches as fair-esm's `extract.py` does: as many proteins as
fit into 4,096 tokens with padding. What is measured is a sample of these batches, one from each of
`--batches` equal parts of the list: so the lengths are those of the file, and no batch has more padding than
in a run over all of it.

    fair-esm    these batches
    hf-sorted   the same batches through `EsmModel`
    esm2mega    the same proteins in random order, in packs, as `esm2mega embed` makes them
    kernels     not a model: PyTorch's matrix products and attention of the layers, on these batches without
                their padding, and nothing between them. No model that calls these kernels can be faster

fair-esm has no bf16 mode; it is cast as a whole where bf16 is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from esm2mega.benchmark.ours import embedding_pass
from esm2mega.benchmark.peers import ProteinBatches, fair_esm_embedding, hf_embedding, pad_tokens
from esm2mega.benchmark.products import DTYPES
from esm2mega.benchmark.proteins import draw_batches, read_proteins
from esm2mega.benchmark.turns import Pass, ratios, take_turns
from esm2mega.config.presets import PRESETS
from esm2mega.config.schema import ParallelConfig
from esm2mega.errors import UserError
from esm2mega.parallel.initialize import process_groups

DEFAULT_FASTA = Path(__file__).parents[2] / "shared/data/uniref_sample/uniref90_sample_8000.fasta"
CPU = torch.device("cpu")


def kernels(batches: ProteinBatches, size: str, precision: str) -> Pass:
    """Return the matrix products and attention of all layers, each on random numbers."""
    shape = PRESETS[size]
    h, n, f = shape.hidden_size, shape.num_attention_heads, shape.ffn_hidden_size
    layers = [
        [
            (
                torch.randn(outputs, inputs, dtype=DTYPES[precision]),
                torch.randn(outputs, dtype=DTYPES[precision]),
            )
            for outputs, inputs in ((3 * h, h), (h, h), (f, h), (h, f))
        ]
        for _ in range(shape.num_layers)
    ]
    counted = [[len(protein) + 2 for protein in batch] for batch in batches]
    inputs = [torch.randn(sum(lengths), h, dtype=DTYPES[precision]) for lengths in counted]

    @torch.inference_mode()
    def multiply() -> None:
        for x, lengths in zip(inputs, counted, strict=True):
            for qkv, proj, fc1, fc2 in layers:
                for part in linear(x, *qkv).view(len(x), n, 3, -1).split(lengths):
                    # [l, n, d] -> [1, n, l, d]
                    scaled_dot_product_attention(*(one.transpose(0, 1)[None] for one in part.unbind(2)))
                linear(x, *proj)
                linear(linear(x, *fc1), *fc2)

    return Pass(multiply, sum(map(sum, counted)))


def measure(batches: ProteinBatches, size: str, precision: str, rounds: int) -> dict[str, list[float]]:
    """Let the contenders take turns; a round before the counted ones warms up."""
    proteins = [protein for batch in batches for protein in batch]
    with process_groups(ParallelConfig(), seed=1) as ranks:
        passes = {
            "fair-esm": fair_esm_embedding(batches, size, precision, CPU),
            "hf-sorted": hf_embedding(batches, size, precision, CPU),
            "esm2mega": embedding_pass(size, precision, proteins, ranks),
            "kernels": kernels(batches, size, precision),
        }

        def told(name: str, number: int, rate: float) -> None:
            note = f"round {number} of {rounds}" if number else "warm-up"
            print(f"{size:>5} {precision} {name:<10} {note}: {rate:,.0f} tokens/s", flush=True)

        turns = take_turns({n: lambda _, work=work: work for n, work in passes.items()}, rounds, told)
    return {name: one.rates for name, one in turns.items()}


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Return the medians, and how many times the peers' rate that of esm2mega is."""
    lines = [f"{'':>5} {'contender':<10} {'tokens/s':>9} {'spread':>15} {'esm2mega is':>12}"]
    for precision, rates in results.items():
        for name, theirs in rates.items():
            within_rounds = ratios(rates["esm2mega"], theirs)
            ratio = "" if name == "esm2mega" else f"{statistics.median(within_rounds):.2f} x"
            spread = f"{min(theirs):,.0f}-{max(theirs):,.0f}"
            lines.append(
                f"{precision:>5} {name:<10} {statistics.median(theirs):9,.0f} {spread:>15} {ratio:>12}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description="Embedding throughput beside fair-esm and Hugging Face.")
    parser.add_argument("fasta", nargs="?", type=Path, default=DEFAULT_FASTA, help="proteins to embed")
    parser.add_argument("--size", default="35M", choices=list(PRESETS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, default=8, help="drawn from those of the FASTA; 0 for all")
    parser.add_argument("--max-residues", type=int, default=1022, help="longer proteins are cut")
    parser.add_argument("--rounds", type=int, default=3, help="passes of every contender")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    if not options.fasta.exists():
        parser.error(f"no FASTA file at {options.fasta}: name one")
    # A GPU would be taken by some contenders and not by others.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(options.threads)
    try:
        proteins = read_proteins(options.fasta, options.max_residues)
        batches = draw_batches(proteins, options.batches, options.seed)
    except UserError as error:
        parser.error(str(error))
    tokens = sum(len(protein) + 2 for batch in batches for protein in batch)
    description = {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "fair-esm", "megatron-core")},
        "size": options.size,
        "batches": len(batches),
        "proteins": sum(map(len, batches)),
        "tokens": tokens,
        "padding": 1 - tokens / sum(pad_tokens(batch).numel() for batch in batches),
        "max_residues": options.max_residues,
        "rounds": options.rounds,
        "seed": options.seed,
    }
    print(json.dumps(description))
    results = {p: measure(batches, options.size, p, options.rounds) for p in options.precisions}
    print(table(results))
    if options.json is not None:
        options.json.write_text(json.dumps({**description, "tokens_per_second": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
