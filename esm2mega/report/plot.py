"""Draws the report of a run from its log: `report.png` and a self-contained `report.html`."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from esm2mega.files import real_path, replacing
from esm2mega.report.curves import TaskRun, loss_label
from esm2mega.report.figure import figure_of, png_of
from esm2mega.report.predicted import TEST_RESULT, Tested, read_tested, section_of
from esm2mega.report.results.charts import scrolling
from esm2mega.report.results.page import sections_of
from esm2mega.report.results.suite import Suite
from esm2mega.report.run_charts import charts_of_run
from esm2mega.report.run_records import RunRecords, read_run
from esm2mega.report.style import page_of
from esm2mega.report.summary import metrics_table, summarise, summarise_downstream

PNG_NAME, HTML_NAME = "report.png", "report.html"


@dataclass(frozen=True)
class PlotFiles:
    """Holds the paths of a report, and the final numbers that it shows."""

    png: Path
    html: Path
    summary: dict[str, str]


@dataclass(frozen=True)
class Benchmarks:
    """Holds what a suite of benchmarks measured of the checkpoints of a run.

    Attributes:
        suite: Its results, of these checkpoints alone.
        model: Name in the suite of the checkpoint whose pictures come first.
        step: The step of that checkpoint.
        is_best: Whether it is the best of the run; if not, it is the newest that was measured.
    """

    suite: Suite
    model: str
    step: int
    is_best: bool


def plot_run(
    run_dir: str | Path, benchmarks: Benchmarks | None = None, out: str | Path | None = None
) -> PlotFiles:
    """Draw the report of a run, from its `log.jsonl` and, if there is one, `config.yaml`.

    Args:
        run_dir: Directory of the run.
        benchmarks: What a suite measured of its checkpoints, for the page.
        out: Directory for the files, which is made if it is absent; None for that of the run.

    Raises:
        UserError: There is no log, or it has no training or evaluation record; or a file of the suite is
            missing.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    summary = summarise(run.train, run.evaluations, run.task) | summarise_downstream(run.downstream)
    label = loss_label(run.config, run.task is not None)
    name = real_path(run_dir).name
    png = png_of(figure_of(name, run.train, run.evaluations, run.downstream, run.task, label))
    page = _html(name, run, summary, _tested(run_dir, run), benchmarks)
    return PlotFiles(*write_report(run_dir if out is None else Path(out), png, page), summary)


def write_report(folder: Path, png: bytes, page: str) -> tuple[Path, Path]:
    """Write the figure and the page into a folder, which is made if it is absent.

    A browser that reloads during a run never sees half a page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / PNG_NAME, folder / HTML_NAME
    for path, data in zip(paths, (png, page.encode()), strict=True):
        with replacing(path, "free space or fix its permissions") as partial:
            partial.write_bytes(data)
    return paths


_STYLE = """.settings th, .settings td, h1 { overflow-wrap: anywhere; }
.settings th { width: 40%; }
.config th, .config td { font-family: ui-monospace, monospace; font-size: 13px; }
"""

_BODY = """<h1>{title}</h1>
<h2>Final numbers</h2>
<table class="settings">{summary}</table>
{metrics}
<h2>Curves</h2>
<p>Put the pointer on a curve to read its values.</p>
{charts}
{predictions}
{benchmarks}
{config}"""

_FOOTER = (
    "The unigram baseline is the cross-entropy of a model that knows only the residue frequencies of the "
    "training set; a model that has learned anything about proteins is below it."
)
_TASK_FOOTER = (
    "The baseline knows only the labels of the training set: it predicts their mean, or how frequent each "
    "class is, for every protein."
)


def _tested(run_dir: Path, run: RunRecords) -> Tested | None:
    """Return what the test of a fine-tuning found, if its file is that of the logged test.

    `evaluate --out` may have written that of other proteins there.
    """
    if run.task is None or run.task.test_step is None:
        return None
    path, kind = run_dir / TEST_RESULT, run.config.get("task.kind", "")
    found = read_tested(
        path, kind, f"write it anew with `esm2mega evaluate {run_dir} --data TABLE --out {path}`"
    )
    is_logged = found is not None and found.is_of(run.task.test_step, run.task.test.get("loss"))
    return found if is_logged else None


def _html(
    title: str,
    run: RunRecords,
    summary: Mapping[str, str],
    tested: Tested | None,
    benchmarks: Benchmarks | None,
) -> str:
    section = ""
    if run.config:
        table = f'<table class="settings config">{_rows(run.config)}</table>'
        section = f"<details open><summary>Configuration</summary>{table}</details>"
    body = _BODY.format(
        title=html.escape(title),
        summary=_rows(summary),
        metrics="" if run.task is None else _metrics(run.task, {} if tested is None else tested.intervals),
        charts=charts_of_run(run),
        predictions="" if tested is None else section_of(tested, run.config.get("task.kind", "")),
        benchmarks="" if benchmarks is None else _benchmarks(benchmarks),
        config=section,
    )
    return page_of(
        html.escape(title), body, f"esm2mega. {_FOOTER if run.task is None else _TASK_FOOTER}", _STYLE
    )


def _benchmarks(found: Benchmarks) -> str:
    """Return the sections of the tasks, and which checkpoint they show."""
    name = "The best checkpoint" if found.is_best else "The newest checkpoint that was measured"
    other = "" if found.is_best else ", since the best one, if the run keeps one, was not"
    return (
        f"<h2>Benchmarks</h2>\n<p>{name} comes first: step {found.step:,}{other}. From the results of "
        f"<code>esm2mega autoeval</code> in {html.escape(found.suite.named)}.</p>\n"
        f"{sections_of(found.suite, found.model)}"
    )


def _metrics(task: TaskRun, intervals: Mapping[str, tuple[float, float]]) -> str:
    """Return a table of all metrics of a fine-tuning, and of their 95 % intervals on the test."""
    test = "test (95 % interval)" if intervals else "test"
    names = ("metric", "last validation", "best validation", test, f"baseline ({task.baseline_split} split)")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        f"{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in metrics_table(task, intervals)
    )
    return f"<h2>Metrics</h2>\n{scrolling(f'<tr>{heads}</tr>{rows}', 'Metrics')}"


def _rows(table: Mapping[str, str]) -> str:
    return "\n".join(
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(value)}</td></tr>'
        for key, value in table.items()
    )
