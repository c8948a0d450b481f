"""Shows the rows of the results as tables: values with bars and intervals, notes, and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from esm2mega.report.results.charts import Limits, bar, breakable, scrolling

_NO_FIGURE = "none published"
_KINDS = {"model": "Models", "baseline": "Baselines", "published": "Published"}

Row = Mapping[str, Any]


def overview(results: Mapping[str, Any]) -> str:
    """Return a table with a row for each task and mode, and a column for each model."""
    models = [model["name"] for model in results["models"]]
    beside = ("best baseline", "best published")
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("task", *models, *beside))
    lines = []
    for task in results["tasks"]:
        limits, less = _limits(task), task["less_is_better"]
        of_kind = {kind: [row for row in task["rows"] if row["row"] == kind] for kind in _KINDS}
        known = best_of(of_kind["baseline"], less)
        comparable = [
            row for row in of_kind["published"] if row["comparable"] and row["metric"] == task["metric"]
        ]
        published = best_of(comparable, less)
        others = (
            ""
            if known is None
            else f"{_measured(known, limits, 'baseline')} <small>{escape(known['baseline'])}</small>"
        )
        figure = _NO_FIGURE if not of_kind["published"] else "none that compares, see below"
        if published is not None:
            figure = (
                f"{_measured(published, limits, 'published')} <small>{escape(published['model'])}</small>"
            )
        for mode in dict.fromkeys(row["mode"] for row in of_kind["model"]):
            of_model = {row["model"]: row for row in of_kind["model"] if row["mode"] == mode}
            cells = "".join(f"<td>{_measured(of_model[name], limits, 'model')}</td>" for name in models)
            lines.append(
                f'<tr><th scope="row"><a href="#{slug_of(task)}">{breakable(task["task"])}</a><br>'
                f"<small>{escape(mode)}, {escape(task['metric'])}{', less is better' * less}</small></th>"
                f"{cells}<td>{others}</td><td>{figure}</td></tr>"
            )
    return scrolling(f"<tr>{heads}</tr>{''.join(lines)}", "All tasks", "overview")


def rows_of(task: Mapping[str, Any]) -> str:
    """Return the table of a task: models, baselines and published figures, the best of each first.

    Notes stand below the table, where a reader of a printed page sees them too.
    """
    limits, lines = _limits(task), []
    notes: list[str] = []
    for kind, title in _KINDS.items():
        lines.append(f'<tr class="kind"><th scope="colgroup" colspan="2">{title}</th></tr>')
        rows = [row for row in task["rows"] if row["row"] == kind]
        lines += [_line(row, task, limits, notes) for row in sorted(rows, key=lambda row: _rank(row, task))]
        if kind == "published" and not rows:
            lines.append(f'<tr><td colspan="2">{_NO_FIGURE}</td></tr>')
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    notes_list = f'<ol class="notes">{listed}</ol>' if notes else ""
    heads = f'<tr><th scope="col">name</th><th scope="col">{escape(task["metric"])}</th></tr>'
    return scrolling(f"{heads}{''.join(lines)}", f"Results of {task['task']}", "rows") + notes_list


def _line(row: Row, task: Mapping[str, Any], limits: Limits, notes: list[str]) -> str:
    """Return a row of the table, and enter its note into `notes`."""
    kind, comparable, mark = row["row"], row.get("comparable", True), ""
    if note := row.get("note") or row.get("caveat"):
        if note not in notes:
            notes.append(note)
        mark = f"<sup>{notes.index(note) + 1}</sup>"
    name = breakable(row["baseline"] if kind == "baseline" else row["model"])
    about = [text for text in (row.get("mode"), row.get("source")) if text]
    small = f"<br><small>{escape(', '.join(about))}</small>" if about else ""
    metric = row.get("metric", task["metric"])
    other = f" <small>{escape(metric)}</small>" if metric != task["metric"] else ""
    spread = row.get("seeds", {}).get("sd")
    seeds = (
        "" if spread is None else f" <small>sd {spread:.3f} over {len(row['seeds']['values'])} seeds</small>"
    )
    value = _measured(row, limits if comparable and not other else None, kind)
    look = "" if comparable else ' class="apart"'
    return f'<tr{look}><th scope="row">{name}{mark}{small}</th><td>{value}{other}{seeds}</td></tr>'


def _rank(row: Row, task: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what sorts rows: figures that cannot be compared last, and values that are not defined."""
    value, sign = row["value"], 1 if task["less_is_better"] else -1
    apart = not row.get("comparable", True)
    return apart, value is None, 0 if value is None or apart else sign * value


def differences(task: Mapping[str, Any]) -> str:
    """Return the paired differences between models; nothing where there are none."""
    lines = []
    for each in task["differences"]:
        a, b, words, interval = each["a"], each["b"], "not defined", ""
        if each["difference"] is not None:
            words = f"{each['difference']:+.3f}"
            if each["low"] is not None:
                interval = f" <small>{each['low']:+.3f} to {each['high']:+.3f}</small>"
        verdict = "differs" if each["shown"] else "within the noise"
        name = f"{breakable(b['model'])} - {breakable(a['model'])}<br><small>{escape(a['mode'])}</small>"
        lines.append(
            f'<tr><th scope="row">{name}</th><td>{words}{interval}</td>'
            f"<td>{'' if each['difference'] is None else verdict}</td></tr>"
        )
    if not lines:
        return ""
    heads = "".join(
        f'<th scope="col">{name}</th>' for name in ("models", "difference", "on the same proteins")
    )
    table = scrolling(f"<tr>{heads}</tr>{''.join(lines)}", "Paired differences")
    summary = f"{len(lines)} paired difference{'s' * (len(lines) > 1)}"
    return f"<details open><summary>{summary}</summary>{table}</details>"


def best_of(rows: Sequence[Row], less_is_better: bool) -> Row | None:
    """Return the row with the best value; None where no value is defined."""
    known = [row for row in rows if row["value"] is not None]
    choose = min if less_is_better else max
    return choose(known, key=lambda row: row["value"]) if known else None


def slug_of(task: Mapping[str, Any]) -> str:
    """Return the name of a task as the target of a link."""
    return escape(task["task"].replace("/", "-").replace(":", "-"))


def _limits(task: Mapping[str, Any]) -> Limits:
    """Return the ends of the axis of all bars of a task."""
    numbers = [
        row[name]
        for row in task["rows"]
        if row.get("comparable", True) and row.get("metric", task["metric"]) == task["metric"]
        for name in ("value", "low", "high")
        if row.get(name) is not None
    ]
    return min([0.0, *numbers]), max([0.0, *numbers])


def _measured(row: Row, limits: Limits | None, kind: str) -> str:
    if row["value"] is None:
        return '<span class="value">not defined</span>'
    low, high = row.get("low"), row.get("high")
    interval = "" if low is None else f" <small>{low:.3f} to {high:.3f}</small>"
    drawn = "" if limits is None else bar(row["value"], low, high, limits, kind)
    return f'<span class="value">{row["value"]:.3f}</span>{drawn}{interval}'
