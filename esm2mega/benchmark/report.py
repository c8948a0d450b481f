"""Shows what a benchmark measured as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from esm2mega.benchmark.breakdown import PHASES
from esm2mega.benchmark.turns import spread

Result = Mapping[str, Any]
"""Is what `benchmark.json` holds."""


def report_lines(result: Result) -> list[str]:
    """Return conditions, and a table for each section: medians, with the least and the greatest value."""
    return [
        *_conditions(result),
        *_machine(result),
        *_data(result["data"]),
        *_contests(result),
        *_steps(result),
    ]


def _conditions(result: Result) -> Iterator[str]:
    here, chosen, proteins = result["conditions"], result["settings"], result["proteins"]
    versions = ", ".join(f"{name} {found}" for name, found in here["versions"].items())
    what = here["processor"] if here["device"] == "cpu" else here["device"]
    threads = f"{here['threads']} thread{'s' * (here['threads'] > 1)}"
    yield f"{what}, {threads}, {here['cores']} cores, {here['memory_gb']:.0f} GB"
    yield f"python {here['python']}, {versions}"
    yield (
        f"{chosen['model']}, batches of {chosen['tokens']} tokens, {chosen['rounds']} rounds, proteins "
        f"{proteins['source']}, {proteins['mean_tokens']:.0f} tokens on average"
    )


def _machine(result: Result) -> Iterator[str]:
    machine = result["machine"]
    rows = [
        [row["product"], *_giga(row["operations_per_second"])]
        for row in machine["products"]
        if row["is_peak"]
    ]
    rows.append(["copy, read and written", *_giga(machine["copy_bytes_per_second"])])
    yield from _table("fastest products, GFLOP/s, and a copy, GB/s", ["what", "median", "spread"], rows)
    for name, reason in machine["products_absent"].items():
        yield f"{name} has no product here: {reason}"


def _data(data: Result) -> Iterator[str]:
    rows = [[name.replace("_", " "), *_whole(rates)] for name, rates in data.items()]
    yield from _table("data", ["what", "median", "spread"], rows)


def _contests(result: Result) -> Iterator[str]:
    for section in ("training", "embedding"):
        contest = result[section]
        precisions = list(dict.fromkeys(name for row in contest["rows"] for name in row["ours_is"]))
        heads = ["contender", "precision", "tokens/s", "spread", "computed", "of product"]
        rows = [
            [
                *(row["contender"], row["precision"], *_whole(row["tokens_per_second"])),
                f"{row['computed_per_real']:.2f} x",
                "" if row["share_of_product"] is None else f"{spread(row['share_of_product']).median:.0%}",
                *(_times(row["ours_is"].get(precision)) for precision in precisions),
            ]
            for row in contest["rows"]
        ]
        title = f"{section} of {contest['proteins']} proteins, {contest['tokens']:,} tokens"
        yield from _table(title, [*heads, *(f"esm2mega {p} is" for p in precisions)], rows)
        for name, reason in contest["failed"].items():
            yield f"{name} failed: {reason}"
        for row in (row for row in contest["rows"] if "operations" in row):
            listed = [[one["name"], str(one["calls"]), f"{one['share']:.1%}"] for one in row["operations"]]
            title = f"longest operations of {row['contender']} in {section}, {row['precision']}"
            yield from _table(title, ["name", "calls", "share"], listed)


def _steps(result: Result) -> Iterator[str]:
    rows = [
        [
            row["precision"],
            f"{row['step_seconds']['median']:.3f}",
            *(f"{row['shares'][phase]:.1%}" for phase in PHASES),
        ]
        for row in result["steps"]
    ]
    yield from _table("a training step of esm2mega", ["precision", "seconds", *PHASES], rows)


def _giga(rates: Sequence[float]) -> list[str]:
    middle, low, high = (value / 1e9 for value in spread(rates))
    return [f"{middle:,.1f}", f"{low:,.1f}-{high:,.1f}"]


def _whole(rates: Sequence[float]) -> list[str]:
    middle, low, high = spread(rates)
    return [f"{middle:,.0f}", f"{low:,.0f}-{high:,.0f}"]


def _times(found: Sequence[float] | None) -> str:
    if found is None:
        return ""
    middle, low, high = spread(found)
    return f"{middle:.2f} x ({low:.2f}-{high:.2f})"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield an empty line, the title, and the rows in columns; the first column is words."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    yield from ("", title)
    for row in (header, *rows):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join([first.strip().ljust(widths[0]), *rest]).rstrip()
