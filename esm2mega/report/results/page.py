"""Writes `results.html`: every number of a suite with its interval, what stands beside it, and pictures.

The page is one file without scripts and without anything from elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from esm2mega.files import OTHER_OUT, replacing
from esm2mega.report.results.charts import CurvePoint, bar, confusion, curves, scatter
from esm2mega.report.results.predictions import classes_of, numbers_of, read_rows
from esm2mega.report.style import STYLE

PAGE = "results.html"

_WORST = 10
_NO_FIGURE = "none published"

Row = Mapping[str, Any]


def write_results_page(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the page of a suite.

    Args:
        results: Content of ``results.json``.
        folder: Folder of the results, with the files of predictions.

    Returns:
        Path of the page.
    """
    body = "\n".join([_head(results), *(_task(task, results, folder) for task in results["tasks"])])
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Benchmarks - esm2mega</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<footer>esm2mega {escape(results['esm2mega'])}, seed {results['seed']}. Lines are 95 % intervals "
        "by resampling the test proteins; rows in italics cannot be compared with the others.</footer>\n"
        "</body>\n</html>\n"
    )
    with replacing(folder / PAGE, OTHER_OUT) as partial:
        partial.write_text(page, encoding="utf-8")
    return folder / PAGE


def _head(results: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(model['name'])}</th><td>{_count(model['parameters'])}</td>"
        f"<td>{'' if model['step'] is None else format(model['step'], ',')}</td>"
        f"<td><code>{escape(model['weights_sha256'][:12])}</code></td>"
        f"<td>{escape(model['checkpoint'])}</td></tr>"
        for model in results["models"]
    )
    heads = "".join(f"<th scope=col>{name}</th>" for name in ("model", "weights", "step", "sha256", "from"))
    table = f"<div class=scroll><table><tr>{heads}</tr>{rows}</table></div>"
    return f"<h1>Benchmarks</h1>\n{table}\n{_overview(results)}"


def _overview(results: Mapping[str, Any]) -> str:
    """Return a table with a row for each task and mode, and a column for each model."""
    models = [model["name"] for model in results["models"]]
    heads = "".join(f"<th scope=col>{escape(name)}</th>" for name in models)
    lines = []
    for task in results["tasks"]:
        rows = [row for row in task["rows"] if row["row"] == "model"]
        limits = _limits(task)
        best = _best([row for row in task["rows"] if row["row"] == "baseline"], task["less_is_better"])
        for mode in dict.fromkeys(row["mode"] for row in rows):
            of_model = {row["model"]: row for row in rows if row["mode"] == mode}
            cells = "".join(f"<td>{_measured(of_model[name], limits, 'model')}</td>" for name in models)
            beside = (
                "" if best is None else f"{_measured(best, limits, 'baseline')} {escape(best['baseline'])}"
            )
            lines.append(
                f'<tr><th scope=row><a href="#{_slug(task)}">{escape(task["task"])}</a> '
                f"<small>{escape(mode)}, {escape(task['metric'])}</small></th>{cells}<td>{beside}</td></tr>"
            )
    return (
        f"<div class=scroll><table><tr><th scope=col>task</th>{heads}<th scope=col>best baseline</th></tr>"
        f"{''.join(lines)}</table></div>"
    )


def _task(task: Mapping[str, Any], results: Mapping[str, Any], folder: Path) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in task["num_proteins"].items())
    facts = [f"{task['metric']}{', less is better' if task['less_is_better'] else ''}"]
    facts += [f"proteins: {counts}"] * bool(counts)
    if task["limited"]:
        facts.append("fewer proteins than published, chosen by the seed: not the benchmark itself")
    if task.get("first_residues") is not None:
        facts.append(f"the first {task['first_residues']} residues of each protein")
    if (leakage := task["leakage"]) is not None:
        facts.append(
            f"{leakage['pairs']:,} pairs of related proteins in different splits "
            f"({escape(leakage['method'])}, identity from {leakage['threshold']:.0%})"
        )
    parts = [
        f'<section id="{_slug(task)}"><h2>{escape(task["task"])}</h2><p>{"; ".join(facts)}</p>',
        _rows(task),
        _differences(task),
        f'<div class="pictures">{"".join(_pictures(task, results, folder))}</div>',
        _commands(task),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _rows(task: Mapping[str, Any]) -> str:
    limits, lines = _limits(task), []
    notes: list[str] = []
    for row in _sorted(task):
        kind, note = row["row"], row.get("note") or row.get("caveat")
        comparable = row.get("comparable", True)
        mark = ""
        if note:
            if note not in notes:
                notes.append(note)
            mark = f"<sup>{notes.index(note) + 1}</sup>"
        drawn = _measured(row, limits if comparable else None, kind)
        name = escape(row["baseline"] if kind == "baseline" else row["model"])
        metric = row.get("metric", task["metric"])
        other = f" <small>{escape(metric)}</small>" if metric != task["metric"] else ""
        spread = row.get("seeds", {}).get("sd")
        spread = "" if spread is None else f" <small>sd {spread:.3f} over seeds</small>"
        source = f"<small>{escape(row['source'])}</small>" if kind == "published" else ""
        lines.append(
            f'<tr class="{kind}{"" if comparable else " apart"}"><td>{escape(kind)}</td><th scope=row>{name}'
            f"{mark}</th><td>{escape(row.get('mode') or '')}</td><td>{drawn}{other}{spread}</td>"
            f"<td>{source}</td></tr>"
        )
    if not any(row["row"] == "published" for row in task["rows"]):
        lines.append(f"<tr><td>published</td><td colspan=4>{_NO_FIGURE}</td></tr>")
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    notes_list = f"<ol class=notes>{listed}</ol>" if notes else ""
    heads = "".join(
        f"<th scope=col>{name}</th>" for name in ("", "", "mode", escape(task["metric"]), "source")
    )
    return f"<div class=scroll><table><tr>{heads}</tr>{''.join(lines)}</table></div>{notes_list}"


def _sorted(task: Mapping[str, Any]) -> list[Row]:
    """Return models, baselines and published figures, the best of each first; figures apart come last."""

    def key(row: Row) -> tuple[Any, ...]:
        value = row["value"]
        sign = 1 if task["less_is_better"] else -1
        apart = not row.get("comparable", True)
        kinds = ("model", "baseline", "published")
        return kinds.index(row["row"]), apart, value is None, 0 if value is None or apart else sign * value

    return sorted(task["rows"], key=key)


def _differences(task: Mapping[str, Any]) -> str:
    lines = []
    for each in task["differences"]:
        a, b, words = each["a"]["model"], each["b"]["model"], "not defined"
        if each["difference"] is not None:
            interval = "" if each["low"] is None else f" [{each['low']:+.3f}, {each['high']:+.3f}]"
            verdict = "differs" if each["shown"] else "within the noise"
            words = f"{each['difference']:+.3f}{interval}: {verdict}"
        lines.append(f"<li>{escape(b)} - {escape(a)}, {escape(each['a']['mode'])}: {words}</li>")
    if not lines:
        return ""
    return f"<details><summary>{len(lines)} paired differences</summary><ul>{''.join(lines)}</ul></details>"


def _pictures(task: Mapping[str, Any], results: Mapping[str, Any], folder: Path) -> Iterator[str]:
    models = [row for row in task["rows"] if row["row"] == "model"]
    if curve := _curve(models, results):
        yield curves(curve, "over pretraining", task["metric"])
    shown = _best([row for row in models if row["predictions"]], task["less_is_better"])
    if shown is None:
        return
    rows = read_rows(folder / shown["predictions"])
    title = f"{shown['model']}, {shown['mode']}"
    found: Any = None
    if task["kind"] == "regression":
        if (found := numbers_of(rows)) is not None:
            yield scatter(found, title)
    elif task["kind"] in ("classification", "token_classification"):
        per_residue = task["kind"] == "token_classification"
        if (found := classes_of(rows, per_residue)) is not None and len(found.names) <= 20:
            yield confusion(found, title)
    if found is not None and (worst := found.worst(_WORST)):
        lines = "".join(
            f"<tr><th scope=row>{escape(name)}</th><td>{escape(known)}</td><td>{escape(predicted)}</td></tr>"
            for name, known, predicted in worst
        )
        heads = "<tr><th scope=col>protein</th><th scope=col>known</th><th scope=col>predicted</th></tr>"
        yield (
            f"<figure><figcaption>Largest errors of {escape(title)}</figcaption><div class=scroll><table>"
            f"{heads}{lines}</table></div></figure>"
        )


def _curve(models: Sequence[Row], results: Mapping[str, Any]) -> dict[str, list[CurvePoint]]:
    """Return a curve for each mode in which several models have a step and a value."""
    steps = {model["name"]: model["step"] for model in results["models"]}
    found: dict[str, list[CurvePoint]] = defaultdict(list)
    for row in models:
        step, value = steps[row["model"]], row["value"]
        if step is not None and value is not None:
            low, high = (value if row[name] is None else row[name] for name in ("low", "high"))
            found[row["mode"]].append((step, value, low, high))
    return {mode: points for mode, points in found.items() if len({point[0] for point in points}) > 1}


def _commands(task: Mapping[str, Any]) -> str:
    lines = dict.fromkeys(command for row in task["rows"] for command in row.get("commands", ()))
    text = escape("\n".join(lines))
    return f"<details><summary>Commands</summary><pre>{text}</pre></details>" if lines else ""


def _limits(task: Mapping[str, Any]) -> tuple[float, float]:
    """Return the ends of the axis of all bars of a task."""
    numbers = [
        row[name]
        for row in task["rows"]
        if row.get("comparable", True)
        for name in ("value", "low", "high")
        if row.get(name) is not None
    ]
    return min([0.0, *numbers]), max([0.0, *numbers])


def _measured(row: Row, limits: tuple[float, float] | None, kind: str) -> str:
    if row["value"] is None:
        return "<span class=value>not defined</span>"
    low, high = row.get("low"), row.get("high")
    interval = "" if low is None else f" <small>{low:.3f} to {high:.3f}</small>"
    drawn = "" if limits is None else bar(row["value"], low, high, limits, kind)
    return f"<span class=value>{row['value']:.3f}</span>{drawn}{interval}"


def _best(rows: Sequence[Row], less_is_better: bool) -> Row | None:
    known = [row for row in rows if row["value"] is not None]
    choose = min if less_is_better else max
    return choose(known, key=lambda row: row["value"]) if known else None


def _slug(task: Mapping[str, Any]) -> str:
    return escape(task["task"].replace("/", "-").replace(":", "-"))


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"
