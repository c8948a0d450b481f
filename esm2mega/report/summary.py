"""Says how a run ended in a few numbers, as label -> text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from esm2mega.report.curves import Curve, Record, TaskRun, number, of_last_recipe
from esm2mega.report.decimals import four_decimals

_NOT_DEFINED = "not defined"


def summarise(
    train: Sequence[Record], evaluations: Sequence[Record], task: TaskRun | None = None
) -> dict[str, str]:
    """Return the final numbers of a run, best evaluation included.

    Args:
        train: Records of training steps.
        evaluations: Records of the validation split.
        task: What a fine-tuning measured; None for a pretraining, whose losses are in nats.
    """
    rows: dict[str, str] = {} if task is None else _of_task(task)
    nats = " nats" if task is None else ""
    measured = [record for record in evaluations if number(record, "valid_loss") is not None]
    if nothing := len(evaluations) - len(measured):
        rows["Evaluations without a loss"] = f"{nothing:,} (nothing to predict, or the run diverged there)"
    if measured:
        # Losses of another recipe are those of other masks: the best is the best of the last recipe.
        measured = of_last_recipe(measured)
        last, best = measured[-1], min(measured, key=lambda record: record["valid_loss"])
        rows["Validation loss"] = f"{four_decimals(last['valid_loss'])}{nats} at step {last['step']:,}"
        if task is None and (perplexity := number(last, "valid_perplexity")) is not None:
            rows["Validation perplexity"] = f"{perplexity:.3f}"
        rows["Best validation loss"] = f"{four_decimals(best['valid_loss'])}{nats} at step {best['step']:,}"
        if last.get("eval_recipe"):
            rows["Evaluation recipe"] = last["eval_recipe"]
        unigram = number(last, "unigram_loss")
        if unigram is not None:
            rows["Unigram baseline"] = f"{unigram:.4f} nats"
            gain = unigram - last["valid_loss"]
            rows["Against the baseline"] = f"{abs(gain):.4f} nats {'below' if gain >= 0 else 'above'}"
    if train:
        last = train[-1]
        rows["Steps"] = f"{last['step']:,}"
        if (loss := number(last, "loss")) is not None:
            rows["Training loss"] = f"{four_decimals(loss)}{nats}"
        for key, label, text in (
            ("consumed_tokens", "Tokens consumed", "{:,.0f}"),
            ("pack_fill", "Pack fill", "{:.1%}"),
            ("memory_gb", "Memory", "{:.2f} GB"),
        ):
            value = number(last, key)
            if value is not None:
                rows[label] = text.format(value)
        rates = sorted(r for record in train if (r := number(record, "tokens_per_second")) is not None)
        if rates:
            rows["Median throughput"] = f"{rates[len(rates) // 2]:,.0f} residues/s"
        undefined = sum("loss" in record and record["loss"] is None for record in train)
        if undefined:
            rows["Records without a loss"] = f"{undefined:,} (nothing to predict, or the run diverged there)"
    return rows


def summarise_downstream(curves: Mapping[str, Curve]) -> dict[str, str]:
    """Return the last value of each downstream task."""
    return {
        f"Downstream {name}": f"{four_decimals(values[-1])} at step {steps[-1]:,}"
        for name, (steps, values) in curves.items()
    }


def metrics_table(task: TaskRun, intervals: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    """Return a row for each metric of a fine-tuning: name, last validation, best one, test and baseline.

    Args:
        task: What was measured.
        intervals: Metric -> 95 % interval on the test.
    """
    rows = []
    for name in task.metrics:
        steps, values = task.valid.get(name, ([], []))
        best = task.best(name)
        rows.append(
            [
                name,
                _shown(values[-1] if values else None),
                "" if best is None else f"{four_decimals(best[1])} (step {best[0]:,})",
                _with_interval(task.test.get(name), intervals.get(name)),
                _shown(task.baseline.get(name)),
            ]
        )
    return rows


def _of_task(task: TaskRun) -> dict[str, str]:
    name, rows = task.headline, {}
    steps, values = task.valid.get(name, ([], []))
    if (best := task.best(name)) is not None:
        rows[f"Validation {name}"] = f"{four_decimals(values[-1])} at step {steps[-1]:,}"
        rows[f"Best validation {name}"] = f"{four_decimals(best[1])} at step {best[0]:,}"
    elif task.valid:
        rows[f"Validation {name}"] = f"{_NOT_DEFINED} for these predictions"
    if task.test_step is not None:
        value = task.test.get(name)
        rows[f"Test {name}"] = (
            f"{_NOT_DEFINED}" if value is None else f"{four_decimals(value)} at step {task.test_step:,}"
        )
    if task.test_step is not None or task.baseline:
        known = task.baseline.get(name)
        rows[f"Baseline ({task.baseline_split} split)"] = (
            f"{_NOT_DEFINED}: it predicts the same for all"
            if known is None
            else f"{name} {four_decimals(known)}"
        )
    return rows


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return _shown(value)
    low, high = map(four_decimals, interval)
    return f"{four_decimals(value)} ({low} to {high})"


def _shown(value: float | None) -> str:
    return "" if value is None else four_decimals(value)
