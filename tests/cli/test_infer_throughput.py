"""The benchmark of embedding runs, and all contenders are measured."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from tests.infer_models import random_proteins, write_fasta

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    pytest.importorskip("transformers")
    pytest.importorskip("esm")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("infer_throughput")


@pytest.fixture
def fasta(tmp_path):
    lengths = [5, 900, 44, 700, 60, 31, 300, 299, 12, 1000, 20, 77]
    return write_fasta(tmp_path / "p.fasta", [(f"p{i}", s) for i, s in enumerate(random_proteins(lengths))])


def test_all_contenders_are_measured(benchmark, fasta, tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = [str(fasta), "--size", "tiny", "--batches", "1", "--max-residues", "30", "--rounds", "2"]
    try:
        benchmark.main([*arguments, "--threads", "1", "--json", str(tmp_path / "out.json")])
    finally:
        torch.set_num_threads(threads)
    written = json.loads((tmp_path / "out.json").read_text())["tokens_per_second"]
    assert set(written) == {"fp32", "bf16"}
    assert all(list(rates) == ["fair-esm", "hf-sorted", "esm2mega", "kernels"] for rates in written.values())
    assert all(len(r) == 2 and min(r) > 0 for rates in written.values() for r in rates.values())
    assert "esm2mega is" in capsys.readouterr().out
