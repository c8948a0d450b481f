"""The benchmark of packing and loading runs, and writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from esm2mega.data.simulate import FamilySpec, simulate_families

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data_packing.py"


def test_the_benchmark_measures_everything(tmp_path):
    fasta, out = tmp_path / "small.fasta", tmp_path / "result.json"
    simulate_families(fasta, n_families=10, members=4, spec=FamilySpec(median_length=60, max_length=150))
    sizes = ["--tokens", "1024", "--sequences", "20000", "200000", "--loader-tokens", "1024", "--packs", "20"]
    effort = ["--seconds", "0.01", "--workers", "0", "1", "--sizes"]
    subprocess.run([sys.executable, SCRIPT, fasta, *sizes, *effort, "--json", out], check=True, timeout=250)
    result = json.loads(out.read_text())
    assert [(plan["packing"], plan["sequences"]) for plan in result["plans"]] == [
        ("pack", 40),
        ("pack", 200_000),
        ("bucket", 40),
        ("bucket", 200_000),
    ]
    fill = [plan["fill"] for plan in result["plans"]]
    assert 0.99 < fill[0] <= 1 and fill[0] > fill[2] > 0.7
    assert set(result["tokens_per_second"]) == {"building", "loader, workers=0", "loader, workers=1"}
    # Ten times the sequences need no more than a few cached tables: a window of 8192 is planned at a time.
    assert result["peak_bytes"]["200000"] == pytest.approx(result["peak_bytes"]["20000"], rel=0.5)
