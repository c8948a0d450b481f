"""Streams and compressed tables are taken wherever the file would be, or refused for what they are."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from esm2mega.cli.app import main
from esm2mega.data.store.token_store import TokenStore
from esm2mega.finetune.api import train_model
from tests.pipes import standard_input
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PROTEINS = {"a": "MKTAYIAK", "b": "LLVWGGS", "c": "MKV"}
FASTA = "".join(f">{name}\n{residues}\n" for name, residues in PROTEINS.items())
ROWS = [{"id": name, "sequence": s, "y": float(len(s))} for name, s in PROTEINS.items()]
TASK = ("task.kind=regression", "task.target_columns=[y]")
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}


def table(kind: str, columns: list[str]) -> bytes:
    rows = [[str(row[name]) for name in columns] for row in ROWS]
    if kind == "jsonl":
        return "".join(json.dumps({name: row[name] for name in columns}) + "\n" for row in ROWS).encode()
    delimiter = "\t" if kind == "tsv" else ","
    return "".join(delimiter.join(cells) + "\n" for cells in [columns, *rows]).encode()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regression after one step."""
    run_dir = tmp_path_factory.mktemp("tuned")
    settings = [*SETTINGS, f"run_dir={run_dir}", "train.max_steps=1", *TASK]
    train_model(settings, train=[(row["sequence"], row["y"]) for row in ROWS])
    return run_dir


def test_embed_and_predict_take_standard_input(
    finished: TinyRun, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output is that of the file, byte by byte of what does not name it."""
    fasta = tmp_path / "x.fasta"
    fasta.write_text(FASTA)
    for command, checkpoint, ending in (("embed", finished.run_dir, ".h5"), ("predict", tuned, ".csv")):
        outputs = [tmp_path / f"{command}_{name}{ending}" for name in ("file", "stream")]
        assert main([command, str(checkpoint), str(fasta), "--out", str(outputs[0])]) == 0
        with standard_input(gzip.compress(FASTA.encode())):
            assert main([command, str(checkpoint), "-", "--out", str(outputs[1])]) == 0
        shown = capsys.readouterr()
        assert "esm2mega-" not in shown.out + shown.err, "a temporary file is no name for the user"
        assert "input: - is prepared, once" in shown.err
        if ending == ".csv":
            assert outputs[0].read_bytes() == outputs[1].read_bytes()
            continue
        with h5py.File(outputs[0]) as ours, h5py.File(outputs[1]) as theirs:
            for name in ("ids", "residue/layer_2", "pooled/layer_2"):
                assert (ours[name][()] == theirs[name][()]).all()


def test_prepare_takes_a_stream_beside_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.fasta").write_text(">z\nMM\n")
    with standard_input(table("csv", ["sequence"])):
        arguments = [
            "prepare",
            "fasta",
            str(tmp_path / "x.fasta"),
            "/dev/stdin",
            "--out",
            str(tmp_path / "s"),
        ]
        assert main([*arguments, "--workers", "1"]) == 0
    assert "/dev/stdin: has no 'id', so the ids are line numbers" in capsys.readouterr().out
    store = TokenStore(tmp_path / "s" / "train")
    assert [store.id(row) for row in range(len(store))] == ["z", "2", "3", "4"]
    assert [source["name"] for source in store.manifest["sources"]] == ["x.fasta", "stdin.csv"]


def test_a_bad_line_of_a_stream_is_named(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = b">a\nMK\n>b\nM!\n"
    for arguments in (
        ["embed", str(finished.run_dir), "-", "--out", str(tmp_path / "x.h5")],
        ["prepare", "fasta", "-", "--out", str(tmp_path / "s"), "--workers", "1"],
    ):
        with standard_input(bad):
            assert main(arguments) == 2
        assert "error: -:4: '!' in the sequence of 'b' is no residue" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_no_stream_can_be_read_it_is_refused_for_what_it_is(
    finished: TinyRun, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    others = []
    for name in ("uf90", "mapping"):
        (tmp_path / name).write_text(FASTA)
        others += [f"--{name}", str(tmp_path / name)]
    out = str(tmp_path / "out.csv")
    task = [*TASK, "train.eval_every=0"]
    run = [*SETTINGS, f"run_dir={tmp_path / 'run'}"]
    score = ["score", str(finished.run_dir), "--out", out]
    for stream in ("-", pipe):
        for arguments in (
            ["pretrain", *run, f"data.train='{stream}'", "train.eval_every=0"],
            ["finetune", *run, *task, f"data.train='{stream}'"],
            ["evaluate", str(finished.run_dir), "--data", stream],
            ["evaluate", str(tuned), "--data", stream],
            ["compare", str(finished.run_dir), str(finished.run_dir), "--data", stream],
            ["compare", str(tuned), str(tuned), "--data", stream],
            [*score, "--fasta", stream],
            [*score, "--sequence", "MK", "--variants", stream],
            ["prepare", "uniref", "--uf50", stream, *others, "--out", out],
            ["prepare", "deeploc2", "--source", stream, "--out", out],
            ["prepare", "contacts", "--source", stream, "--out", out],
            ["inspect", "--leakage", str(tmp_path / "uf90"), stream],
        ):
            assert main(arguments) == 2, arguments
            error = capsys.readouterr().err
            assert "is a stream, and this input is read more than once" in error, (arguments, error)
            assert stream in error


@pytest.mark.some(2)
@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_compressed_tables_are_read_as_the_plain_ones(
    kind: str, ending: str, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Input of `predict`, data of `evaluate` and `prepare`."""
    results = []
    for packing in ("", ending):
        path = tmp_path / f"t.{kind}{packing}"
        path.write_bytes(PACK[packing](table(kind, ["id", "sequence", "y"])))
        out, store = tmp_path / f"out{packing}.csv", tmp_path / f"store{packing}"
        assert main(["predict", str(tuned), str(path), "--out", str(out)]) == 0
        capsys.readouterr()
        assert main(["evaluate", str(tuned), "--data", str(path)]) == 0
        loss = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss: "))
        assert main(["prepare", "fasta", str(path), "--out", str(store), "--workers", "1"]) == 0
        results.append((out.read_text(), loss, TokenStore(store / "train").fingerprint))
    assert results[0] == results[1]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_tables_of_training_and_of_variants(
    ending: str, finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With labels beside the sequences, and in a file of their own."""
    for name, content in {
        "t.csv": table("csv", ["id", "sequence", "y"]),
        "s.tsv": table("tsv", ["id", "sequence"]),
        "y.jsonl": table("jsonl", ["id", "y"]),
        "v.csv": b"mutant\nM1A\nK2W\n",
    }.items():
        (tmp_path / f"{name}{ending}").write_bytes(PACK[ending](content))
        (tmp_path / name).write_bytes(content)
    task = [*TASK, "train.eval_every=0", "train.max_steps=1"]
    for number, data in enumerate(
        (
            [f"data.train={tmp_path / 't.csv'}{ending}"],
            [f"data.train={tmp_path / 's.tsv'}{ending}", f"task.label_file={tmp_path / 'y.jsonl'}{ending}"],
        )
    ):
        assert main(["finetune", *SETTINGS, *task, *data, f"run_dir={tmp_path / str(number)}"]) == 0
    losses = [
        json.loads((tmp_path / str(number) / "log.jsonl").read_text().splitlines()[0])["loss"]
        for number in range(2)
    ]
    assert losses[0] == losses[1]
    scores = []
    for packing in ("", ending):
        out = tmp_path / f"scores{packing}.csv"
        arguments = ["score", str(finished.run_dir), "--sequence", "MKTAY", "--out", str(out)]
        assert main([*arguments, "--variants", str(tmp_path / f"v.csv{packing}")]) == 0
        with out.open() as file:
            scores.append(list(csv.DictReader(file)))
    assert scores[0] == scores[1] and [row["mutant"] for row in scores[0]] == ["M1A", "K2W"]
    # Cut short, it is no shorter table.
    (tmp_path / f"v.csv{ending}").write_bytes(PACK[ending](b"mutant\nM1A\nK2W\n")[:-6])
    assert main([*arguments, "--overwrite", "--variants", str(tmp_path / f"v.csv{ending}")]) == 2
    assert "data ends early (truncated file)" in capsys.readouterr().err
