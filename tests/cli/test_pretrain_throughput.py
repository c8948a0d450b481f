"""The throughput benchmark runs, and its contenders are given the same work."""

import importlib
import json
from pathlib import Path

import numpy as np
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


def test_packed_and_padded_batches_hold_the_same_tokens_and_labels(benchmark, fasta):
    drawn = benchmark.draw_proteins(fasta, 12, max_residues=50, seed=1)
    shuffled = benchmark.random_order(drawn, benchmark.by_number(4), np.random.default_rng(0))
    by_length = benchmark.sorted_order(drawn, benchmark.by_number(4), np.random.default_rng(0))
    assert [len(batch) for batch in shuffled] == [4, 4, 4]
    everything = [
        sorted(p.input_ids.tobytes() for p in sum(batches, [])) for batches in (shuffled, by_length)
    ]
    assert everything[0] == everything[1] == sorted(p.input_ids.tobytes() for p in drawn)
    real = benchmark.real_tokens(shuffled)
    assert real <= benchmark.padded_tokens(by_length) <= benchmark.padded_tokens(shuffled)
    proteins = next(batch for batch in shuffled if max(len(p.input_ids) for p in batch) == 52)
    input_ids, attention_mask, labels = benchmark.pad(proteins)
    pack = benchmark.pack(proteins)
    keep = attention_mask.bool()
    assert torch.equal(input_ids[keep], pack.input_ids)
    assert torch.equal(labels[keep][pack.label_positions], pack.labels)
    assert int((labels != -100).sum()) == len(pack.labels) > 0
    assert pack.seqlens == attention_mask.sum(1).tolist() == np.diff(pack.cu_seqlens).tolist()


def test_a_batch_holds_what_fits_into_its_tokens(benchmark, fasta):
    drawn = benchmark.draw_proteins(fasta, 12, max_residues=50, seed=1)
    batches = benchmark.by_tokens(120)(drawn)
    assert [p for batch in batches for p in batch] == drawn
    totals = [sum(len(p.input_ids) for p in batch) for batch in batches]
    assert max(totals) <= 120
    firsts = [len(batch[0].input_ids) for batch in batches[1:]]
    assert all(total + first > 120 for total, first in zip(totals, firsts, strict=False))


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
