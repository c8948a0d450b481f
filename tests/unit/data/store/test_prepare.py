"""`prepare fasta`: complete and exact stores, a deterministic split, and no trace of a failed attempt."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import dnaio
import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esm2mega import vocabulary
from esm2mega.data.overlap import check_overlap
from esm2mega.data.readers import text
from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.store import parts, prepare
from esm2mega.data.store.prepare import PrepareOptions, prepare_fasta
from esm2mega.data.store.splits import SPLITS
from esm2mega.data.store.staging import check_new
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import MachineError, UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@pytest.fixture
def small_fasta(tmp_path: Path) -> Path:
    """20 proteins, p0 to p19, of 1 to 20 residues."""
    path = tmp_path / "small.fasta"
    path.write_text("".join(f">p{i} protein {i}\n{'MKTLAGVSERMKTLAGVSER'[: i + 1]}\n" for i in range(20)))
    return path


def ids(store: Path) -> list[str]:
    opened = TokenStore(store)
    return [opened.id(i) for i in range(len(opened))]


def sequence(store: Path, row: int) -> str:
    return "".join(vocabulary.VOCAB[token] for token in TokenStore(store).residues(row))


def test_without_split_everything_is_training_data(small_fasta: Path, tmp_path: Path) -> None:
    report = prepare_fasta([small_fasta], tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["train"]
    assert ids(tmp_path / "out" / "train") == [f"p{i}" for i in range(20)]
    assert list(report.counts) == ["train"] and report.counts["train"].residues == 210
    assert report.lines() == [
        f"{tmp_path / 'out' / 'train'}: 20 sequences, 210 residues; 0 lower-case residues raised, "
        "0 unknown residues stored as <unk>, 0 sequences dropped"
    ]


def test_split_is_disjoint_complete_ordered_and_pinned(small_fasta: Path, tmp_path: Path) -> None:
    prepare_fasta([small_fasta], tmp_path / "out", valid_size=3, test_size=2, seed=7)
    split = {name: ids(tmp_path / "out" / name) for name in ("train", "valid", "test")}
    assert split["valid"] == ["p6", "p12", "p18"]
    assert split["test"] == ["p14", "p17"]
    numbers = {name: [int(name[1:]) for name in names] for name, names in split.items()}
    assert all(part == sorted(part) for part in numbers.values())
    assert sorted(sum(numbers.values(), [])) == list(range(20))


def test_splits_that_share_repeated_sequences_are_named(tmp_path: Path) -> None:
    """Which training would refuse: the note and the refusal count the same."""
    path, out = tmp_path / "repeats.fasta", tmp_path / "out"
    path.write_text("".join(f">p{i}\n{'MKTLAGVSER'[: 1 + i // 6]}\n" for i in range(24)))
    report = prepare_fasta([path], out, valid_size=6)
    residues = {
        split: [sequence(out / split, i) for i in range(n)] for split, n in (("train", 18), ("valid", 6))
    }
    shared = [text in residues["train"] for text in residues["valid"]]
    assert any(shared)
    (note,) = report.notes
    first = ids(out / "valid")[shared.index(True)]
    assert note.startswith(
        f"{out}/valid: {sum(shared)} of 6 sequences are also in {out}/train, since the input"
    )
    assert f"the first is '{first}'" in note
    stores = {f"data.{split}": [TokenStore(out / split)] for split in ("train", "valid")}
    with pytest.raises(UserError, match=f"valid: {sum(shared)} of 6 proteins are also in .*=true"):
        check_overlap(stores, allowed=False)


def test_split_follows_the_seed_and_not_the_batches(
    small_fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_fasta([small_fasta], tmp_path / "a", valid_size=4, seed=1)
    prepare_fasta([small_fasta], tmp_path / "other seed", valid_size=4, seed=2)
    monkeypatch.setattr(parts, "_BATCH_RESIDUES", 30)
    prepare_fasta([small_fasta], tmp_path / "b", valid_size=4, seed=1)
    assert (
        ids(tmp_path / "a" / "valid")
        == ids(tmp_path / "b" / "valid")
        != ids(tmp_path / "other seed" / "valid")
    )
    assert TokenStore(tmp_path / "a" / "train").manifest == TokenStore(tmp_path / "b" / "train").manifest


@pytest.mark.parametrize("shares", ["7,2,1", "8,1,1", "949,50,1", "1,1,1", "10,0,0", "5,0,5"])
def test_splits_by_position_are_those_of_megatron(tmp_path: Path, shares: str) -> None:
    """Sizes that add up to the input are kept; others are shared out as Megatron-LM did, in floats."""
    total = 10
    fasta = tmp_path / "x.fasta"
    fasta.write_text("".join(f">p{n}\nMKT{'LAGVSERTID'[n]}\n" for n in range(total)))
    prepare_fasta([fasta], tmp_path / "out", shares=shares)
    numbers = [float(x) for x in shares.split(",")]
    borders = [0]
    for number in numbers:
        borders.append(borders[-1] + int(round(number / sum(numbers) * float(total))))
    excess = borders[-1] - total
    borders = [0, *(border - excess for border in borders[1:])]
    for split, first, stop in zip(SPLITS, borders, borders[1:], strict=False):
        expected = [f"p{n}" for n in range(first, stop)]
        if not expected:
            assert not (tmp_path / "out" / split).exists()
            continue
        assert ids(tmp_path / "out" / split) == expected


def test_splits_by_position_are_checked(small_fasta: Path, tmp_path: Path) -> None:
    for split, message in (
        ("1,2", "give three whole numbers, for train, valid and test"),
        ("0,1,1", "the first above 0"),
        ("1,-2,3", "give three whole numbers"),
        ("1e3,2,3", "give three whole numbers"),
        ("1,1000000,0", "leaves nothing to train on: the input has"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_fasta([small_fasta], tmp_path / "out", shares=split)
    for other in ({"valid_size": 1}, {"given": {"valid": "absent.fasta"}}):
        with pytest.raises(UserError, match="--split 1,1,1 and --val-size, .* exclude each other"):
            prepare_fasta([small_fasta], tmp_path / "out", shares="1,1,1", **other)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_several_inputs_are_read_in_order_and_recorded(small_fasta: Path, tmp_path: Path) -> None:
    packed = tmp_path / "more.fa.gz"
    packed.write_bytes(gzip.compress(b">p0\nmkJ*\n>z\nW\n", mtime=0))
    report = prepare_fasta([packed, small_fasta], tmp_path / "out", valid_size=1)
    manifest = TokenStore(tmp_path / "out" / "train").manifest
    assert [(source["name"], source["sequences"]) for source in manifest["sources"]] == [
        ("more.fa.gz", 2),
        ("small.fasta", 20),
    ]
    assert all(len(source["sha256"]) == 64 for source in manifest["sources"])
    assert manifest["split"] == {"name": "train", "seed": 1234, "valid_size": 1, "test_size": 0, "total": 22}
    assert sum(count.sequences for count in report.counts.values()) == 22
    assert sum(count.lower_case_residues for count in report.counts.values()) == 2
    assert sum(count.unknown_residues for count in report.counts.values()) == 2
    everything = ids(tmp_path / "out" / "train") + ids(tmp_path / "out" / "valid")
    assert everything.count("p0") == 2  # repeated ids are kept


BAD_INPUTS = {
    "empty": (b"", "bad.fasta: no sequences in the file"),
    "no sequence": (b">good\nMK\n>a\n>b\nAC\n", "bad.fasta:3: no sequence under the header of 'a'"),
    "non-FASTA": (b"name,sequence\na,MK\n", "bad.fasta:1: not FASTA"),
    "binary": (bytes(range(256)) * 20, "bad.fasta: is a binary file"),
    "truncated gzip": (gzip.compress(b">a\nMK\n" * 500, mtime=0)[:-9], "bad.fasta: the gzip data ends early"),
    "no valid sequence": (b"\n\n\n", "bad.fasta: no sequences in the file"),
    "only unknown": (
        b">good\nMK\n>a\nJJj**\n",
        "bad.fasta:3: the sequence of 'a' has only unknown residues ('JJj**')",
    ),
    "not ASCII": (">good\nMK\n>a\nM\u00e9K\n".encode(), "bad.fasta:4: '\u00e9' in the sequence of 'a'"),
}


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0)], ids=["no split", "split"])
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, small_fasta: Path, name: str, sizes: tuple[int, int]
) -> None:
    content, expected = BAD_INPUTS[name]
    bad = tmp_path / "bad.fasta"
    bad.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:  # behind a good file: everything written so far must go again
        prepare_fasta([small_fasta, bad], tmp_path / "out", *sizes)
    assert str(caught.value).startswith(f"{tmp_path}/{expected}") and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("valid_size", "test_size"), [(20, 0), (10, 10), (0, 21)])
def test_a_split_must_leave_training_data(
    small_fasta: Path, tmp_path: Path, valid_size: int, test_size: int
) -> None:
    with pytest.raises(UserError, match="leave nothing to train on: the input has 20 sequences"):
        prepare_fasta([small_fasta], tmp_path / "out", valid_size, test_size)
    assert not (tmp_path / "out").exists()


def test_arguments_are_checked_before_anything_is_written(small_fasta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no input"):
        prepare_fasta([], tmp_path / "out")
    with pytest.raises(UserError, match="no such FASTA file"):
        prepare_fasta([tmp_path / "absent.fasta"], tmp_path / "out")
    with pytest.raises(UserError, match="given twice"):
        prepare_fasta([small_fasta, tmp_path / "." / small_fasta.name], tmp_path / "out")
    with pytest.raises(UserError, match="--val-size=-1 is negative"):
        prepare_fasta([small_fasta], tmp_path / "out", valid_size=-1)
    assert list(tmp_path.iterdir()) == [small_fasta]


def test_an_existing_output_is_kept(small_fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already; name another directory or remove it"):
        prepare_fasta([small_fasta], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


WITH_A_FILE_SIZE_LIMIT = """
import resource, sys
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.errors import MachineError
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    prepare_fasta([sys.argv[1]], sys.argv[2])
except MachineError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


def test_a_disk_that_refuses_leaves_nothing(small_fasta: Path, tmp_path: Path) -> None:
    # A limit on file sizes stands in for the full disk: writing fails in the same way.
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_FILE_SIZE_LIMIT, str(small_fasta), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == f"1 {tmp_path / 'out'}: cannot be written (File too large); nothing was kept\n"
    assert list(tmp_path.iterdir()) == [small_fasta]


def test_an_unwritable_place_is_a_fault_of_the_machine(small_fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        prepare_fasta([small_fasta], tmp_path / "file" / "out")


KILLED_BEFORE_THE_LAST_RENAME = """
import os, signal, sys
from esm2mega.data.store.prepare import prepare_fasta
rename = os.rename
def rename_or_die(source, target):
    if str(target) == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = rename_or_die
prepare_fasta([sys.argv[1]], sys.argv[2], valid_size=2)
"""


def test_a_killed_prepare_leaves_nothing_that_is_accepted(small_fasta: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_THE_LAST_RENAME, str(small_fasta), str(out)],
        timeout=60,
        check=False,
    )
    (left,) = set(tmp_path.iterdir()) - {small_fasta}
    assert len(list(left.glob("out/*/manifest.json"))) == 2  # both were complete, and still neither counts
    for store in [file.parent for file in left.glob("**/manifest.json")]:
        with pytest.raises(UserError, match="interrupted"):
            TokenStore(store)
    prepare_fasta([small_fasta], out, valid_size=2)
    assert len(TokenStore(out / "train")) == 18


def test_formats_may_be_mixed_and_drops_are_counted(tmp_path: Path) -> None:
    files = {
        "a.fa": b">x\nMK\n",
        "b.csv": b"id,sequence\ny,mkt\nz,\n",
        "c.jsonl": b'{"id": 1, "sequence": ""}\n',
        "d.tsv.gz": gzip.compress(b"sequence\nJA\n", mtime=0),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    inputs = [tmp_path / name for name in files]
    options = PrepareOptions(SourceOptions(drop_empty=True))
    report = prepare_fasta(inputs, tmp_path / "out", options=options)
    assert ids(tmp_path / "out" / "train") == ["x", "y", "2"]
    assert report.lines() == [
        f"{tmp_path / 'd.tsv.gz'}: has no 'id', so the ids are line numbers",
        f"{tmp_path / 'out' / 'train'}: 3 sequences, 7 residues; 3 lower-case residues raised, "
        "1 unknown residues stored as <unk>, 2 sequences dropped",
    ]
    manifest = TokenStore(tmp_path / "out" / "train").manifest
    assert [entry["sequences"] for entry in manifest["sources"]] == [1, 1, 0, 1]
    assert manifest["dropped_sequences"] == 2


@pytest.mark.parametrize("batch", [1, 3, 1 << 16])
def test_given_files_are_the_splits_and_stay_out_of_training(
    small_fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """By sequence, whatever their ids, letters and formats; what merely resembles them is trained on."""
    monkeypatch.setattr(prepare, "_MERGED_RECORDS", batch)
    valid, test = tmp_path / "v.csv", tmp_path / "t.fa.gz"
    valid.write_text("id,sequence\nv0,MKTL\nv1,mktlagvs\nv2,WW\n")
    test.write_bytes(gzip.compress(b">t0\nMKTLAGVSERMKTLAGVSER\n>t1\nMKTLAGVSERMKTWAGVSER\n", mtime=0))
    extra = tmp_path / "extra.fasta"
    extra.write_text(">again\nmktl\n>near\nMKTLAGVSERMKTYAGVSER\n")
    given = {"valid": valid, "test": test}
    report = prepare_fasta([small_fasta, extra], tmp_path / "out", given=given)
    out = tmp_path / "out"
    assert ids(out / "valid") == ["v0", "v1", "v2"] and ids(out / "test") == ["t0", "t1"]
    assert ids(out / "train") == [f"p{i}" for i in range(20) if i not in (3, 7, 19)] + ["near"]
    counts = report.counts
    assert [counts[name].sequences for name in ("train", "valid", "test")] == [18, 3, 2]
    assert [counts[name].dropped_sequences for name in ("train", "valid", "test")] == [4, 0, 0]
    assert [counts[name].lower_case_residues for name in ("train", "valid", "test")] == [0, 8, 0]
    for name, split in counts.items():
        store = TokenStore(out / name)
        assert split.residues == store.lengths.sum() == len(store.tokens)
        assert split.token_counts == np.bincount(store.tokens, minlength=33).tolist()
        store.verify()
    assert report.notes == [
        f"{out}/train: without 4 sequences of the input that are also in --valid or --test; the first is 'p3'"
    ]
    stores = {f"data.{name}": [TokenStore(out / name)] for name in counts}
    assert check_overlap(stores, allowed=False) == []
    manifests = {name: TokenStore(out / name).manifest for name in counts}
    assert [entry["name"] for entry in manifests["train"]["sources"]] == ["small.fasta", "extra.fasta"]
    assert [entry["name"] for entry in manifests["test"]["sources"]] == ["t.fa.gz"]
    files = {"valid": "v.csv", "test": "t.fa.gz"}
    assert manifests["valid"]["split"] == {"name": "valid", "given": files, "left_out": 4}


def test_given_files_that_share_proteins_are_named(small_fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "v.fasta").write_text(">v\nWW\n>w\nYY\n")
    (tmp_path / "t.fasta").write_text(">t\nYY\n")
    given = {"valid": tmp_path / "v.fasta", "test": tmp_path / "t.fasta"}
    (note,) = prepare_fasta([small_fasta], tmp_path / "out", given=given).notes
    assert f"{tmp_path}/out/test: 1 of 1 sequences are also in {tmp_path}/out/valid, since both" in note


def test_given_files_are_refused_where_they_leave_no_split(small_fasta: Path, tmp_path: Path) -> None:
    copy, empty, other = (tmp_path / name for name in ("copy.fasta", "empty.csv", "other.fasta"))
    copy.write_bytes(small_fasta.read_bytes())
    empty.write_text("id,sequence\na,\n")
    other.write_text(">o\nWW\n")
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[dict[str, Path], int, str]] = [
        ({"valid": small_fasta}, 0, "small.fasta: given both as an input and as --valid; each has a file"),
        ({"valid": other, "test": other}, 0, "other.fasta: given both as --valid and as --test; each has"),
        ({"test": other}, 3, "--test names a file of held-out sequences, --val-size and --test-size draw"),
        ({"test": copy}, 0, "nothing is left to train on: all sequences of the input are also in --test;"),
        ({"valid": empty}, 0, "--valid: no sequence is left of empty.csv; name a file with some"),
        ({"valid": tmp_path / "absent.fasta"}, 0, "absent.fasta: no such FASTA file"),
    ]
    options = PrepareOptions(SourceOptions(drop_empty=True))
    for given, size, expected in cases:
        with pytest.raises(UserError) as caught:
            prepare_fasta([small_fasta], tmp_path / "out", size, options=options, given=given)
        assert expected in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before


def test_progress_goes_through_every_byte_of_both_stages(small_fasta: Path, tmp_path: Path) -> None:
    stages: dict[str, list[int]] = {}

    class Progress:
        def __init__(self, stage: str, total: int) -> None:
            stages[stage] = self.counts = [total, 0]

        def __enter__(self) -> Progress:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: int) -> None:
            self.counts[1] += n

    table = tmp_path / "t.csv"  # its header is read twice, and counts once
    table.write_text("sequence\nMK\n")
    prepare_fasta([small_fasta, table], tmp_path / "out", open_progress=Progress)
    read = small_fasta.stat().st_size + table.stat().st_size
    assert stages == {"read": [read, read], "merge": [212, 212]}


@pytest.mark.some(3)
@pytest.mark.parametrize("name", ["p.fasta", "p.fasta.gz", "p.fasta.zst", "p.csv", "p.jsonl.gz", "p.parquet"])
def test_real_proteins_from_every_format(
    real_fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 300_000)
    with dnaio.open(real_fasta) as reference:
        expected = [(record.id, record.sequence) for record in reference]
    content = real_fasta.read_bytes()
    if name.startswith("p.jsonl"):
        content = "".join(json.dumps({"id": i, "sequence": s}) + "\n" for i, s in expected).encode()
    elif name == "p.csv":
        content = "".join(f"{i},{s}\r\n" for i, s in [("id", "sequence"), *expected]).encode()
    if name.endswith(".gz"):
        content = gzip.compress(content, 1, mtime=0)
    elif name.endswith(".zst"):
        content = zstd.compress(content)
    path = tmp_path / name
    path.write_bytes(content)
    if name == "p.parquet":
        columns = dict(zip(("id", "sequence"), map(list, zip(*expected, strict=True)), strict=True))
        pq.write_table(pa.table(columns), path, row_group_size=3000)
    prepare_fasta([path], tmp_path / "out", options=PrepareOptions(workers=2))
    store = TokenStore(tmp_path / "out" / "train")
    found = [(store.id(i), vocabulary.decode(store.residues(i))) for i in range(len(store))]
    assert found == [(i, sequence.upper()) for i, sequence in expected]
    assert len(found) == 8000


def test_real_proteins_are_stored_exactly(real_fasta: Path, tmp_path: Path) -> None:
    began = time.process_time()
    prepare_fasta([real_fasta], tmp_path / "out", valid_size=400, test_size=100)
    assert time.process_time() - began < 5  # measured: 0.3 s
    with dnaio.open(real_fasta) as reference:
        expected = {record.id: record.sequence.upper() for record in reference}
    found = {}
    for name in ("train", "valid", "test"):
        store = TokenStore(tmp_path / "out" / name)
        store.verify()
        found.update({store.id(i): vocabulary.decode(store.residues(i)) for i in range(len(store))})
        counts = np.bincount(store.tokens, minlength=33)
        assert json.loads((store.path / "manifest.json").read_text())["token_counts"] == counts.tolist()
    assert found == expected and len(found) == 8000


def test_what_a_kill_at_the_very_end_has_left_is_removed(tmp_path: Path) -> None:
    """By the next start, which finds the output; not while another `prepare` still holds the directory."""
    out, left = tmp_path / "store", tmp_path / ".store.prepare.partial"
    out.mkdir()
    (left / "parts").mkdir(parents=True)
    with filelock.FileLock(left / "lock"), pytest.raises(UserError, match="exists already"):
        check_new(out)
    assert (left / "parts").is_dir()
    with pytest.raises(UserError, match="exists already"):
        check_new(out)
    assert out.is_dir() and not left.exists()
