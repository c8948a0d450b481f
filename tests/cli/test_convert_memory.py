"""The benchmark of the memory of conversions runs, and its figures are of the steps that it names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convert_memory.py"


@pytest.mark.slow
def test_the_benchmark_measures_every_step(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, SCRIPT, "--size", "tiny", "--folder", tmp_path, "--json", out, "--pickled"]
    subprocess.run(command, check=True, timeout=250)
    result = json.loads(out.read_text())
    assert result["source_bytes"] > 3_000_000
    assert set(result["peak_bytes"]) == {
        *("interpreter", "hf_to_esm2mega", "esm2mega_to_hf", "hf_to_fair_esm")
    }
    # Python with PyTorch alone needs more than this, and a model of 3 MB adds little.
    assert all(100e6 < peak < 2e9 for peak in result["peak_bytes"].values())
    assert {path.name for path in tmp_path.iterdir()} == {"result.json"}, "files are left behind"
