"""The benchmark of the data side runs, part by part, and writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from esm2mega.quickstart.simulate import FamilySpec, simulate_families

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data.py"


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("fasta") / "small.fasta"
    simulate_families(path, n_families=10, members=4, spec=FamilySpec(median_length=60, max_length=150))
    return path


def measure(out, part, *arguments):
    words = [sys.executable, SCRIPT, part, *map(str, arguments), "--json", out / "result.json"]
    subprocess.run(words, check=True, timeout=250)
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
def test_packing_and_loading(fasta, tmp_path):
    sizes = ["--tokens", 1024, "--sequences", 20000, 200000, "--loader-tokens", 1024, "--packs", 20]
    sizes += ["--balance-tokens", 1024]
    result = measure(tmp_path, "packing", fasta, *sizes, "--seconds", 0.01, "--workers", 0, 1, "--sizes")
    assert [(plan["packing"], plan["sequences"]) for plan in result["plans"]] == [
        ("pack", 40),
        ("pack", 200_000),
        ("bucket", 40),
        ("bucket", 200_000),
    ]
    fill = [plan["fill"] for plan in result["plans"]]
    assert 0.99 < fill[0] <= 1 and fill[0] > fill[2] > 0.7
    balance = {(kind, ranks): ratios for kind, _, ranks, _, *ratios in result["balance"]}
    assert len(balance) == 6
    for in_turn, divided, step_in_turn, step_divided in balance.values():
        assert 1 <= divided <= in_turn and 1 <= step_divided <= step_in_turn <= in_turn
    # 16 packs for each of 8 ranks, some of which are one long protein.
    assert balance["long", 8][1] < 1.1 < balance["long", 8][0]
    assert set(result["tokens_per_second"]) == {"building", "loader, workers=0", "loader, workers=1"}
    # Ten times the sequences need no more than a few cached tables: a window of 8192 is planned at a time.
    assert result["peak_bytes"]["200000"] == pytest.approx(result["peak_bytes"]["20000"], rel=0.5)


def test_an_unknown_part_is_refused():
    done = subprocess.run([sys.executable, SCRIPT, "loading"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "must be one of prepare, packing, uniref" in done.stderr
