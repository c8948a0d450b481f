"""`embed` on several processes gives the same numbers, and after kills the same bytes."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from esm2mega.errors import MachineError
from esm2mega.infer.variant_tables import read_table
from esm2mega.model.kernels.int8 import check_products
from tests import foreign
from tests.infer_models import (
    MAX_SEQ_LENGTH,
    Reference,
    ids_of,
    make_reference,
    pseudo_log_likelihood,
    random_proteins,
    write_fasta,
)
from tests.ranks import end_ranks, run_ranks, start_ranks

pytestmark = pytest.mark.distributed

EVERYTHING = ("--include", "residue,pooled,logits,contacts", "--layers", "0,2,-1", "--too-long", "chunk")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    return make_reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 20,000 residues, which are five pieces; two proteins are longer than the window."""
    lengths = [1, 300, *np.random.default_rng(2).integers(2, 126, 300).tolist(), 200]
    pairs = [(f"p{number}", sequence) for number, sequence in enumerate(random_proteins(lengths))]
    return write_fasta(tmp_path_factory.mktemp("fasta") / "proteins.fasta", pairs)


def arguments(reference: Reference, fasta: Path, out: Path, *more: str) -> list[str]:
    return ["-m", "esm2mega", "-v", "embed", str(reference.checkpoint), str(fasta), "--out", str(out), *more]


@pytest.fixture(scope="module")
def alone(reference: Reference, fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(arguments(reference, fasta, folder / "x.h5", *EVERYTHING), 1, folder / "output")
    return folder / "x.h5"


def differences(path: Path, other: Path) -> dict[str, float]:
    """Largest difference of each data set that is not the same bit by bit, relative to its largest value."""
    found = {}
    with h5py.File(path) as a, h5py.File(other) as b:
        names: list[str] = []
        a.visit(names.append)
        for name in (n for n in names if isinstance(a[n], h5py.Dataset)):
            x, y = a[name][()], b[name][()]
            assert x.shape == y.shape and x.dtype == y.dtype, name
            if x.tobytes() != y.tobytes() if x.dtype != object else (x != y).any():
                found[name] = float(np.nanmax(np.abs(x - y)) / np.nanmax(np.abs(y)))
    return found


def test_data_parallel_gives_the_same_file(
    reference: Reference, fasta: Path, alone: Path, tmp_path: Path
) -> None:
    run_ranks(arguments(reference, fasta, tmp_path / "x.h5", *EVERYTHING), 2, tmp_path / "output")
    assert (tmp_path / "x.h5").read_bytes() == alone.read_bytes()


@pytest.mark.slow
# Six heads cannot be divided among four context-parallel ranks, of which one has none then.
@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ("tensor_model_parallel_size", 2),
        ("context_parallel_size", 2),
        ("context_parallel_size", 4),
        ("pipeline_model_parallel_size", 2),
    ],
)
def test_contacts_in_tiles_are_added_over_ranks(
    reference: Reference, tmp_path: Path, layout: str, ranks: int
) -> None:
    """From 4,096 residues on they are computed in tiles, of which each rank has a share."""
    pairs = [(f"p{n}", text) for n, text in enumerate(random_proteins([40, 4200, 90]))]
    fasta = write_fasta(tmp_path / "proteins.fasta", pairs)
    words = ("--include", "residue,contacts", "--max-seq-length", "5000")
    run_ranks(arguments(reference, fasta, tmp_path / "alone.h5", *words), 1, tmp_path / "one")
    split = (*words, f"parallel.{layout}={ranks}")
    run_ranks(arguments(reference, fasta, tmp_path / "split.h5", *split), ranks, tmp_path / "several")
    assert max(differences(tmp_path / "split.h5", tmp_path / "alone.h5").values(), default=0) <= 1e-5


def test_data_parallel_in_int8_gives_the_same_file(reference: Reference, tmp_path: Path) -> None:
    try:
        check_products()
    except MachineError as error:
        pytest.skip(str(error))
    pairs = [
        (f"p{number}", sequence) for number, sequence in enumerate(random_proteins([3, 126, 60, 90] * 20))
    ]
    fasta = write_fasta(tmp_path / "proteins.fasta", pairs)
    files = []
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}.h5"
        command = arguments(reference, fasta, out, "--precision", "int8", "--max-drift", "0.5")
        run_ranks(command, world_size, tmp_path / f"output_{world_size}")
        files.append(out.read_bytes())
    assert files[0] == files[1]


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("layout", "world_size", "bitwise"),
    [
        ("tensor_model", 2, {"residue/layer_0", "pooled/layer_0"}),
        ("pipeline_model", 2, {"residue", "pooled", "logits"}),
        ("context", 2, {"residue/layer_0", "pooled/layer_0"}),
    ],
)
def test_model_parallel_gives_the_same_numbers(
    reference: Reference,
    fasta: Path,
    alone: Path,
    tmp_path: Path,
    layout: str,
    world_size: int,
    bitwise: set[str],
) -> None:
    split = f"parallel.{layout}_parallel_size=2"
    run_ranks(
        arguments(reference, fasta, tmp_path / "x.h5", *EVERYTHING, split), world_size, tmp_path / "output"
    )
    found = differences(tmp_path / "x.h5", alone)
    # The split sums of TP are added in another order; under PP only those of contacts are, over the stages.
    assert found and not any(name.startswith(tuple(bitwise)) for name in found)
    assert all(value <= 1e-5 for value in found.values()), found


def test_files_of_other_packages_under_tp(
    reference: Reference, fasta: Path, alone: Path, tmp_path: Path
) -> None:
    """Each process takes its share of the weights out of a directory of Hugging Face, a file of fair-esm."""
    split = "parallel.tensor_model_parallel_size=2"
    command = ["-m", "esm2mega", "-v", "embed", str(reference.hugging_face), str(fasta)]
    command += ["--out", str(tmp_path / "x.h5"), *EVERYTHING, "--max-seq-length", str(MAX_SEQ_LENGTH), split]
    run_ranks(command, 2, tmp_path / "output")
    found = differences(tmp_path / "x.h5", alone)
    assert found and all(value <= 1e-5 for value in found.values()), found

    pytest.importorskip("esm", reason="fair-esm is not installed")
    truth = foreign.truth(torch.float32, "fp16")
    proteins = random_proteins([60, 17], seed=4)
    few = write_fasta(tmp_path / "few.fasta", [(f"p{i}", protein) for i, protein in enumerate(proteins)])
    command[4:6] = [str(foreign.write_fair_esm(truth, tmp_path)), str(few)]
    command[7] = str(tmp_path / "y.h5")
    run_ranks(command, 2, tmp_path / "output")
    with h5py.File(tmp_path / "y.h5") as file, torch.no_grad():
        for number, protein in enumerate(proteins):
            theirs = truth.model(ids_of(protein), repr_layers=[0, 2, 4], return_contacts=True)
            rows = slice(*file["offsets"][number : number + 2])
            maps = file["contacts"][slice(*file["contact_offsets"][number : number + 2])]
            pairs = [(file["logits"][rows], theirs["logits"][0, 1:-1])]
            pairs.append((maps.reshape(len(protein), len(protein)), theirs["contacts"][0]))
            for layer, states in theirs["representations"].items():
                pairs.append((file[f"residue/layer_{layer}"][rows], states[0, 1:-1]))
            for actual, expected in pairs:
                assert np.abs(actual - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def test_three_kills_leave_no_trace(reference: Reference, fasta: Path, alone: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments after the first, second and third finished piece."""
    out, done = tmp_path / "x.h5", tmp_path / "x.h5.partial" / "done.0"
    command = arguments(reference, fasta, out, *EVERYTHING, "--resume", "--pack-tokens", "256")
    rng = random.Random(11)
    finished = 0
    for attempt in range(3):
        processes = start_ranks(command, 1, tmp_path / f"output{attempt}")
        try:
            # Not by the clock, which goes on while a busy machine lets nobody run.
            for _ in range(60_000):
                if _pieces(done) > finished or processes[0].poll() is not None:
                    break
                time.sleep(0.002)
            time.sleep(rng.random() * 0.02)
            os.kill(processes[0].pid, signal.SIGKILL)
            assert processes[0].wait() == -signal.SIGKILL, "it was finished before it could be killed"
        finally:
            end_ranks(processes)
        assert not out.exists()
        finished = _pieces(done)
        assert finished > attempt
    run_ranks(command, 1, tmp_path / "output")
    assert out.read_bytes() == alone.read_bytes()


def _pieces(journal: Path) -> int:
    return len(journal.read_text().split()) if journal.exists() else 0


def test_a_stream_is_read_by_one_rank(reference: Reference, tmp_path: Path) -> None:
    """A pipe has one end to read from; what it holds is the same output as the file."""
    pairs = [(f"p{number}", sequence) for number, sequence in enumerate(random_proteins([5, 40, 17, 60]))]
    fasta, pipe = write_fasta(tmp_path / "x.fasta", pairs), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(fasta.read_bytes(),))
    writer.start()
    outputs = [tmp_path / "file.h5", tmp_path / "stream.h5"]
    for source, out in zip((fasta, pipe), outputs, strict=True):
        run_ranks(arguments(reference, source, out), 2, tmp_path / out.stem)
    writer.join(timeout=10)
    with h5py.File(outputs[0]) as ours, h5py.File(outputs[1]) as theirs:
        assert (ours["ids"][()] == theirs["ids"][()]).all()
        assert (ours["residue/layer_4"][()] == theirs["residue/layer_4"][()]).all()


def test_an_error_is_reported_once(reference: Reference, tmp_path: Path) -> None:
    from tests.ranks import RanksFailed

    fasta = tmp_path / "bad.fasta"
    fasta.write_text(">a\nMKT\n>b\n")
    with pytest.raises(RanksFailed):
        run_ranks(arguments(reference, fasta, tmp_path / "x.h5"), 2, tmp_path / "output")
    errors = [(tmp_path / "output" / f"rank{rank}.err").read_text() for rank in range(2)]
    assert sum(text.count("no sequence under the header of 'b'; remove") for text in errors) >= 1
    assert sum("esm2mega: [rank" in text for text in errors) == 1


def test_scores_are_the_same_at_every_layout(reference: Reference, tmp_path: Path) -> None:
    """A scan by one process, by two with half of the masked copies each, and by a model in two parts."""
    (protein,) = random_proteins([40], seed=7)
    found = []
    for name, world_size, split in (
        ("alone", 1, []),
        ("data", 2, []),
        ("tensor", 2, ["parallel.tensor_model_parallel_size=2"]),
        ("pipeline", 2, ["parallel.pipeline_model_parallel_size=2"]),
    ):
        out = tmp_path / f"{name}.csv"
        command = ["-m", "esm2mega", "-v", "score", str(reference.checkpoint), "--sequence", protein]
        run_ranks([*command, "--out", str(out), *split], world_size, tmp_path / name)
        table = read_table(out)
        found.append((table.column("mutant", ""), np.array(table.column("score", ""), dtype=float)))
    for mutants, scores in found[1:]:
        assert mutants == found[0][0] and len(mutants) == 40 * 19
        # In nats, as in tests/unit/infer/test_score.py.
        assert np.abs(scores - found[0][1]).max() < 1e-4


@pytest.mark.some(2)
@pytest.mark.parametrize("split", ["tensor_model", "pipeline_model", "context"])
def test_whole_sequences_at_layouts(reference: Reference, tmp_path: Path, split: str) -> None:
    """A model in two parts, in fp64, against Hugging Face's in one; one protein is over the window."""
    wild, other, long = random_proteins([24, 9, 40], seed=8)
    proteins = {"deletion": wild[:7] + wild[9:], "other": other, "long": long}
    fasta, out = write_fasta(tmp_path / "p.fasta", proteins), tmp_path / "out.csv"
    command = ["-m", "esm2mega", "-v", "score", str(reference.checkpoint), "--sequence", wild]
    command += [
        "--variants",
        str(fasta),
        "--out",
        str(out),
        "infer.precision=fp64",
        "infer.max_seq_length=30",
    ]
    run_ranks([*command, f"parallel.{split}_parallel_size=2"], 2, tmp_path / "output")
    own = pseudo_log_likelihood(reference, wild, 30)
    table = read_table(out)
    assert table.column("id", "") == list(proteins)
    for sequence, cell in zip(proteins.values(), table.column("score", ""), strict=True):
        # Nats, of sums of up to 40 terms in fp64.
        assert abs(float(cell) - (pseudo_log_likelihood(reference, sequence, 30) - own)) < 1e-9


_MEASURE = """
import resource, sys
from esm2mega.cli.app import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("large", [4000, 8000])
def test_memory_does_not_grow_with_the_input(reference: Reference, tmp_path: Path, large: int) -> None:
    """Peak memory of one process for 500 proteins and for many, whose output is 115 or 245 MB larger."""
    peaks = []
    for count in (500, large):
        proteins = random_proteins([36] * count, seed=1)
        fasta = write_fasta(tmp_path / f"{count}.fasta", [(f"p{i}", s) for i, s in enumerate(proteins)])
        out = tmp_path / f"{count}.h5"
        command = ["-c", _MEASURE, "embed", str(reference.checkpoint), str(fasta), "--out", str(out)]
        (result,) = run_ranks([*command, "--layers", "0,1,2,3,4"], 1, tmp_path / f"output{count}")
        peaks.append(int(result.stdout.split()[-1]) / 1024)
        size = out.stat().st_size / 2**20
        print(f"{count} proteins: {size:.0f} MB of output, peak {peaks[-1]:.0f} MB")
    assert size > 0.03 * large
    assert peaks[1] < peaks[0] + 40
