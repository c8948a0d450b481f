"""The report shows the right numbers, needs no network, and refuses a run without records."""

import html
import json
import math
import re
from html.parser import HTMLParser

import pytest

from esm2mega.errors import UserError
from esm2mega.report.curves import downstream_curves, loss_label, running_mean, task_run
from esm2mega.report.figure import figure_of, png_of
from esm2mega.report.log import JsonlLog, read_log
from esm2mega.report.plot import plot_run
from esm2mega.report.summary import metrics_table, summarise


def train(step, loss=2.5, **more):
    record = {
        "kind": "train",
        "step": step,
        "loss": loss,
        "lr": 1e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 900.0 + step,
    }
    return {**record, "consumed_tokens": step * 4096, "pack_fill": 0.99, **more}


def evaluation(step, loss, unigram=2.9, recipe="0123456789ab"):
    return {
        "kind": "eval",
        "step": step,
        "valid_loss": loss,
        "valid_perplexity": None if loss is None else math.exp(loss),
        "unigram_loss": unigram,
        "eval_recipe": recipe,
    }


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "run <1>"
    with JsonlLog(run / "log.jsonl") as log:
        for step in range(10, 101, 10):
            log.write(train(step, 3.0 - step / 200))
            if step % 50 == 0:
                log.write(evaluation(step, 3.0 - step / 200))
    (run / "config.yaml").write_text(
        "run_dir: r\nmodel:\n  size: tiny\noptim:\n  betas: [0.9, 0.98]\ninit_from: null\n"
    )
    return run


def test_downstream_tasks_are_drawn_in_the_order_of_their_steps(run_dir):
    """A result stands behind records of later steps; one that is not defined is left out."""
    values = {50: 0.25, 100: 0.5, 30: None}
    with JsonlLog(run_dir / "log.jsonl") as log:
        for step in (100, 50, 30):
            both = {"gb1/valid_spearman": values[step], "gb1/test_spearman": values[step]}
            log.write({"kind": "downstream", "step": step, **both})
    records = read_log(run_dir / "log.jsonl")
    curves = downstream_curves([record for record in records if record["kind"] == "downstream"])
    assert curves == dict.fromkeys(("gb1/valid_spearman", "gb1/test_spearman"), ([50, 100], [0.25, 0.5]))
    assert plot_run(run_dir).summary["Downstream gb1/test_spearman"] == "0.5000 at step 100"
    (axes,) = (a for a in figure_of("r", [], [], curves).axes if a.get_title(loc="left").startswith("Down"))
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[0.25, 0.5]] * 2


class Resources(HTMLParser):
    """Collects every attribute that could make a browser load something, and the visible text."""

    def __init__(self):
        super().__init__()
        self.links, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [
            value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")
        ]

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    page = Resources()
    page.feed(path.read_text())
    return page


def test_files_and_final_numbers(run_dir):
    files = plot_run(run_dir)
    assert (files.png, files.html) == (run_dir / "report.png", run_dir / "report.html")
    assert files.png.read_bytes().startswith(b"\x89PNG\r\n")
    assert files.summary["Validation loss"] == "2.5000 nats at step 100"
    assert files.summary["Unigram baseline"] == "2.9000 nats"
    assert files.summary["Against the baseline"] == "0.4000 nats below"
    assert files.summary["Tokens consumed"] == "409,600"
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "config.yaml",
        "log.jsonl",
        "report.html",
        "report.png",
    ]


def test_html_loads_nothing_and_holds_the_charts_and_the_configuration(run_dir):
    files = plot_run(run_dir)
    page = parse(files.html)
    assert page.links == [] and page.tags.count("svg") == 4
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", files.html.read_text())
    text = "".join(page.text)
    for shown in ("model.size", "tiny", "optim.betas", "[0.9, 0.98]", "2.5000 nats at step 100", "run <1>"):
        assert shown in text


def test_the_pointer_shows_the_values_of_a_curve(run_dir):
    text = html.unescape(plot_run(run_dir).html.read_text())
    titles = re.findall("<title>([^<]*)</title></circle>", text)
    assert "training: 2.95 at optimizer step 10" in titles
    assert "validation: 2.5 at optimizer step 100" in titles
    assert "residues per second: 1,000 at optimizer step 100" in titles
    assert len(titles) == 10 + 2 + 3 * 10
    assert "masked cross-entropy (nats per residue)" in text and "unigram baseline: 2.9" in text


def test_long_curves_stay_small_and_keep_their_last_value(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        for step in range(1, 2001):
            log.write(train(step, 3.0 - step / 4000))
    text = plot_run(tmp_path).html.read_text()
    titles = re.findall("<title>(training[^<]*)</title>", text)
    assert len(titles) <= 150
    assert "at optimizer step 2,000" in titles[-1] and "mean of 50 records" in titles[-1]
    assert len(text) < 400_000


def test_gradient_norms_that_span_decades_have_a_logarithmic_axis(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        for step, norm in ((1, 1000.0), (2, 30.0), (3, 1.0)):
            log.write(train(step, grad_norm=norm))
    text = plot_run(tmp_path).html.read_text()
    (chart,) = re.findall("<figcaption>Gradient norm.*?</figure>", text, re.DOTALL)
    ticks = re.findall('text-anchor="end">([^<]*)<', chart)
    assert ticks == ["1", "10", "100", "1,000"]
    # The middle of a logarithmic axis lies close to 30.
    (_, middle, _) = map(float, re.findall(r'cy="([\d.]+)"', chart))
    assert abs(middle - (10 + 222) / 2) < 6


def test_the_baseline_is_dashed_and_labelled(run_dir):
    figure = figure_of("run", [train(10)], [evaluation(10, 2.4, unigram=2.875)])
    loss, *panels = figure.axes
    lines = {line.get_label(): line for line in loss.get_lines()}
    baseline = lines["unigram baseline (2.875)"]
    assert baseline.is_dashed()
    assert list(baseline.get_ydata()) == [2.875, 2.875]
    assert list(lines["validation"].get_ydata()) == [2.4]
    assert [panel.get_title(loc="left").split(" (")[0] for panel in panels] == [
        "Learning rate", "Gradient norm before clipping", "Throughput",
    ]  # fmt: skip
    assert all(axes.get_xlabel() == "optimizer step" for axes in figure.axes)


def test_long_runs_get_a_running_mean(run_dir):
    figure = figure_of("run", [train(step) for step in range(200)], [])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["training (mean of 5 records)"]


def test_running_mean_looks_back_only():
    assert running_mean([1.0, 2.0, 3.0, 10.0], 2) == [1.0, 1.5, 2.5, 6.5]


def test_best_is_not_last_and_above_the_baseline_is_said():
    rows = summarise([], [evaluation(10, 2.7), evaluation(20, 3.0)])
    assert rows["Best validation loss"] == "2.7000 nats at step 10"
    assert rows["Validation loss"] == "3.0000 nats at step 20"
    assert rows["Against the baseline"] == "0.1000 nats above"


@pytest.mark.parametrize(  # fmt: skip
    "records",
    [
        [train(10)],
        [evaluation(10, 2.5)],
        [train(10, None), train(20, 2.0)],
        [{"kind": "train", "step": 1}],
        [evaluation(10, None)],
    ],
    ids=["no evaluation", "no training", "diverged", "no numbers", "nothing to predict"],
)
def test_partial_logs_are_drawn(records, tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        for record in records:
            log.write(record)
    assert plot_run(tmp_path).png.stat().st_size > 10_000


def test_records_without_a_loss_are_counted():
    why = "nothing to predict, or the run diverged there"
    rows = summarise([train(10, None), train(20)], [evaluation(10, None), evaluation(20, None)])
    assert rows["Records without a loss"] == f"1 ({why})"
    assert rows["Evaluations without a loss"] == f"2 ({why})"
    assert not any(name.startswith(("Validation", "Best", "Against")) for name in rows)
    rows = summarise([], [evaluation(10, None), evaluation(20, 2.5)])
    assert (rows["Best validation loss"], rows["Validation perplexity"]) == (
        "2.5000 nats at step 20",
        "12.182",
    )


def test_only_losses_of_one_recipe_are_compared():
    """Those of the last one; an earlier version named none."""
    others = [evaluation(10, 1.5, recipe="b" * 12), {**evaluation(20, 1.0), "eval_recipe": None}]
    same = [evaluation(30, 2.7), evaluation(40, 3.0)]
    rows = summarise([], [*others, *same])
    assert rows["Best validation loss"] == "2.7000 nats at step 30"
    assert rows["Evaluation recipe"] == "0123456789ab"
    lines = {
        line.get_label(): list(line.get_ydata())
        for line in figure_of("run", [], [*others, *same]).axes[0].lines
    }
    assert lines["validation"] == [2.7, 3.0]
    assert lines["validation, recipe bbbbbbbbbbbb"] == [1.5]
    assert lines["validation, recipe of an earlier version"] == [1.0]


NUMBERS = ("mse", "rmse", "mae", "r2", "spearman", "pearson")
CLASSES = ("accuracy", "balanced_accuracy", "mcc", "f1_macro", "f1_micro", "auroc")


def task_evaluation(step, value, kind="eval", names=NUMBERS, recipe="0123456789ab", **more):
    split = "test" if kind == "test" else "valid"
    values = {f"{split}_{name}": value for name in names}
    return {"kind": kind, "step": step, f"{split}_loss": 0.4, **values, "eval_recipe": recipe, **more}


@pytest.fixture
def task_dir(tmp_path):
    """A fine-tuning whose second evaluation is the best, and was tested."""
    run = tmp_path / "<script>"
    with JsonlLog(run / "log.jsonl") as log:
        for step, value in ((10, 0.25), (20, 0.75), (30, 0.5)):
            log.write(train(step, 1.5))
            log.write(task_evaluation(step, value))
        log.write(task_evaluation(20, 0.625, "test", test_baseline_mse=1.5))
    (run / "config.yaml").write_text("task:\n  kind: regression\n")
    return run


def test_a_fine_tuning_shows_its_own_metrics(task_dir):
    files = plot_run(task_dir)
    shown = files.summary
    assert shown["Validation spearman"] == "0.5000 at step 30"
    assert shown["Best validation spearman"] == "0.7500 at step 20"
    assert shown["Test spearman"] == "0.6250 at step 20"
    assert shown["Baseline (test split)"] == "not defined: it predicts the same for all"
    assert shown["Validation loss"] == "0.4000 at step 30", "the loss of a regression is not in nats"
    page = parse(files.html)
    text = "".join(page.text)
    for word in ("perplexity", "unigram", "Unigram", "nats"):
        assert word not in text
    assert "script" not in page.tags and "<script>" in text
    assert "best validation" in text and "0.7500 (step 20)" in text


def test_the_figure_of_a_fine_tuning(task_dir):
    records = read_log(task_dir / "log.jsonl")
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "eval", "test")}
    task = task_run(kinds["eval"], kinds["test"], None)
    assert task.headline == "spearman", "known without a configuration"
    headline, loss, *panels = figure_of("run", kinds["train"], kinds["eval"], None, task).axes
    lines = {line.get_label(): line for line in headline.get_lines()}
    assert list(lines["validation"].get_ydata()) == [0.25, 0.75, 0.5]
    assert list(lines["best validation (0.750 at step 20)"].get_xdata()) == [20]
    assert list(lines["test (0.625)"].get_ydata()) == [0.625, 0.625]
    assert headline.get_ylabel() == "spearman" and loss.get_ylabel() == "loss"
    assert [panel.get_title(loc="left").split()[0] for panel in panels] == [
        "Learning",
        "Gradient",
        "Throughput",
    ]
    pretraining = figure_of("run", [train(10)], [evaluation(10, 2.4)]).axes
    assert pretraining[0].get_ylabel().startswith("masked cross-entropy") and len(pretraining) == 4


def test_a_regression_has_its_error_beside_a_baseline(task_dir):
    """The rank correlation that judges it has none."""
    with JsonlLog(task_dir / "log.jsonl") as log:
        log.write(task_evaluation(20, 0.625, "test", test_baseline_rmse=1.25, test_baseline_mae=1.0))
    records = read_log(task_dir / "log.jsonl")
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "eval", "test")}
    task = task_run(kinds["eval"], kinds["test"], "regression")
    assert task.drawn == ["spearman", "rmse"]
    headline, error, loss, *_ = figure_of("run", kinds["train"], kinds["eval"], None, task).axes
    assert [axes.get_ylabel() for axes in (headline, error, loss)] == ["spearman", "rmse", "loss"]
    lines = {line.get_label(): line for line in error.get_lines()}
    assert list(lines["baseline, test split (1.250)"].get_ydata()) == [1.25, 1.25]
    assert list(lines["best validation (0.250 at step 10)"].get_xdata()) == [10], "less is better"
    text = "".join(parse(plot_run(task_dir).html).text)
    assert "baseline, test split: 1.25" in text and "best validation 0.25 at step 10" in text
    classes = task_run(
        [task_evaluation(10, 0.5, names=CLASSES)],
        [task_evaluation(10, 0.5, "test", CLASSES, test_baseline_accuracy=0.25)],
        None,
    )
    assert classes.drawn == ["accuracy"]


def test_without_a_test_split_the_baseline_is_that_of_validation(task_dir):
    more = {"valid_baseline_rmse": 1.25, "valid_baseline_mae": 1.0}
    task = task_run([task_evaluation(10, 0.5, **more), task_evaluation(20, 0.25, **more)], [], "regression")
    assert (task.baseline, task.baseline_split) == ({"rmse": 1.25, "mae": 1.0}, "validation")
    assert "baseline_rmse" not in task.metrics, "a level, and no curve"
    rows = summarise([], [task_evaluation(10, 0.5, **more)], task)
    assert rows["Baseline (validation split)"] == "not defined: it predicts the same for all"
    _, error, *_ = figure_of("run", [], [task_evaluation(10, 0.5)], None, task).axes
    assert "baseline, validation split (1.250)" in {line.get_label() for line in error.get_lines()}
    (task_dir / "log.jsonl").unlink()
    with JsonlLog(task_dir / "log.jsonl") as log:
        log.write(task_evaluation(10, 0.5, **more))
    text = "".join(parse(plot_run(task_dir).html).text)
    assert "baseline, validation split: 1.25" in text and "1.2500" in text


def test_small_losses_keep_their_digits():
    """Squared errors of small labels that are not scaled."""
    rows = summarise([train(10, 3e-7)], [{**task_evaluation(10, 0.5), "valid_loss": 2.5e-6}])
    assert rows["Training loss"].startswith("3e-07") and rows["Validation loss"].startswith("2.5e-06")


def test_the_predictions_of_the_test_are_drawn(task_dir):
    examples = [{"id": "a", "prediction": 0.5, "label": 0.75}, {"id": "b", "prediction": 1.5, "label": None}]
    result = {
        "data": "splits/<test>.csv",
        "step": 20,
        "loss": 0.4,
        "intervals": {"mse": [0.5, 0.75]},
        "predictions": examples,
    }
    (task_dir / "test.json").write_text(json.dumps(result))
    text = "".join(parse(plot_run(task_dir).html).text)
    assert "Predicted against measured" in text and "0.6250 (0.5000 to 0.7500)" in text
    assert "2 proteins of splits/<test>.csv, by the weights of step 20; from test.json." in text
    # What was written for another checkpoint, or other proteins, is not what the log says.
    for other in ({"step": 30}, {"loss": 0.41}, {"loss": None}):
        (task_dir / "test.json").write_text(json.dumps({**result, **other}))
        text = "".join(parse(plot_run(task_dir).html).text)
        assert "Predicted against measured" not in text and "95 %" not in text
    (task_dir / "test.json").write_text("{")
    with pytest.raises(UserError, match=r"test.json: is damaged; write it anew with `esm2mega evaluate "):
        plot_run(task_dir)


def test_the_longest_name_of_a_loss_stays_beside_its_panel(task_dir):
    records = read_log(task_dir / "log.jsonl")
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "eval", "test")}
    label = loss_label({"task.kind": "regression"}, True)
    task = task_run(kinds["eval"], kinds["test"], "regression")
    figure = figure_of("run", kinds["train"], kinds["eval"], None, task, label)
    assert png_of(figure)  # which lays everything out
    loss = figure.axes[1]
    assert loss.get_ylabel().replace("\n", " ") == label
    words, panel = loss.yaxis.label.get_window_extent(), loss.get_window_extent()
    assert words.height <= panel.height * 1.1 and words.x0 >= 0 and words.x1 < panel.x0


def test_metrics_of_a_fine_tuning_by_their_direction(task_dir):
    records = read_log(task_dir / "log.jsonl")
    others = [task_evaluation(5, 0.99, recipe="b" * 12)]
    task = task_run([*others, *(r for r in records if r["kind"] == "eval")], records[-1:], None)
    rows = {name: cells for name, *cells in metrics_table(task, {"mse": (0.5, 2e-5)})}
    assert rows["spearman"] == ["0.5000", "0.7500 (step 20)", "0.6250", ""], "of the last recipe alone"
    assert rows["mse"] == [*("0.5000", "0.2500 (step 10)", "0.6250 (0.5000 to 2e-05)", "1.5000")], (
        "less is better"
    )
    assert next(iter(rows)) == "spearman"


@pytest.mark.parametrize(
    "names, kind, headline", [(CLASSES, None, "accuracy"), ((), "multilabel", "f1_micro")]
)
def test_the_headline_follows_from_the_metrics_or_the_configuration(names, kind, headline):
    assert task_run([task_evaluation(10, 0.5, names=names)], [], kind).headline == headline
    assert task_run([evaluation(10, 2.5)], [], None) is None


def test_a_metric_that_is_never_defined_is_said(tmp_path):
    """The correlation of constant predictions; there was no test."""
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.write(task_evaluation(10, 0.5, valid_spearman=None))
    shown = plot_run(tmp_path).summary
    assert shown["Validation spearman"] == "not defined for these predictions"
    assert not any(name.startswith("Test") for name in shown)


def test_no_log_and_empty_log(tmp_path):
    with pytest.raises(UserError, match="no log at"):
        plot_run(tmp_path)
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UserError, match="holds no training or evaluation record yet"):
        plot_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
