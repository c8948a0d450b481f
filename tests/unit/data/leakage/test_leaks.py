"""Related proteins in different splits: both searches, counts, inputs, refusals."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from esm2mega.cli.tools import inspect
from esm2mega.data.leakage import kmers, mmseqs
from esm2mega.data.leakage.kmers import MOST_RELATIVES, kmer_hits
from esm2mega.data.leakage.leaks import KMERS, MMSEQS, find_leaks
from esm2mega.data.store.token_store import StoreWriter
from esm2mega.errors import MachineError, UserError

LETTERS = np.array(list("LAGVSERTIDPKQNFYMHWC"))
METHODS = [
    KMERS,
    pytest.param(
        MMSEQS,
        marks=[
            # A search by MMseqs2 takes a second or more, however small it is.
            pytest.mark.slow,
            pytest.mark.skipif(mmseqs.find_mmseqs() is None, reason="MMseqs2 is not installed"),
        ],
    ),
]


def protein(rng: np.random.Generator, length: int = 120) -> str:
    return "".join(rng.choice(LETTERS, length))


def mutated(rng: np.random.Generator, sequence: str, share: float) -> str:
    """A protein in which this share of residues is another one."""
    letters = list(sequence)
    for place in rng.choice(len(letters), round(share * len(letters)), replace=False):
        letters[place] = rng.choice([letter for letter in LETTERS if letter != letters[place]])
    return "".join(letters)


@pytest.mark.parametrize("method", METHODS)
def test_planted_relatives_are_found(method: str) -> None:
    rng = np.random.default_rng(3)
    base = [protein(rng) for _ in range(40)]
    train = [(f"t{n}", sequence) for n, sequence in enumerate(base)]
    gap = base[2][:50] + base[2][56:]
    test = [
        ("equal", base[0].lower()),
        ("close", mutated(rng, base[1], 0.2)),
        ("gapped", mutated(rng, gap, 0.15)),
        ("fragment", base[3][:60]),
        ("stranger", protein(rng)),
        ("short", "MK"),
    ]
    valid = [("v0", base[0]), ("v1", protein(rng))]
    leaks = find_leaks({"train": train, "valid": valid, "test": test}, 0.3, 1, method)
    found = {pair[:4]: pair.identity for pair in leaks.pairs}
    assert set(found) == {
        ("train", "t0", "valid", "v0"),
        ("train", "t0", "test", "equal"),
        ("valid", "v0", "test", "equal"),
        ("train", "t1", "test", "close"),
        ("train", "t2", "test", "gapped"),
    }
    assert found["train", "t1", "test", "close"] == pytest.approx(0.8, abs=0.02)
    # Without the six columns of the gap 85 %; programs differ in whether these count.
    assert found["train", "t2", "test", "gapped"] == pytest.approx(0.83, abs=0.04)
    assert leaks.counts == {"train/valid": 1, "train/test": 3, "valid/test": 1}
    assert (leaks.num_identical, leaks.num_proteins, leaks.is_capped) == (3, 4, False)
    assert [pair.identity for pair in leaks.pairs] == sorted(found.values(), reverse=True)
    # Of the pair that is 80 % identical nothing is left above 90 %.
    assert find_leaks({"train": train, "test": test}, 0.9, 1, method).counts == {"train/test": 1}


@pytest.mark.parametrize("method", METHODS)
def test_variants_of_one_protein_are_counted_and_not_all_named(method: str) -> None:
    rng = np.random.default_rng(4)
    wild = protein(rng, 60)
    variants = [(f"s{n}", mutated(rng, wild, 0.04)) for n in range(2 * MOST_RELATIVES + 40)]
    train = [*variants[:-40], ("first", wild), ("again", wild)]
    test = [*variants[-40:], ("other", wild)]
    leaks = find_leaks({"train": train, "test": test}, 0.3, 1, method)
    assert leaks.is_capped and leaks.num_proteins == 41 and leaks.num_identical >= 2
    assert 41 * 2 < leaks.num_pairs <= 41 * (MOST_RELATIVES + 2)
    assert "train/test: at least " in "\n".join(leaks.lines(3, is_written=False))
    assert leaks.pairs[0].identity == 1 and len(leaks.pairs) <= 1000


def test_the_identity_of_the_screen_is_that_of_the_best_alignment() -> None:
    """Against all alignments of the whole, by the plain recursion of Needleman and Wunsch with free ends."""
    rng = np.random.default_rng(5)
    first, second = [], []
    for _ in range(6):
        sequence = protein(rng, 70)
        cut = int(rng.integers(20, 50))
        first.append(sequence)
        second.append(mutated(rng, sequence[:cut] + protein(rng, 3) + sequence[cut:], 0.25))
    rows, identities, _ = kmer_hits(first, second, 0.01, 0.8)
    assert sorted(rows.tolist()) == [[n, n] for n in range(6)]
    for (row, other), identity in zip(rows.tolist(), identities.tolist(), strict=True):
        assert identity == pytest.approx(by_recursion(first[row], second[other]), abs=1e-12)


@pytest.mark.parametrize("length", [20, 24])
def test_an_overlap_of_ends_is_no_relative(length: int) -> None:
    """Equal residues over half of both proteins are not the 80 % of both that are asked for."""
    rng = np.random.default_rng(8)
    middle = protein(rng, length // 2)
    first, second = protein(rng, length // 2) + middle, middle + protein(rng, length // 2)
    assert len(kmer_hits([first], [second], 0.3, 0.8)[0]) == 0
    assert len(kmer_hits([first], [second], 0.3, 0.5)[0]) == 1


def test_relatives_beyond_the_last_one_aligned_are_said_to_be_there() -> None:
    """One protein that is aligned and unrelated hides none of those that are not aligned."""
    rng = np.random.default_rng(9)
    query = protein(rng, 100)
    near = [mutated(rng, query, 0.3) for _ in range(2 * MOST_RELATIVES)]
    words = query[:40] + protein(rng, 60)  # many words in common, too few residues
    rows, _, is_capped = kmer_hits([words, *near], [query], 0.6, 0.8)
    assert len(rows) < MOST_RELATIVES and is_capped
    assert not kmer_hits(near[: MOST_RELATIVES - 1], [query], 0.6, 0.8)[2]


def test_long_proteins_are_aligned_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(10)
    base = protein(rng, 300)
    first = [mutated(rng, base, 0.05) for _ in range(20)]
    second = [mutated(rng, base, 0.05) for _ in range(20)]
    expected = kmer_hits(first, second, 0.3, 0.8)
    sizes = []
    whole = kmers._aligned

    def aligned(*given: Any) -> Any:
        sizes.append(len(given[2]) * 300)
        return whole(*given)

    monkeypatch.setattr(kmers, "_aligned", aligned)
    monkeypatch.setattr(kmers, "_MOST_TOGETHER", 2 * MOST_RELATIVES * 300)
    found = kmer_hits(first, second, 0.3, 0.8)
    assert len(sizes) == 10 and max(sizes) <= kmers._MOST_TOGETHER
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def by_recursion(first: str, second: str) -> float:
    table = {(0, j): (0, 0, 0) for j in range(len(first) + 1)} | {
        (i, 0): (0, 0, 0) for i in range(len(second) + 1)
    }

    def step(cell: tuple[int, int, int], score: int, equal: int) -> tuple[int, int, int]:
        return cell[0] + score, cell[1] + equal, cell[2] + 1

    for i in range(1, len(second) + 1):
        for j in range(1, len(first) + 1):
            same = first[j - 1] == second[i - 1]
            table[i, j] = max(
                step(table[i - 1, j - 1], 5 if same else -1, int(same)),
                step(table[i - 1, j], -6, 0),
                step(table[i, j - 1], -6, 0),
            )
    ends = [cell for (i, j), cell in table.items() if i == len(second) or j == len(first)]
    _, equal, columns = max(ends)
    return equal / columns


def run(*words: object) -> str:
    result = CliRunner().invoke(inspect, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_command_reads_tables_fasta_stores_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esm2mega.data.leakage.leaks.find_mmseqs", lambda: None)
    rng = np.random.default_rng(6)
    base = protein(rng)
    close = mutated(rng, base, 0.1)
    table, fasta, store = tmp_path / "train.csv", tmp_path / "valid.fasta", tmp_path / "stores" / "test"
    table.write_text(f"id,sequence,target\na,{base},1\nb,{protein(rng)},2\n")
    fasta.write_text(f">c TARGET=1\n{protein(rng)}\n")
    with StoreWriter(store) as writer:
        writer.append(["d", "e"], [close.encode(), b"MKT"])
    out = tmp_path / "leaks.csv"
    text = run("--leakage", table, fasta, store, "--out", out, "--min-identity", 0.5)
    assert "train/test: 1 pairs, 1 of 2 proteins of test have a relative in train" in text
    assert "train a  test d  90.0 %" in text and "identical sequences: 0 pairs" in text
    assert list(csv.reader(out.open())) == [
        ["split", "id", "other_split", "other_id", "identity"],
        ["train", "a", "test", "d", "0.900"],
    ]
    assert run("--leakage", table, store).splitlines()[1] == text.splitlines()[2]
    folder = run("--leakage", tmp_path)
    assert "train/valid: 0 pairs" in folder and "test" not in folder
    fasta.rename(tmp_path / "val.FASTA")  # as others name it
    assert run("--leakage", tmp_path) == folder


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    fasta = tmp_path / "train.fasta"
    fasta.write_text(">a\nMKT\n")
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("train.csv", "dev.csv", "val.csv"):
        (twice / name).write_text("id,sequence\na,MKT\n")
    for words, message in (
        (["--leakage", fasta], "give TRAIN VALID TEST"),
        (["--leakage", tmp_path], "holds train of train, valid and test"),
        (["--leakage", fasta, tmp_path / "absent"], "absent: no such path"),
        (["--leakage", *[fasta] * 4], "4 paths are given"),
        (["--leakage", twice], "has dev.csv and val.csv; name the files"),
        (["--leakage", fasta, fasta, "--min-identity", 30], "--min-identity 30: an identity is above 0"),
        (["--leakage", fasta, fasta, "--out", tmp_path], "is a directory"),
        (["--leakage", fasta, fasta, "--verify"], "leave one of them out"),
        ([fasta, fasta], "inspect describes one path, not 2"),
        ([fasta, "--out", "x.csv"], "--out is for --leakage"),
    ):
        with pytest.raises(UserError, match=message):
            run(*words)


def test_a_failure_of_mmseqs_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "mmseqs"
    program.write_text("#!/bin/sh\necho 'Could not write' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(MachineError, match="exit code 3: Could not write"):
        find_leaks({"train": [("a", "MKT")], "test": [("b", "MKT")]})
    assert list(tmp_path.iterdir()) == [program]
    # So it ends where all proteins that are searched are too short or repeats.
    program.write_text(
        "#!/bin/sh\necho 'No k-mer could be extracted for x.'\necho 'Error: Search died'\nexit 1\n"
    )
    leaks = find_leaks({"train": [("a", "MKT"), ("c", "MKV")], "test": [("b", "MKT")]})
    assert (leaks.method, leaks.num_pairs, leaks.num_identical) == (MMSEQS, 1, 1)
