"""Measures the sections of a benchmark: products and copies, data, training, embedding, parts of steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from esm2mega.benchmark import data
from esm2mega.benchmark.breakdown import breakdown
from esm2mega.benchmark.contenders import OURS, Contender, Makers, Settings
from esm2mega.benchmark.ours import state_of
from esm2mega.benchmark.products import DTYPES, copy, product
from esm2mega.benchmark.profile import operations_of
from esm2mega.benchmark.proteins import Protein
from esm2mega.benchmark.turns import Pass, Prepare, Turns, failure_of, ratios, spread, take_turns
from esm2mega.config.presets import PRESETS
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.loader import TrainStream
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.progress import Progress

LISTED_OPERATIONS = 12
"""Is how many operations of a contender are named."""

Peaks = dict[str, Pass]
"""Holds the fastest product of each precision."""


def _measured(
    section: str, contenders: Mapping[str, Prepare], rounds: int, guests: Collection[str] = ()
) -> dict[str, Turns]:
    with Progress(len(contenders) * (rounds + 1), section, "pass") as progress:
        return take_turns(contenders, rounds, lambda name, *_: progress.update(1, last=name), guests)


def measure_machine(settings: Settings, device: torch.device) -> tuple[dict[str, Any], Peaks]:
    """Measure products of each precision, square ones and those of a layer, and a copy.

    Returns:
        The figures, and the fastest products, beside which training and embedding are measured.
    """
    shape, t = PRESETS[settings.model], settings.tokens
    h, f = shape.hidden_size, shape.ffn_hidden_size
    n = 8192 if device.type == "cuda" else max(256, min(2048, t))
    products: dict[str, tuple[str, Pass]] = {}
    absent = {}
    for name, dtype in DTYPES.items():
        for m, k, columns in ((n, n, n), (t, h, 3 * h), (t, h, h), (t, h, f), (t, f, h)):
            try:
                work = product(m, k, columns, dtype, device)
            except RuntimeError as error:
                absent[name] = str(error).partition("\n")[0]
                break
            products[f"{name} [{m}, {k}] x [{k}, {columns}]"] = name, work
    size = 2**30 if device.type == "cuda" else min(2**28, 2**16 * t)
    contenders = {name: _same(work) for name, (_, work) in products.items()}
    turns = _measured("machine", {**contenders, "copy": _same(copy(size, device))}, settings.rounds)
    peaks, rows = {}, []
    for name in DTYPES:
        rates = {key: turns[key].rates for key, (precision, _) in products.items() if precision == name}
        if not rates:
            continue
        best = max(rates.items(), key=lambda pair: spread(pair[1]).median)[0]
        peaks[name] = products[best][1]
        rows += [
            {"product": key, "precision": name, "operations_per_second": values, "is_peak": key == best}
            for key, values in rates.items()
        ]
    result = {
        "products": rows,
        "products_absent": absent,
        "copy_bytes_per_second": turns["copy"].rates,
    }
    return result, peaks


def _same(work: Pass) -> Prepare:
    return lambda number: work


def measure_data(
    settings: Settings, proteins: Sequence[Protein], folder: Path
) -> tuple[dict[str, list[float]], TokenStore]:
    """Measure preparing a store, building batches and the loader, each alone in one process.

    Args:
        settings: Whose packs are built.
        proteins: To prepare.
        folder: For the files.

    Returns:
        Residues or tokens per second of each, and the store.
    """
    fasta = data.write_fasta(folder / "proteins.fasta", proteins)
    data.prepare_fasta([fasta], folder / "store")
    store, spec = TokenStore(folder / "store" / "train"), _spec(settings)
    packs = 64 * settings.steps
    preparing = data.preparing(fasta, folder / "again", sum(map(len, proteins)))
    with ExitStack() as stack:
        contenders: dict[str, Prepare] = {
            "prepare_residues_per_second": _same(preparing),
            "build_tokens_per_second": _same(data.building(store, spec, packs)),
            "load_tokens_per_second": lambda number: stack.enter_context(data.loading(store, spec, packs)),
        }
        turns = _measured("data", contenders, settings.rounds)
    return {name: one.rates for name, one in turns.items()}, store


def _spec(settings: Settings) -> BatchSpec:
    run = settings.run(settings.precisions[0])
    return BatchSpec(run.data, settings.tokens, settings.seed)


def measure_contenders(
    section: str, makers: Makers, peaks: Peaks, flops_per_token: float, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Let contenders take turns, with the fastest product of each precision among them.

    Another program that raises an error is left out, since what the others do is of use without it.

    Args:
        section: Shown with the progress.
        makers: The contenders.
        peaks: The fastest products.
        flops_per_token: Operations of the model for each real token.
        rounds: Counted passes of each contender.

    Returns:
        A row for each contender: real tokens per second round by round; computed tokens for each real one;
        the share of the product of its precision; and, by precision, how many times its rate that of
        our model is. Rows of our model have its longest operations in one more pass too, with the share
        of each of the time of all. And the error of each contender that has no row.
    """
    contenders, failed = {}, {}
    for contender, make in makers.items():
        try:
            contenders[str(contender)] = make()
        except Exception as error:  # whatever another program raises
            if contender.program == OURS:
                raise
            failed[str(contender)] = failure_of(error)
    used = {contender.precision for contender in makers} & peaks.keys()
    products = {f"product {name}": _same(peaks[name]) for name in sorted(used)}
    guests = [str(contender) for contender in makers if contender.program != OURS]
    turns = _measured(section, {**contenders, **products}, rounds, guests)
    failed |= {name: one.failure for name, one in turns.items() if one.failure}
    ours = {one.precision: turns[str(one)].rates for one in makers if one.program == OURS}
    rows = []
    for contender in makers:
        if str(contender) in failed:
            continue
        one = turns[str(contender)]
        beside = turns.get(f"product {contender.precision}")
        share = None if beside is None else [flops_per_token * r for r in ratios(one.rates, beside.rates)]
        rows.append(
            {
                "contender": contender.program,
                "precision": contender.precision,
                "tokens_per_second": one.rates,
                "computed_per_real": sum(one.computed) / len(one.computed),
                "share_of_product": share,
                "ours_is": {
                    precision: ratios(rates, one.rates)
                    for precision, rates in ours.items()
                    if contender != Contender(OURS, precision)
                },
            }
        )
        if contender.program == OURS:
            rows[-1]["operations"] = _longest(contenders[str(contender)])
    return rows, failed


def _longest(prepare: Prepare) -> list[dict[str, Any]]:
    """Return the longest operations of a pass, by name, calls, and share of the time of all."""
    found = operations_of(prepare(0).run)
    busy = sum(one.seconds for one in found)
    return [
        {"name": one.name, "calls": one.calls, "share": one.seconds / busy}
        for one in found[:LISTED_OPERATIONS]
    ]


def measure_steps(settings: Settings, store: TokenStore, ranks: Ranks) -> list[dict[str, Any]]:
    """Divide steps of our model, with the real loader, among what they do, in each precision."""
    rows = []
    with Progress(len(settings.precisions), "step", "precision") as progress:
        for precision in settings.precisions:
            state = state_of(settings.run(precision), ranks)
            with TrainStream([store], _spec(settings)) as stream:
                parts = breakdown(state, stream, 1, settings.steps * settings.rounds)
            rows.append({"precision": precision, **parts})
            progress.update(1)
    return rows
