"""Draws the report of a run from its log: `report.png` and a self-contained `report.html`."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm2mega.config.renamed import REMOVED, current_key
from esm2mega.errors import UserError
from esm2mega.files import replacing
from esm2mega.report.curves import Curve, TaskRun, downstream_curves, loss_label, task_run
from esm2mega.report.figure import figure_of, png_of
from esm2mega.report.log import DOWNSTREAM, EVAL, LOG_NAME, TEST, TRAIN, read_log
from esm2mega.report.results.charts import scrolling
from esm2mega.report.style import page_of
from esm2mega.report.summary import metrics_table, summarise, summarise_downstream

CONFIG_NAME = "config.yaml"
PNG_NAME, HTML_NAME = "report.png", "report.html"


@dataclass(frozen=True)
class PlotFiles:
    """Holds the paths of a report, and the final numbers that it shows."""

    png: Path
    html: Path
    summary: dict[str, str]


def plot_run(run_dir: str | Path) -> PlotFiles:
    """Draw the report of a run into `run_dir`, from its `log.jsonl` and, if there is one, `config.yaml`.

    Raises:
        UserError: There is no log, or it has no training or evaluation record.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    summary = summarise(run.train, run.evaluations, run.task) | summarise_downstream(run.downstream)
    label = loss_label(run.config, run.task is not None)
    name = run_dir.resolve().name
    png = png_of(figure_of(name, run.train, run.evaluations, run.downstream, run.task, label))
    page = _html(name, png, summary, run.task, run.config)
    return PlotFiles(*write_report(run_dir, png, page), summary)


def write_report(folder: Path, png: bytes, page: str) -> tuple[Path, Path]:
    """Write the figure and the page; a browser that reloads during a run never sees half a page."""
    paths = folder / PNG_NAME, folder / HTML_NAME
    for path, data in zip(paths, (png, page.encode()), strict=True):
        with replacing(path, "free space or fix its permissions") as partial:
            partial.write_bytes(data)
    return paths


@dataclass(frozen=True)
class RunRecords:
    """Holds what a run has written that can be drawn.

    Attributes:
        train: Records of training steps.
        evaluations: Records of the validation split.
        downstream: What was measured of downstream tasks.
        task: What a fine-tuning measured; None for a pretraining.
        config: The configuration, as dotted key -> text.
    """

    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    downstream: dict[str, Curve]
    task: TaskRun | None
    config: dict[str, str]


def read_run(run_dir: str | Path) -> RunRecords:
    """Read the log of a run and, if there is one, its configuration.

    Raises:
        UserError: There is no log, or it has no training or evaluation record.
    """
    run_dir = Path(run_dir)
    log = run_dir / LOG_NAME
    records = read_log(log)
    train = [record for record in records if record.get("kind") == TRAIN]
    evaluations = [record for record in records if record.get("kind") == EVAL]
    if not train and not evaluations:
        raise UserError(
            f"{log} holds no training or evaluation record yet; plot again after train.log_every steps"
        )
    downstream = downstream_curves([record for record in records if record.get("kind") == DOWNSTREAM])
    config = read_config(run_dir)
    tests = [record for record in records if record.get("kind") == TEST]
    return RunRecords(
        train, evaluations, downstream, task_run(evaluations, tests, config.get("task.kind")), config
    )


def read_config(run_dir: Path) -> dict[str, str]:
    """Return the resolved configuration as dotted key -> text; empty when the run has none."""
    path = run_dir / CONFIG_NAME
    if not path.exists():
        return {}
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as YAML: {str(error).splitlines()[0]}") from None
    settings = _flatten(loaded) if isinstance(loaded, dict) else []
    return {current_key(key): value for key, value in settings if key not in REMOVED}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "" if value is None else str(value)))
    return rows


IMAGE_STYLE = "img { width: 100%; height: auto; background: #fff; }\n"
"""Lets the curves take the width of a page."""

_STYLE = f"""{IMAGE_STYLE}.settings th, .settings td, h1 {{ overflow-wrap: anywhere; }}
.settings th {{ width: 40%; }}
.config th, .config td {{ font-family: ui-monospace, monospace; font-size: 13px; }}
"""

_BODY = """<h1>{title}</h1>
<h2>Final numbers</h2>
<table class="settings">{summary}</table>
{metrics}
<h2>Curves</h2>
<img alt="{alt}" src="data:image/png;base64,{png}">
{config}"""

_ALT = "Loss, learning rate, gradient norm, throughput and downstream tasks by optimizer step"
_FOOTER = (
    "The unigram baseline is the cross-entropy of a model that knows only the residue frequencies of the "
    "training set; a model that has learned anything about proteins is below it."
)
_TASK_FOOTER = (
    "The baseline knows only the labels of the training set: it predicts their mean, or how frequent each "
    "class is, for every protein."
)


def _html(
    title: str, png: bytes, summary: Mapping[str, str], task: TaskRun | None, config: Mapping[str, str]
) -> str:
    section = ""
    if config:
        table = f'<table class="settings config">{_rows(config)}</table>'
        section = f"<details open><summary>Configuration</summary>{table}</details>"
    body = _BODY.format(
        title=html.escape(title),
        summary=_rows(summary),
        metrics="" if task is None else _metrics(task),
        alt=_ALT if task is None else f"{html.escape(task.headline)} of validation and test; {_ALT}",
        png=base64.b64encode(png).decode(),
        config=section,
    )
    return page_of(html.escape(title), body, f"esm2mega. {_FOOTER if task is None else _TASK_FOOTER}", _STYLE)


def _metrics(task: TaskRun) -> str:
    """Return a table of all metrics of a fine-tuning."""
    names = ("metric", "last validation", "best validation", "test", "baseline on the test")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        f"{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in metrics_table(task)
    )
    return f"<h2>Metrics</h2>\n{scrolling(f'<tr>{heads}</tr>{rows}', 'Metrics')}"


def _rows(table: Mapping[str, str]) -> str:
    return "\n".join(
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(value)}</td></tr>'
        for key, value in table.items()
    )
