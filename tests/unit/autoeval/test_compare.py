"""`compare`: what it prints and writes, and when it says that a difference is shown."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.autoeval.compare import compare
from esm2mega.cli.app import main
from esm2mega.config.best_metric import HEADLINES
from esm2mega.finetune.api import train_model
from esm2mega.finetune.checkpoint import evaluate_task
from esm2mega.train.evaluate import evaluate_checkpoint
from esm2mega.train.pretrain import pretrain
from tests.ranks import run_ranks
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS, tiny_run

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
stats = pytest.importorskip("scipy.stats")

RNG = np.random.default_rng(8)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(8, 60, 70)]


def _table(path: Path, sequences: list[str]) -> Path:
    rows = (f"{text},{len(text)},{'hot' if text.count('K') > 1 else 'cold'}\n" for text in sequences)
    path.write_text("sequence,length,class\n" + "".join(rows))
    return path


@pytest.fixture(scope="module")
def untrained(finished: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The initial weights of the finished run, and nearly nothing learned."""
    folder = tmp_path_factory.mktemp("untrained")
    pretrain(tiny_run(f"data.train={finished.train}", "optim.lr=1e-9", "train.max_steps=1", run_dir=folder))
    return str(folder)


def test_a_run_does_not_differ_from_itself(
    finished: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = str(finished.run_dir), tmp_path / "out.json"
    assert main(["compare", run, run, "--data", str(finished.valid), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    loss = result["differences"]["loss"]
    assert (loss["difference"], loss["interval"], loss["is_shown"]) == (0.0, [0.0, 0.0], False)
    assert "proteins" not in result
    *_, table, row, verdict = capfd.readouterr().out.splitlines()
    assert table.split("  ")[0] == "measure" and table.endswith("95 % interval")
    assert row.split()[0] == "loss" and row.endswith("+0 to +0")
    assert verdict == result["verdict"]
    assert verdict.startswith(
        "no difference shown: B - A is loss +0, 95 % interval +0 to +0 (13 proteins, one"
    )


def test_a_trained_model_differs_from_an_untrained_one(
    finished: TinyRun, untrained: str, tmp_path: Path
) -> None:
    """Per protein the numbers are those of the whole; SciPy agrees about the interval."""
    out = tmp_path / "out.json"
    found: Any = compare((untrained, str(finished.run_dir)), str(finished.valid), out, per_protein=True)
    loss = found["differences"]["loss"]
    for side, path in (("a", untrained), ("b", finished.run_dir)):
        plain = evaluate_checkpoint(path, finished.valid)
        assert found[side][0]["loss"] == plain["loss"]
        # fp64, added in another order.
        assert loss[side] == pytest.approx(plain["loss"], rel=1e-12)
        assert found["num_labels"] == plain["num_labels"]
    assert loss["is_shown"] and loss["difference"] < -0.02
    assert found["verdict"].startswith("B is better: B - A is loss -")
    written = json.loads(out.read_text())
    proteins = written.pop("proteins")
    assert written == found and len(proteins) == found["num_proteins"]
    counts, a, b = (
        np.array([each[key] if key == "num_labels" else each[key][0] for each in proteins])
        for key in ("num_labels", "a", "b")
    )
    assert ((b - a) * counts).sum() / counts.sum() == pytest.approx(loss["difference"], rel=1e-12)
    expected = stats.bootstrap(
        (a * counts, b * counts, counts),
        lambda x, y, c, axis: (y.sum(axis=axis) - x.sum(axis=axis)) / c.sum(axis=axis),
        paired=True,
        rng=np.random.default_rng(1),
    ).confidence_interval
    low, high = loss["interval"]
    # 13 proteins have labels: the bootstrap is narrower than Student's by some tenth.
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.2 * (high - low))
    swapped: Any = compare((str(finished.run_dir), untrained), str(finished.valid))
    assert swapped["differences"]["loss"]["interval"] == pytest.approx([-high, -low])
    assert swapped["verdict"].startswith("A is better: B - A is loss +")


def test_runs_of_a_side_show_the_noise_between_seeds(
    finished: TinyRun, untrained: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = str(finished.run_dir)
    words = ["compare", f"{run}@step_2,{run}@step_4", untrained, "--data", str(finished.valid)]
    assert main(words) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["A", "A", "B"]
    found: Any = compare((words[1], words[2]), words[4])
    losses = [each["loss"] for each in found["a"]]
    loss = found["differences"]["loss"]
    assert loss["a"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert loss["seed_noise"] == pytest.approx(np.std(losses, ddof=1), rel=1e-12)
    assert lines[-1] == found["verdict"]
    assert f"2 and 1 runs, standard deviation between seeds {loss['seed_noise']:.4g})" in lines[-1]
    # One degree of freedom: these two say little about other runs, however many proteins there are.
    alone: Any = compare((f"{run}@step_2", untrained), words[4])
    assert np.diff(loss["interval"]) > 2 * np.diff(alone["differences"]["loss"]["interval"])


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [(), ("parallel.pipeline_model_parallel_size=2",)], ids=["DP2", "PP2"])
def test_ranks_do_not_matter(
    finished: TinyRun, untrained: str, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    run, out = str(finished.run_dir), tmp_path / "out.json"
    sides = (f"{run}@step_2,{run}@step_4", untrained)
    arguments = ["-m", "esm2mega", "compare", *sides, "--data", str(finished.valid), "--out", str(out)]
    (first, second) = run_ranks([*arguments, "--per-protein", *layout], 2, tmp_path)
    alone = tmp_path / "alone.json"
    compare(sides, str(finished.valid), alone, per_protein=True)
    _same(json.loads(out.read_text()), json.loads(alone.read_text()))
    assert first.stdout.splitlines()[-1] == json.loads(alone.read_text())["verdict"]
    assert second.stdout == ""


def _same(found: Any, expected: Any) -> None:
    """Equal, numbers to the rounding of fp64."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            _same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def tuned(finished: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Regressions of the length that learned in 60 steps, by two seeds, and one that did not; and a table."""
    folder = tmp_path_factory.mktemp("tuned")
    train, test = _table(folder / "train.csv", SEQUENCES[:40]), _table(folder / "test.csv", SEQUENCES[40:])

    def run(name: str, *overrides: str) -> str:
        settings = [*SETTINGS, f"run_dir={folder / name}", f"data.train={train}", "task.kind=regression"]
        settings += ["task.target_columns=[length]", "task.bootstrap=400", "task.dropout=0", *overrides]
        return str(train_model(settings).checkpoint)

    long = ("train.max_steps=60", "optim.lr=2e-3")
    return {
        "table": str(test),
        "learned": run("learned", *long),
        "again": run("again", *long, "seed=2"),
        "new": run("new", "train.max_steps=1", "optim.lr=1e-9"),
    }


def test_metrics_are_compared_by_a_paired_bootstrap(tuned: dict[str, Any], tmp_path: Path) -> None:
    found: Any = compare((tuned["new"], tuned["learned"]), tuned["table"])
    predictions, values = {}, {}
    for side, name in (("a", "new"), ("b", "learned")):
        out = tmp_path / f"{side}.json"
        plain = evaluate_task(tuned[name], tuned["table"], out)
        for metric in ("loss", "mse", "spearman", "pearson", "r2"):
            assert found[side][0][metric] == plain[metric]
        assert found["differences"]["spearman"][side] == plain["spearman"]
        assert found["differences"]["loss"][side] == pytest.approx(plain["loss"], rel=1e-12)
        predictions[side] = np.array(
            [each["prediction"] for each in json.loads(out.read_text())["predictions"]]
        )
        values[side] = plain
    labels = np.array([float(len(text)) for text in SEQUENCES[40:]])
    spearman = found["differences"]["spearman"]
    assert spearman["difference"] == pytest.approx(
        values["b"]["spearman"] - values["a"]["spearman"], abs=1e-15
    )

    def difference(a: Any, b: Any, y: Any) -> float:
        return float(stats.spearmanr(b, y).statistic - stats.spearmanr(a, y).statistic)

    expected = stats.bootstrap(
        (predictions["a"], predictions["b"], labels),
        difference,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=1000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    low, high = spearman["interval"]
    # Percentiles of 400 and 1000 resamples differ by some 5 % of the width.
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.2 * (high - low))
    each_loss = ((predictions["b"] - labels) ** 2 - (predictions["a"] - labels) ** 2) / np.var(
        [len(text) for text in SEQUENCES[:40]]
    )
    by_t = stats.ttest_1samp(each_loss, 0.0).confidence_interval(0.95)
    loss = found["differences"]["loss"]
    assert loss["interval"] == pytest.approx([by_t.low, by_t.high], rel=1e-9)
    assert loss["is_shown"] and loss["difference"] < 0.0
    assert "B - A is spearman" in found["verdict"] and "30 proteins" in found["verdict"]
    assert found["verdict"].startswith("B is better" if spearman["is_shown"] else "no difference shown")


@pytest.mark.slow
def test_a_task_does_not_differ_from_itself(tuned: dict[str, Any]) -> None:
    found: Any = compare((tuned["learned"], tuned["learned"]), tuned["table"])
    for each in found["differences"].values():
        assert (each["difference"], each["interval"], each["is_shown"]) == (0.0, [0.0, 0.0], False)
    assert found["verdict"].startswith("no difference shown: B - A is spearman +0")
    several = (f"{tuned['learned']},{tuned['again']}", f"{tuned['learned']},{tuned['again']}")
    found = compare(several, tuned["table"])
    for each in found["differences"].values():
        assert each["difference"] == 0.0 and not each["is_shown"]
        low, high = each["interval"]
        assert math.isclose(low, -high, rel_tol=1e-12) and high > 0.0


KINDS = {
    "classification": ["task.target_columns=[class]", "task.class_weights=balanced"],
    "multilabel": ["task.target_columns=[long,sweet]"],
    "token_classification": ["task.target_columns=[letters]", "task.mask_column=mask"],
    "token_regression": ["task.target_columns=[numbers]"],
    "contact": ["task.target_columns=[atoms]"],
}


def _table_of_kinds(path: Path) -> Path:
    """Every third protein has a label missing, or masked at its first residue."""
    rng = np.random.default_rng(3)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sequence", "class", "long", "sweet", "letters", "mask", "numbers", "atoms"])
        for number, sequence in enumerate(SEQUENCES[:12]):
            length, hole = len(sequence), number % 3 == 0
            rows.writerow([
                sequence,
                "hot" if number % 3 else "cold",
                "" if hole else number % 2,
                number // 2 % 2,
                "".join(rng.choice(list("CEH"), length)),
                "01"[not hole] + "1" * (length - 1),
                " ".join("nan" if hole and i == 0 else str(i) for i in range(length)),
                json.dumps(rng.normal(size=(length, 3)).cumsum(axis=0).round(2).tolist()),
            ])  # fmt: skip
    return path


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_is_compared(kind: str, tmp_path: Path) -> None:
    """By numbers that are those of `evaluate`, with intervals of two different models."""
    table = _table_of_kinds(tmp_path / "table.csv")
    settings = [*SETTINGS, f"data.train={table}", f"task.kind={kind}", "task.bootstrap=20", *KINDS[kind]]
    settings += ["train.max_steps=2", "train.eval_every=0"]
    runs = [str(tmp_path / f"run{seed}") for seed in (1, 2)]
    for seed, run in enumerate(runs):
        train_model([*settings, f"run_dir={run}", f"seed={seed}"])
    out = tmp_path / "out.json"
    found: Any = compare((runs[0], runs[1]), str(table), out, per_protein=True)
    proteins = json.loads(out.read_text())["proteins"]
    for side, run in zip("ab", runs, strict=True):
        plain = evaluate_task(run, table)
        counts = np.array([each["num_labels"] for each in proteins])
        assert counts.sum() == plain["num_labels"] == found["num_labels"]
        mean = (counts * [each[side][0] for each in proteins]).sum() / counts.sum()
        assert mean == pytest.approx(plain["loss"], rel=1e-9)
        for name, each in found["differences"].items():
            assert each[side] == (pytest.approx(plain[name], rel=1e-9) if name == "loss" else plain[name])
    loss = found["differences"].pop("loss")
    assert loss["difference"] != 0.0 and loss["interval"][0] < loss["difference"] < loss["interval"][1]
    assert found["differences"].keys() == {"loss", *found["a"][0]} - {"loss", "checkpoint", "step"}
    assert f" {HEADLINES[kind]} " in found["verdict"]


@pytest.mark.distributed
def test_ranks_do_not_matter_for_a_task(tuned: dict[str, Any], tmp_path: Path) -> None:
    sides, out, alone = (tuned["new"], tuned["learned"]), tmp_path / "out.json", tmp_path / "alone.json"
    arguments = ["compare", *sides, "--data", tuned["table"], "--out", str(out), "--per-protein"]
    run_ranks(["-m", "esm2mega", *arguments, "task.bootstrap=30"], 2, tmp_path)
    compare(sides, tuned["table"], alone, per_protein=True, overrides=["task.bootstrap=30"])
    _same(json.loads(out.read_text()), json.loads(alone.read_text()))
