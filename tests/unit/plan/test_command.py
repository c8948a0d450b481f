"""`esm2mega plan` and `pretrain --dry-run`: what they print, what they refuse, and the shipped layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.config.load import load_run
from esm2mega.config.presets import PRESETS
from esm2mega.plan.estimate import estimate
from esm2mega.plan.layouts import usable
from tests.unit.config.test_conf_files import SIZES, layouts

GPUS = ["--gpus", "2", "--memory-gb", "80"]


def test_layouts_that_fit_are_listed_and_the_others_have_a_reason(tmp_path, capsys) -> None:
    out = tmp_path / "plan.json"
    words = ["plan", "--model", "tiny", "--gpus", "3", "--memory-gb", "0.1", "--json", str(out)]
    assert main([*words, "train.global_batch_tokens=12288"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    (first, *rest) = content["layouts"]
    # Three stages of four layers, or three replicas; three tensor-parallel ranks would split a head.
    sizes = {
        (one["parallel"]["pipeline_model_parallel_size"], one["data_parallel_size"])
        for one in content["layouts"]
    }
    failed = {one["parallel"]["pipeline_model_parallel_size"]: one["reason"] for one in content["failed"]}
    assert sizes | {(pp, 3 // pp) for pp in failed} == {(1, 3), (3, 1)}
    assert all(one["tokens_per_second"] <= first["tokens_per_second"] for one in rest)
    assert all(reason in printed for reason in failed.values())


def test_a_layout_that_needs_too_much_says_how_much_of_what(tmp_path, capsys) -> None:
    assert main(["plan", "--model", "tiny", "--gpus", "1", "--memory-gb", "0.05"]) == 0
    assert "TP 1 PP 1: needs" in (printed := capsys.readouterr().out)
    assert "of weights, gradients and optimizer" in printed


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", "3B", "--gpus", "16"], "--memory-gb is not given: say how much memory a GPU has"),
        (["--model", "3B", "--memory-gb", "80"], "--gpus is not given"),
        (["--model", "4B", *GPUS], f"--model 4B is not one of {', '.join(PRESETS)}"),
        (["--model", "3b", *GPUS], "did you mean 3B?"),
        (GPUS, "no model is named"),
        (["--model", "3B", "--config", "pretrain_esm2_3B", *GPUS], "give one of them"),
        (["--model", "8M", *GPUS, "--length", "2000"], "--length 2000: proteins have at most"),
        (["--model", "8M", *GPUS, "lora.rank=4"], "only pretrainings are planned"),
        (
            ["--model", "8M", *GPUS, "parallel.tensor_model_parallel_size=3"],
            "model.num_attention_heads=20 is not divisible by parallel.tensor_model_parallel_size=3",
        ),
        (["--model", "8M", *GPUS, "--json", "."], "."),
    ],
)
def test_refusals_are_one_line(words: list[str], line: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    message = capsys.readouterr().err
    assert line in message
    assert message.count("\n") == 1


def test_dry_run_plans_the_job_at_hand_and_trains_nothing(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.fasta").write_text(">a\nMKV\n")
    words = ["pretrain", "--config", "pretrain_esm2_tiny", "--dry-run", f"data.train={tmp_path / 'a.fasta'}"]
    assert main([*words, f"run_dir={tmp_path / 'run'}", "train.eval_every=0"]) == 0
    assert "TP 1 PP 1 DP 1" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=() if s == "650M" else pytest.mark.slow) for s in SIZES]
)
def test_shipped_layouts_fit_on_their_gpus(size: str) -> None:
    named = [(n, text) for n, text in layouts(f"pretrain_esm2_{size}") if not text.startswith("does not fit")]
    assert len(named) >= 3 or size == "15B"
    for gpus, text in named:
        plan = estimate(load_run(f"pretrain_esm2_{size}", text.split()), gpus, "cuda", None, 1024)
        assert plan.worst.total <= usable(80), text
