"""The benchmark of saving measures both ways of it, and that in the background beside steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_both_ways_are_measured(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--size", "tiny", "--tokens", "64", "--packs", "1", "--saves", "3", "--every", "3"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "save_stall.py", *arguments, "--json", out],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    for name in ("at once", "background"):
        row = result[name]
        assert row["step"] > 0 and row["begin"] > 0 and row["finish"] > 0
        assert abs(row["stall"] - (row["begin"] + row["finish"]) / row["step"]) < 1e-9
    assert result["at once"]["steps_beside"] == [0, 0, 0]
    # fp32: weights and two moments.
    assert result["checkpoint_bytes"] > 12 * 4 * 128 * 128
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "what was saved is removed"
    assert done.stdout.count("|") == 7 * 4
