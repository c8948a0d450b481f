"""The report shows the right numbers, needs no network, and refuses a run without records."""

import base64
import math
import re
from html.parser import HTMLParser

import pytest

from esm2mega.errors import UserError
from esm2mega.report.log import JsonlLog, read_log
from esm2mega.report.plot import _figure, downstream_curves, plot_run, running_mean, summarise


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
    (axes,) = (a for a in _figure("r", [], [], curves).axes if a.get_title(loc="left").startswith("Down"))
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


def test_html_loads_nothing_and_holds_the_png_and_the_configuration(run_dir):
    files = plot_run(run_dir)
    page = parse(files.html)
    (image,) = page.links
    prefix = "data:image/png;base64,"
    assert image.startswith(prefix)
    assert base64.b64decode(image[len(prefix) :]) == files.png.read_bytes()
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", files.html.read_text())
    text = "".join(page.text)
    for shown in ("model.size", "tiny", "optim.betas", "[0.9, 0.98]", "2.5000 nats at step 100", "run <1>"):
        assert shown in text


def test_the_baseline_is_dashed_and_labelled(run_dir):
    figure = _figure("run", [train(10)], [evaluation(10, 2.4, unigram=2.875)])
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
    figure = _figure("run", [train(step) for step in range(200)], [])
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
        for line in _figure("run", [], [*others, *same]).axes[0].lines
    }
    assert lines["validation"] == [2.7, 3.0]
    assert lines["validation, recipe bbbbbbbbbbbb"] == [1.5]
    assert lines["validation, recipe of an earlier version"] == [1.0]


def test_a_task_has_no_perplexity():
    record = evaluation(10, 0.4)
    del record["valid_perplexity"], record["unigram_loss"]
    assert "Validation perplexity" not in summarise([], [record])


def test_no_log_and_empty_log(tmp_path):
    with pytest.raises(UserError, match="no log at"):
        plot_run(tmp_path)
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UserError, match="holds no training or evaluation record yet"):
        plot_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
