"""Shows the results of a suite as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from esm2mega.autoeval.results import RESULTS_CSV
from esm2mega.report.results.page import PAGE
from esm2mega.report.results.suite import RESULTS_JSON


def lines(results: Mapping[str, Any], out: str) -> Iterator[str]:
    """Return a table for each task, and where the files are."""
    for task in results["tasks"]:
        counts = ", ".join(f"{count:,} {split}" for split, count in task["num_proteins"].items())
        limited = " (fewer than published)" if task["limited"] else ""
        if (kept := task["first_residues"]) is not None:
            limited += f", their first {kept} residues"
        yield f"{task['task']}: {task['metric']}" + (f", {counts} proteins{limited}" if counts else "")
        if (leakage := task["leakage"]) is not None:
            yield f"  {leakage['pairs']:,} pairs of related proteins in different splits"
        for row in task["rows"]:
            yield f"  {_name(row):<44} {_value(row)}"
        if not any(row["row"] == "published" for row in task["rows"]):
            yield f"  {'published':<44} none published"
        for each in task["differences"]:
            verdict = "differs" if each["shown"] else "within the noise"
            yield (
                f"  {each['b']['model']} - {each['a']['model']}, {each['a']['mode']}: "
                f"{_signed(each['difference'])} [{_signed(each['low'])}, {_signed(each['high'])}], {verdict}"
            )
    yield f"{Path(out) / PAGE}, {RESULTS_JSON}, {RESULTS_CSV}"


def _name(row: Mapping[str, Any]) -> str:
    if row["row"] == "baseline":
        return f"baseline: {row['baseline']}"
    mode = f", {row['mode']}" if row["mode"] else ""
    return f"{row['model']}{mode}" if row["row"] == "model" else f"published: {row['model']}{mode}"


def _value(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "not defined"
    value = f"{row['value']:.3f}"
    if row["row"] == "published":
        metric = f" ({row['metric']})"
        return value + metric + ("" if row["comparable"] else f", not comparable: {row['caveat']}")
    interval = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
    sd = row.get("seeds", {}).get("sd")
    return value + interval + ("" if sd is None else f", sd {sd:.3f} over seeds")


def _signed(value: float | None) -> str:
    return "not defined" if value is None else f"{value:+.3f}"
