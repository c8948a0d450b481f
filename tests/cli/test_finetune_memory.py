"""The benchmark of memory and time measures all modes, and each of them trains what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_modes_are_measured(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--size", "tiny", "--tokens", "64", "--length", "32", "--steps", "1", "--rank", "2"]
    script = ROOT / "benchmarks" / "finetune_memory.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *arguments, "--json", out],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    modes = json.loads(out.read_text())["modes"]
    assert list(modes) == ["full", "lora", "frozen"]
    h, layers = 128, 4
    head = h * 256 + 256 + 256 + 1
    assert modes["lora"]["trained_parameters"] == 3 * layers * 2 * 2 * h + head
    assert modes["frozen"]["trained_parameters"] == head
    for name, row in modes.items():
        assert row["peak_memory_gb"] > 0 and row["step_seconds"] > 0 and row["cpu_seconds"] > 0
        # Weights, and two moments of those that are trained, in fp32.
        weights = modes["lora" if name == "lora" else "full"]["trained_parameters"]
        megabytes = 4e-6 * weights + 8e-6 * row["trained_parameters"]
        assert megabytes < row["checkpoint_mb"] < 1 + 1.2 * megabytes
    assert len(done.stdout.splitlines()) == 4
