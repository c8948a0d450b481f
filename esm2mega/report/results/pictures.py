"""Draws what a row of the results predicted: each kind of task has its own pictures.

Everything that is drawn is computed from all predictions; where points are left out of a chart, it says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.report.results.charts import COLORS, GREY, Axis, Plot, axis_of, scrolling, table
from esm2mega.report.results.groups import groups_of, most_frequent
from esm2mega.report.results.predictions import Array, Classes, Flags, Numbers, read_rows, targets_of
from esm2mega.report.results.scores import (
    NUM_BINS,
    ScoreCurve,
    coverage,
    precision_recall,
    reliability,
    roc,
)

_MOST_POINTS, _MOST_CLASSES, _MOST_TARGETS, _WORST = 2000, 20, 6, 10
_FEW_CLASSES = 5
_SHARES = (0.0, 1.0)
_ZERO_SHOT = "zero-shot"


def pictures_of(row: Mapping[str, Any], kind: str, folder: Path) -> Iterator[str]:
    """Yield the figures of a row.

    Args:
        row: Row of a model, which may name a file of predictions and one of embeddings in the plane.
        kind: The value of `task.kind`.
        folder: Folder of the results.
    """
    if row.get("predictions"):
        rows = read_rows(folder / row["predictions"])
        yield from pictures_of_predictions(rows, kind, row["mode"] == _ZERO_SHOT)
    if row.get("plane"):
        yield from _planes(read_rows(folder / row["plane"]))


def pictures_of_predictions(
    rows: Sequence[Mapping[str, str]], kind: str, is_score: bool = False
) -> Iterator[str]:
    """Yield the figures of a file of predictions.

    Args:
        rows: Its rows.
        kind: The value of `task.kind`.
        is_score: Whether they are scores, which are in no unit of the labels.
    """
    targets = targets_of(rows, kind)
    for target in targets[:_MOST_TARGETS]:
        if isinstance(target, Numbers):
            yield from _of_numbers(target, is_score, len(targets) > 1)
        elif isinstance(target, Classes):
            yield from _of_classes(target)
        else:
            yield from _of_flags(target)
    if len(targets) > _MOST_TARGETS:
        yield f"<p>Shown are {_MOST_TARGETS} of {len(targets)} targets; the others are in the file.</p>"


def _of_numbers(numbers: Numbers, is_score: bool, is_one_of_several: bool) -> Iterator[str]:
    name = f" of {numbers.target}" if is_one_of_several else ""
    labels, values = numbers.labels, numbers.values
    plot = Plot(
        axis_of("measured", labels.tolist()), axis_of("score" if is_score else "predicted", values.tolist())
    )
    step = _step(len(labels))
    plot.dots(labels[::step].tolist(), values[::step].tolist(), COLORS[0])
    low, high = max(plot.x.low, plot.y.low), min(plot.x.high, plot.y.high)
    # Scores are not in the units of the labels.
    if not is_score and low < high:
        plot.line([low, high], [low, high], GREY, dashed=True)
    note = _sampled(len(labels[::step]), len(labels))
    yield plot.figure(f"Predicted against measured{name}", note)
    if (found := coverage(numbers)) is not None:
        plot = Plot(Axis("level of the interval", *_SHARES), Axis("share of labels within", *_SHARES))
        plot.line(_SHARES, _SHARES, GREY, dashed=True)
        plot.line(found.x.tolist(), found.y.tolist(), COLORS[0])
        plot.dots(found.x.tolist(), found.y.tolist(), COLORS[0])
        note = f"the intervals of 95 % hold {found.value:.1%} of {len(labels):,} labels; "
        note += "other levels by a normal distribution"
        yield plot.figure(f"Calibration of the intervals{name}", note)
    yield _worst(numbers, name, ("measured", "predicted"))


def _of_classes(classes: Classes) -> Iterator[str]:
    name = f" of {classes.target}" if classes.target else ""
    if len(classes.names) <= _MOST_CLASSES:
        yield _confusion(classes, name)
    else:
        yield _confused(classes, name)
    if classes.known is not None and classes.scores is not None:
        chosen, left_out = most_frequent(np.bincount(classes.known, minlength=len(classes.names)))
        if len(classes.names) == 2:
            chosen = chosen[:1]  # the curve of the other class says the same
        each = {classes.names[n]: (classes.known == n, classes.scores[:, n]) for n in chosen}
        note = (
            "each class against all others"
            if len(chosen) > 1
            else f"{classes.names[chosen[0]]} against the others"
        )
        note += f"; the {len(chosen)} most frequent of {len(classes.names)} classes" * left_out
        yield from _score_curves(each, note)
        likeliest = classes.scores.argmax(axis=1)
        yield _reliability(
            reliability(likeliest == classes.known, classes.scores.max(axis=1)),
            *("probability of the likeliest class", "share that is right"),
        )
    yield _worst(classes, name, ("known", "predicted"))


def _of_flags(flags: Flags) -> Iterator[str]:
    there = ~np.isnan(flags.known)
    predicted = flags.scores >= 0.5
    lines = []
    for n, name in enumerate(flags.names):
        known, shown = flags.known[there[:, n], n] == 1, predicted[there[:, n], n]
        counts = (
            (known & shown).sum(),
            (~known & shown).sum(),
            (known & ~shown).sum(),
            (~known & ~shown).sum(),
        )
        lines.append([name, *(f"{count:,}" for count in counts)])
    heads = ("class", "true positive", "false positive", "false negative", "true negative")
    yield table("Confusion of each class, from a probability of 0.5", heads, lines)
    chosen, left_out = most_frequent((flags.known == 1).sum(axis=0))
    each = {flags.names[n]: (flags.known[there[:, n], n] == 1, flags.scores[there[:, n], n]) for n in chosen}
    note = f"the {len(chosen)} most frequent of {len(flags.names)} classes" if left_out else ""
    yield from _score_curves(each, note)
    yield _reliability(
        reliability(flags.known[there] == 1, flags.scores[there]),
        *("probability, of all classes together", "share that has the class"),
    )
    yield _worst(flags, "", ("known", "predicted"))


def _score_curves(each: Mapping[str, tuple[Array, Array]], note: str) -> Iterator[str]:
    axes = {
        "ROC": (roc, "false positive rate", "true positive rate", "area"),
        "Precision and recall": (precision_recall, "recall", "precision", "average precision"),
    }
    for title, (compute, x, y, value) in axes.items():
        plot = Plot(Axis(x, *_SHARES), Axis(y, *_SHARES))
        if compute is roc:
            plot.line(_SHARES, _SHARES, GREY, dashed=True)
        for color, (name, (known, scores)) in zip(COLORS, each.items(), strict=False):
            if (found := compute(known, scores)) is None:
                plot.label(color, f"{name}: not defined, all or none are of this class")
            else:
                plot.line(found.x.tolist(), found.y.tolist(), color)
                plot.label(color, f"{name}: {value} {found.value:.3f}")
        yield plot.figure(title, note)


def _reliability(found: ScoreCurve, x: str, y: str) -> str:
    plot = Plot(Axis(x, *_SHARES), Axis(y, *_SHARES))
    plot.line(_SHARES, _SHARES, GREY, dashed=True)
    plot.line(found.x.tolist(), found.y.tolist(), COLORS[0])
    plot.dots(found.x.tolist(), found.y.tolist(), COLORS[0])
    note = f"expected calibration error {found.value:.3f}, {NUM_BINS} equal bins"
    return plot.figure("Calibration of the probabilities", note)


def _confusion(classes: Classes, name: str) -> str:
    """Return a table of known against predicted classes, shaded by the share of the known class."""
    heads = "".join(f'<th scope="col">{escape(shown)}</th>' for shown in classes.names)
    lines = []
    for known, counts in zip(classes.names, classes.counts.tolist(), strict=True):
        total = sum(counts) or 1
        cells = "".join(
            f'<td style="--share:{count / total:.0%}">{count:,}<br><small>{count / total:.0%}</small></td>'
            for count in counts
        )
        lines.append(f'<tr><th scope="row">{escape(known)}</th>{cells}</tr>')
    caption = f"Confusion{escape(name)}: rows are known, columns predicted"
    rows = f'<tr><th scope="col">known</th>{heads}</tr>{"".join(lines)}'
    wide = ' class="wide"' if len(classes.names) > _FEW_CLASSES else ""
    box = scrolling(rows, f"Confusion{name}", "confusion")
    return f"<figure{wide}><figcaption>{caption}</figcaption>{box}</figure>"


def _confused(classes: Classes, name: str) -> str:
    """Return the pairs of classes that are taken for each other most often, where there are very many."""
    wrong = classes.counts * (1 - np.eye(len(classes.names), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_WORST]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    lines = [[classes.names[a], classes.names[b], f"{wrong[a, b]:,}"] for a, b in pairs if wrong[a, b]]
    caption = f"Most confused of {len(classes.names):,} classes{name}"
    return table(caption, ("known", "predicted", "how often"), lines)


def _worst(found: Numbers | Classes | Flags, name: str, heads: Sequence[str]) -> str:
    worst = found.worst(_WORST)
    return table(f"Largest errors{name}", ("protein", *heads), worst) if worst else ""


def _planes(points: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield the embeddings in two dimensions, for each method that the file has, coloured by label."""
    methods = {"pca": "principal components", "umap": "UMAP"}
    for method, title in methods.items():
        if not points or f"{method}_1" not in points[0]:
            continue
        xy = np.array([[float(point[f"{method}_{n}"]) for n in (1, 2)] for point in points])
        plot = Plot(axis_of("first", xy[:, 0].tolist()), axis_of("second", xy[:, 1].tolist()))
        for color, label, rows in groups_of([point["label"] for point in points]):
            plot.dots(xy[rows, 0].tolist(), xy[rows, 1].tolist(), color)
            plot.label(color, f"{label} ({len(rows):,})")
        yield plot.figure(f"Embeddings of the test split, {title}", f"{len(points):,} points")


def _step(count: int) -> int:
    return max(1, -(-count // _MOST_POINTS))


def _sampled(shown: int, count: int) -> str:
    return "" if shown == count else f"{shown:,} of {count:,} points, evenly chosen"
