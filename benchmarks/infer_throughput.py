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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from esm2mega import vocabulary
from esm2mega.config.load import load_run
from esm2mega.config.presets import PRESETS
from esm2mega.data.readers.fasta import FastaReader

DEFAULT_FASTA = Path(__file__).parents[2] / "shared/data/uniref_sample/uniref90_sample_8000.fasta"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The `--toks_per_batch` of fair-esm's extract.py, for all who pad.
PADDED_TOKENS = 4096

Protein = npt.NDArray[np.uint8]
"""Token ids of residues, without special tokens."""

Batches = Sequence[Sequence[Protein]]

Pass = Callable[[], int]
"""Embeds every protein once; returns how many residue vectors came out."""


def extract_batches(lengths: Sequence[int]) -> list[list[int]]:
    """The batches of extract.py, which counts one token more than there are residues, although there are two.

    Args:
        lengths: Residues of each protein.

    Returns:
        Places of the proteins, batch by batch, shortest first.
    """
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and (lengths[i] + 1) * (len(batches[-1]) + 1) > PADDED_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def draw_batches(fasta: Path, number: int, max_residues: int, seed: int) -> list[list[Protein]]:
    """One batch from each of `number` equal parts of all batches of a FASTA; 0 for all."""
    proteins = [vocabulary.encode_residues(record.residues[:max_residues]) for record in FastaReader(fasta)]
    batches = extract_batches([len(protein) for protein in proteins])
    number = number or len(batches)
    if number > len(batches):
        raise SystemExit(f"--batches {number} is more than the {len(batches)} of {fasta}")
    borders = np.linspace(0, len(batches), number + 1).astype(int)
    chosen = np.random.default_rng(seed).integers(borders[:-1], borders[1:])
    return [[proteins[number] for number in batches[i]] for i in chosen]


def pad(proteins: Sequence[Protein]) -> torch.Tensor:
    """Token ids with `<cls>` and `<eos>`, padded, [b, s]."""
    width = max(map(len, proteins)) + 2
    ids = torch.full((len(proteins), width), vocabulary.PAD)
    for row, residues in enumerate(proteins):
        ids[row, 0] = vocabulary.CLS
        ids[row, 1 : len(residues) + 1] = torch.from_numpy(residues.astype(np.int64))
        ids[row, len(residues) + 1] = vocabulary.EOS
    return ids


def padded_pass(batches: Batches, states: Callable[[torch.Tensor], torch.Tensor]) -> Pass:
    """Return the pass of a model that takes padded batches; `states` gives [b, s, h]."""
    padded = [(pad(batch), [len(protein) for protein in batch]) for batch in batches]

    @torch.inference_mode()
    def one_pass() -> int:
        count = 0
        for ids, lengths in padded:
            output = states(ids)
            count += sum(len(output[row, 1 : n + 1].float().clone()) for row, n in enumerate(lengths))
        return count

    return one_pass


@contextmanager
def fair_esm(batches: Batches, size: str, precision: str) -> Iterator[Pass]:
    """Yield fair-esm's pass."""
    import esm

    shape = PRESETS[size]
    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    model = esm.model.esm2.ESM2(
        num_layers=shape.num_layers,
        embed_dim=shape.hidden_size,
        attention_heads=shape.num_attention_heads,
        alphabet=alphabet,
    )
    model = model.to(DTYPES[precision]).eval()
    last = shape.num_layers
    yield padded_pass(batches, lambda ids: model(ids, repr_layers=[last])["representations"][last])


@contextmanager
def hf_sorted(batches: Batches, size: str, precision: str) -> Iterator[Pass]:
    """Yield the pass of Hugging Face's model."""
    from hf_model import config_of
    from transformers import EsmModel

    model = EsmModel(config_of(size), add_pooling_layer=False).to(DTYPES[precision]).eval()

    def states(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, attention_mask=(ids != vocabulary.PAD).long()).last_hidden_state

    yield padded_pass(batches, states)


@contextmanager
def esm2mega(batches: Batches, size: str, precision: str) -> Iterator[Pass]:
    """Yield the pass of `esm2mega embed`, without files."""
    from esm2mega.infer.engine import Engine, OutputRequest
    from esm2mega.infer.proteins import Embedder, Lengths, micro_batch_tokens
    from esm2mega.model.build import build_model
    from esm2mega.parallel.initialize import process_groups

    run = load_run(f"pretrain_esm2_{size}", [f"model.precision={precision}", "infer.outputs=[residue]"])
    proteins = [protein for batch in batches for protein in batch]
    proteins = [proteins[i] for i in np.random.default_rng(0).permutation(len(proteins))]
    limits = Lengths.of(run.infer, run.data)
    assert max(map(len, proteins)) <= limits.most_residues
    with process_groups(run.parallel, run.seed) as ranks:
        (model,) = build_model(run.model, run.parallel, ranks.device, run.seed)
        model.eval().requires_grad_(False)
        request = OutputRequest((PRESETS[size].num_layers,))
        engine = Engine(model, ranks, request, micro_batch_tokens(run.infer, limits, ranks.device))
        embedder = Embedder(engine, run.infer, limits, Path())
        name = f"residue/layer_{PRESETS[size].num_layers}"
        yield lambda: sum(len(values[name].float().clone()) for _, values in embedder.run(proteins, str))


@contextmanager
def kernels(batches: Batches, size: str, precision: str) -> Iterator[Pass]:
    """Yield the matrix products and attention of all layers, each on random numbers."""
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
    def one_pass() -> int:
        for x, lengths in zip(inputs, counted, strict=True):
            for qkv, proj, fc1, fc2 in layers:
                for part in linear(x, *qkv).view(len(x), n, 3, -1).split(lengths):
                    # [l, n, d] -> [1, n, l, d]
                    scaled_dot_product_attention(*(one.transpose(0, 1)[None] for one in part.unbind(2)))
                linear(x, *proj)
                linear(linear(x, *fc1), *fc2)
        return sum(sum(lengths) - 2 * len(lengths) for lengths in counted)

    yield one_pass


CONTENDERS = {"fair-esm": fair_esm, "hf-sorted": hf_sorted, "esm2mega": esm2mega, "kernels": kernels}


def measure(batches: Batches, size: str, precision: str, rounds: int) -> dict[str, list[float]]:
    """Let the contenders take turns; two proteins warm up caches and allocators, uncounted."""
    tokens = sum(len(protein) + 2 for batch in batches for protein in batch)
    residues = sum(len(protein) for batch in batches for protein in batch)
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with ExitStack() as stack:
        passes = {}
        for name, contender in CONTENDERS.items():
            with contender([batches[0][:2]], size, precision) as one_pass:
                one_pass()
            passes[name] = stack.enter_context(contender(batches, size, precision))
        for number in range(rounds):
            names = list(passes)[number % len(passes) :] + list(passes)[: number % len(passes)]
            for name in names:
                started = time.perf_counter()
                count = passes[name]()
                rate = tokens / (time.perf_counter() - started)
                assert count == residues, (name, count)
                print(
                    f"{size:>5} {precision} {name:<10} round {number + 1} of {rounds}: {rate:,.0f} tokens/s",
                    flush=True,
                )
                rates[name].append(rate)
    return rates


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Return the medians, and how many times the peers' rate that of esm2mega is."""
    lines = [f"{'':>5} {'contender':<10} {'tokens/s':>9} {'spread':>15} {'esm2mega is':>12}"]
    for precision, rates in results.items():
        for name, theirs in rates.items():
            ratios = [mine / other for mine, other in zip(rates["esm2mega"], theirs, strict=True)]
            ratio = "" if name == "esm2mega" else f"{statistics.median(ratios):.2f} x"
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
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
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
    batches = draw_batches(options.fasta, options.batches, options.max_residues, options.seed)
    tokens = sum(len(protein) + 2 for batch in batches for protein in batch)
    description = {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "fair-esm", "megatron-core")},
        "size": options.size,
        "batches": len(batches),
        "proteins": sum(map(len, batches)),
        "tokens": tokens,
        "padding": 1 - tokens / sum(pad(batch).numel() for batch in batches),
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
