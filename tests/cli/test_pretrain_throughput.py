"""The throughput benchmark runs, and its contenders are given the same work."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from esm2mega.data.simulate import FamilySpec, simulate_families

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pretrain_throughput.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("pretrain_throughput", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while it is being executed.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("fasta") / "small.fasta"
    simulate_families(path, n_families=10, members=2, spec=FamilySpec(median_length=60, max_length=150))
    return path


def test_packed_and_padded_batches_hold_the_same_tokens_and_labels(benchmark, fasta):
    work = benchmark.make_workload(fasta, proteins=12, max_residues=50, batch_size=4, seed=1)
    assert [len(batch) for batch in work.batches] == [4, 4, 4]
    assert sorted(sum(work.sorted_batches, [])) == sorted(sum(work.batches, [])) == list(range(12))
    assert work.num_tokens <= work.padded_tokens(work.sorted_batches) <= work.padded_tokens(work.batches)
    proteins = [work.proteins[i] for i in work.batches[0]]
    assert max(len(protein.input_ids) for protein in proteins) == 52
    input_ids, attention_mask, labels = benchmark._pad(proteins)
    pack = benchmark._pack(proteins)
    keep = attention_mask.bool()
    assert torch.equal(input_ids[keep], pack.input_ids)
    assert torch.equal(labels[keep][pack.label_positions], pack.labels)
    assert int((labels != -100).sum()) == len(pack.labels) > 0
    assert pack.seqlens == attention_mask.sum(1).tolist() == np.diff(pack.cu_seqlens).tolist()


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
    assert written["computed_tokens"]["esm2mega"] == written["real_tokens"]
    assert "esm2mega is" in capsys.readouterr().out


def test_no_fasta_is_a_usage_error(benchmark, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([str(tmp_path / "absent.fasta")])
    assert stop.value.code == 2
    assert "no FASTA file at" in capsys.readouterr().err
