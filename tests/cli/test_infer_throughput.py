"""The benchmark of embedding: its batches are those it claims, and all contenders are measured."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from esm2mega.data.readers.fasta import FastaReader
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


def test_batches_are_those_of_extract(benchmark, fasta):
    """fair-esm's own code, which the script does not call since it wants sequences as text."""
    import esm

    lengths = [len(record.residues) for record in FastaReader(fasta)]
    dataset = esm.FastaBatchedDataset(list(map(str, range(12))), ["A" * n for n in lengths])
    theirs = dataset.get_batch_indices(benchmark.PADDED_TOKENS, extra_toks_per_seq=1)
    assert benchmark.extract_batches(lengths) == theirs
    assert len(theirs) > 1


def test_a_sample_is_some_of_these_batches(benchmark, fasta):
    whole = benchmark.draw_batches(fasta, 0, 1022, seed=1)
    some = benchmark.draw_batches(fasta, 1, 1022, seed=1)
    texts = [[protein.tobytes() for protein in batch] for batch in whole]
    assert len(some) == 1 < len(whole)
    assert all([protein.tobytes() for protein in batch] in texts for batch in some)
    cut = benchmark.draw_batches(fasta, 0, 40, seed=1)
    assert sum(map(len, cut)) == 12 and max(len(protein) for batch in cut for protein in batch) == 40


def test_padding_keeps_the_residues(benchmark, fasta):
    for batch in benchmark.draw_batches(fasta, 0, 1022, seed=1):
        ids = benchmark.pad(batch)
        assert ids.shape == (len(batch), max(map(len, batch)) + 2)
        for row, residues in zip(ids, batch, strict=True):
            assert np.array_equal(row[row != 1][1:-1], residues)


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
