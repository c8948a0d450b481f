"""The benchmark of training runs, and all contenders are measured."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from esm2mega.quickstart.simulate import FamilySpec, simulate_families

pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("pretrain_throughput")


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("fasta") / "small.fasta"
    simulate_families(path, n_families=10, members=2, spec=FamilySpec(median_length=60, max_length=150))
    return path


def test_all_contenders_are_measured(benchmark, fasta, tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = [
        str(fasta),
        "--sizes",
        "tiny",
        "--proteins",
        "6",
        "--batch-size",
        "3",
        "--max-residues",
        "40",
    ]
    try:
        benchmark.main([*arguments, "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "out.json")])
    finally:
        torch.set_num_threads(threads)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [result["contender"] for result in written["results"]] == ["hf-random", "hf-sorted", "esm2mega"]
    assert all(len(result["tokens_per_second"]) == 2 for result in written["results"])
    assert written["results"][2]["computed_tokens"] == [1, 1]
    assert "esm2mega is" in capsys.readouterr().out


def test_no_fasta_is_a_usage_error(benchmark, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([str(tmp_path / "absent.fasta")])
    assert stop.value.code == 2
    assert "no FASTA file at" in capsys.readouterr().err
