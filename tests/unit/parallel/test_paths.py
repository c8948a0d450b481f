"""Rank 0 expands the paths of a configuration for all ranks."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import run_ranks

# Homes and clocks differ: rank 1 is a second late.
EXPAND = """
import os, time
from esm2mega.config.load import load_run
from esm2mega.parallel.paths import expand_paths
rank = int(os.environ["RANK"])
os.environ["HOME"] = f"/home/of_rank_{rank}"
time.sleep(1.1 * rank)
words = ["model.size=tiny", "run_dir=~/{time}", "checkpoint.resume=never", "logging.wandb_run_name=~"]
run = expand_paths(load_run(None, words))
print(run.run_dir, run.logging.wandb_run_name)
"""


def test_all_ranks_take_home_and_time_of_rank_0(tmp_path: Path) -> None:
    first, second = (result.stdout.split() for result in run_ranks(["-c", EXPAND], 2, tmp_path))
    assert first == second
    assert first[0].startswith("/home/of_rank_0/20") and "{" not in first[0]
