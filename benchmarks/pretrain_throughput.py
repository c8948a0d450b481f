"""Training throughput beside Hugging Face `EsmForMaskedLM`: real tokens per second of whole optimizer steps.

    python benchmarks/pretrain_throughput.py proteins.fasta --sizes 8M 35M --json result.json

All contenders train on the same proteins, cut to the same length, in batches of the same number of proteins,
with the same masks, gradient clipping and AdamW, in fp32 on the same threads. They take turns, one pass over
the proteins each, so that a machine that gets slower or faster strikes all of them. Tokens are real ones with
`<cls>` and `<eos>`; padding is work, but counts as nothing.

    hf-random   padded batches of proteins in random order
    hf-sorted   padded batches of proteins of similar length
    esm2mega    the proteins of the hf-random batches, packed without padding
"""

from __future__ import annotations

import argparse
import itertools
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

from esm2mega.config.load import load_run
from esm2mega.config.presets import PRESETS
from esm2mega.config.schema import DataConfig
from esm2mega.data import tokenizer
from esm2mega.data.fasta import FastaReader
from esm2mega.data.loader import PackedBatch
from esm2mega.data.masking import MaskedTokens, mask_tokens

DEFAULT_FASTA = Path(__file__).parents[2] / "shared/data/uniref_sample/uniref90_sample_8000.fasta"
LEARNING_RATE = 1e-4
IGNORED_LABEL = -100

Pass = Callable[[], None]
"""Trains on every protein once."""


@dataclass(frozen=True)
class Workload:
    """The proteins as masked tokens, the same for every contender.

    Attributes:
        proteins: one entry per protein, `<cls>` and `<eos>` included.
        batches: protein numbers of each batch, in random order.
        sorted_batches: the same number of batches, of proteins of similar length, shuffled as batches.
    """

    proteins: list[MaskedTokens]
    batches: list[list[int]]
    sorted_batches: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Real tokens of one pass."""
        return sum(len(protein.input_ids) for protein in self.proteins)

    def padded_tokens(self, batches: Sequence[Sequence[int]]) -> int:
        """Tokens that padded batches compute."""
        return sum(len(batch) * max(len(self.proteins[i].input_ids) for i in batch) for batch in batches)


def make_workload(fasta: Path, proteins: int, max_residues: int, batch_size: int, seed: int) -> Workload:
    """Draw proteins from the FASTA without replacement, cut, mask and batch them."""
    records = [record.residues for record in FastaReader(fasta)]
    if proteins > len(records):
        raise SystemExit(f"--proteins {proteins} is more than the {len(records)} of {fasta}")
    rng = np.random.default_rng(seed)
    masked = []
    for number in rng.permutation(len(records))[:proteins]:
        residues = tokenizer.encode_residues(records[number][:max_residues])
        tokens = np.concatenate([[tokenizer.CLS], residues, [tokenizer.EOS]]).astype(np.uint8)
        stream = np.array([number])
        masked.append(mask_tokens(tokens, stream, np.array([len(tokens)]), seed, DataConfig()))
    by_length = sorted(range(proteins), key=lambda i: len(masked[i].input_ids))
    sorted_batches = _batched(by_length, batch_size)
    order = rng.permutation(len(sorted_batches))
    # The draw above is in random order already.
    return Workload(masked, _batched(range(proteins), batch_size), [sorted_batches[i] for i in order])


def _batched(numbers: Sequence[int], size: int) -> list[list[int]]:
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


@contextmanager
def hf_contender(size: str, workload: Workload, batches: list[list[int]]) -> Iterator[Pass]:
    """Yield one pass of `EsmForMaskedLM` over padded batches."""
    from transformers import EsmConfig, EsmForMaskedLM

    shape = PRESETS[size]
    torch.manual_seed(0)
    model = EsmForMaskedLM(
        EsmConfig(
            vocab_size=len(tokenizer.VOCAB),
            mask_token_id=tokenizer.MASK,
            pad_token_id=tokenizer.PAD,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            intermediate_size=shape.ffn_hidden_size,
            max_position_embeddings=1026,
            position_embedding_type="rotary",
            emb_layer_norm_before=False,
            token_dropout=True,
            # As in the published checkpoints; the class default is 0.1.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    padded = [_pad([workload.proteins[i] for i in batch]) for batch in batches]

    def one_pass() -> None:
        for input_ids, attention_mask, labels in padded:
            optimizer.zero_grad()
            model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    yield one_pass


def _pad(proteins: list[MaskedTokens]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids, attention mask (1 = keep) and labels, [b, s] each."""
    width = max(len(protein.input_ids) for protein in proteins)
    input_ids = torch.full((len(proteins), width), tokenizer.PAD)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, protein in enumerate(proteins):
        length = len(protein.input_ids)
        input_ids[row, :length] = torch.from_numpy(protein.input_ids)
        attention_mask[row, :length] = 1
        labels[row, torch.from_numpy(protein.label_positions)] = torch.from_numpy(protein.labels)
    return input_ids, attention_mask, labels


@contextmanager
def esm2mega_contender(size: str, workload: Workload, batches: list[list[int]]) -> Iterator[Pass]:
    """Yield one pass of esm2mega's own training step over packs of the same proteins."""
    from esm2mega.model.build import build_model
    from esm2mega.parallel.initialize import process_groups
    from esm2mega.train.losses import MLMLossReduction
    from esm2mega.train.optimizer import build_optimizer, build_schedule, wrap_data_parallel
    from esm2mega.train.step import TrainState, train_step

    run = load_run(f"pretrain_esm2_{size}", [f"optim.lr={LEARNING_RATE}", "model.precision=fp32"])
    with process_groups(run.parallel, run.seed) as ranks:
        chunks = build_model(run.model, run.parallel, ranks.device, run.seed)
        model = wrap_data_parallel(chunks, run.model, run.parallel)
        optimizer = build_optimizer(run.optim, run, model)
        schedule = build_schedule(run.schedule, run.optim, optimizer)
        state = TrainState(model, optimizer, schedule, MLMLossReduction(), ranks.device)
        packs = [_pack([workload.proteins[i] for i in batch]) for batch in batches]

        def one_pass() -> None:
            for pack in packs:
                train_step(state, [pack])

        yield one_pass


def _pack(proteins: list[MaskedTokens]) -> PackedBatch:
    """Return the proteins back to back."""
    lengths = [len(protein.input_ids) for protein in proteins]
    ends = list(itertools.accumulate(lengths, initial=0))
    positions = [protein.label_positions + start for protein, start in zip(proteins, ends, strict=False)]
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([protein.input_ids for protein in proteins])),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        seqlens=lengths,
        max_seqlen=max(lengths),
        label_positions=torch.from_numpy(np.concatenate(positions)),
        labels=torch.from_numpy(np.concatenate([protein.labels for protein in proteins])),
        num_tokens=ends[-1],
        num_residues=ends[-1] - 2 * len(proteins),
        num_sequences=len(proteins),
    )


@dataclass(frozen=True)
class Result:
    """One contender at one size."""

    size: str
    contender: str
    tokens_per_second: list[float]
    """Real tokens per second of each round."""
    median: float


def measure(size: str, workload: Workload, rounds: int) -> list[Result]:
    """Let the contenders take turns; the first pass of each warms up caches and allocators, uncounted."""
    contenders = {
        "hf-random": hf_contender(size, workload, workload.batches),
        "hf-sorted": hf_contender(size, workload, workload.sorted_batches),
        "esm2mega": esm2mega_contender(size, workload, workload.batches),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        passes = {name: stack.enter_context(contender) for name, contender in contenders.items()}
        for round_number in range(rounds + 1):
            for name, one_pass in passes.items():
                started = time.perf_counter()
                one_pass()
                rate = workload.num_tokens / (time.perf_counter() - started)
                note = "warm-up" if round_number == 0 else f"round {round_number} of {rounds}"
                print(f"{size:>5} {name:<10} {note}: {rate:,.0f} tokens/s", flush=True)
                if round_number > 0:
                    rates[name].append(rate)
    return [Result(size, name, values, statistics.median(values)) for name, values in rates.items()]


def table(results: list[Result]) -> str:
    """Return the medians, and how many times the peers' that of esm2mega is."""
    lines = [f"{'size':>5} {'contender':<10} {'tokens/s':>9} {'spread':>13} {'esm2mega is':>12}"]
    ours = {result.size: result.median for result in results if result.contender == "esm2mega"}
    for result in results:
        low, high = min(result.tokens_per_second), max(result.tokens_per_second)
        ratio = "" if result.contender == "esm2mega" else f"{ours[result.size] / result.median:.2f} x"
        spread = f"{low:,.0f}-{high:,.0f}"
        lines.append(
            f"{result.size:>5} {result.contender:<10} {result.median:9,.0f} {spread:>13} {ratio:>12}"
        )
    return "\n".join(lines)


def describe(workload: Workload, options: argparse.Namespace) -> dict[str, object]:
    """Return what a reader needs to judge the numbers."""
    return {
        "processor": _processor(),
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "megatron-core")},
        "proteins": len(workload.proteins),
        "proteins_per_batch": options.batch_size,
        "max_residues": options.max_residues,
        "real_tokens": workload.num_tokens,
        "computed_tokens": {
            "hf-random": workload.padded_tokens(workload.batches),
            "hf-sorted": workload.padded_tokens(workload.sorted_batches),
            "esm2mega": workload.num_tokens,
        },
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
    parser.add_argument("--proteins", type=int, default=48, help="drawn at random from the FASTA")
    parser.add_argument("--batch-size", type=int, default=8, help="proteins per batch")
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

    workload = make_workload(
        options.fasta, options.proteins, options.max_residues, options.batch_size, options.seed
    )
    setting = describe(workload, options)
    print(json.dumps(setting, indent=1))
    results = [result for size in options.sizes for result in measure(size, workload, options.rounds)]
    print(table(results))
    if options.json is not None:
        text = json.dumps({**setting, "results": [asdict(result) for result in results]}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
