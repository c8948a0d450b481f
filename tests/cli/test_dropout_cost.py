"""The benchmark of dropout times every kind, and finds the memory of probabilities that are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_kind_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = [
        "--size",
        "tiny",
        "--tokens",
        "64",
        "--lengths",
        "32",
        "64",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "dropout_cost.py", *arguments, "--json", out],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    added = {}
    for length, kinds in json.loads(out.read_text())["results"].items():
        assert list(kinds) == ["none", "hidden 0.1", "attention 0.1", "both 0.1"]
        assert all(row["seconds"] > 0 for row in kinds.values())
        kept = {kind: row["kept_bytes"] for kind, row in kinds.items()}
        assert kept["none"] < kept["hidden 0.1"] < kept["both 0.1"]
        added[int(length)] = kept["attention 0.1"] - kept["none"]
    # Three whole layers of four heads, and a bit of the last: twice probabilities in fp32, a mask of bytes.
    assert 1.0 < (added[64] - added[32]) / (3 * 4 * 64 * (64 - 32) * 9) < 1.3
    assert done.stdout.count("|") == 6 * 10
