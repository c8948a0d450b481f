"""`embed` in one process: values, order, lengths, formats, resuming, refusals."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.errors import UserError
from esm2mega.infer.embed import EmbedRequest, embed
from esm2mega.infer.hdf5_checksums import verify
from esm2mega.infer.windows import overlapping
from tests.infer_models import (
    MAX_SEQ_LENGTH,
    Reference,
    ids_of,
    in_double,
    random_proteins,
    write_fasta,
)

LAYERS = 4
# Relative to the largest value; as in tests/parity: fp32 sums over up to 128 keys and 104 channels.
BOUND = 1e-5

PROTEINS = [
    (f"p{number % 7}", sequence)
    for number, sequence in enumerate(random_proteins([1, 60, 17, 126, 2, 33, 90, 41, 5]))
]
"""Ids repeat; the longest fills the window of 128 tokens."""


def run(reference: Reference, fasta: Path, out: Path, *overrides: str, **request: Any) -> list[str]:
    return embed(
        EmbedRequest(str(reference.checkpoint), str(fasta), str(out), overrides=overrides, **request)
    )


def close(actual: Any, expected: Any) -> bool:
    actual, expected = np.asarray(actual), np.asarray(expected)
    return (
        actual.shape == expected.shape and np.abs(actual - expected).max() <= BOUND * np.abs(expected).max()
    )


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fasta(tmp_path_factory.mktemp("fasta") / "proteins.fasta", PROTEINS)


@pytest.fixture(scope="module")
def everything(reference: Reference, fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("everything") / "all.h5"
    # Packs of 128 tokens: most proteins have other neighbours than in the input.
    run(
        reference,
        fasta,
        out,
        "infer.outputs=[residue,pooled,logits,contacts]",
        "infer.layers=[0,2,-1]",
        "infer.micro_batch_tokens=128",
    )
    return out


def test_ragged_file_holds_every_value_in_input_order(reference: Reference, everything: Path) -> None:
    with h5py.File(everything) as file:
        assert file["ids"].asstr()[:].tolist() == [name for name, _ in PROTEINS]
        assert file["lengths"][:].tolist() == [len(sequence) for _, sequence in PROTEINS]
        assert not file["truncated"][:].any() and (file["num_windows"][:] == 1).all()
        for number, (_, sequence) in enumerate(PROTEINS):
            theirs = reference.run(sequence)
            rows = slice(*file["offsets"][number : number + 2])
            for layer in (0, 2, LAYERS):
                states = theirs.hidden_states[layer][0, 1:-1]
                assert close(file[f"residue/layer_{layer}"][rows], states)
                assert close(file[f"pooled/layer_{layer}"][number], states.mean(0))
            assert close(file["logits"][rows], theirs.logits[0, 1:-1])
            maps = file["contacts"][slice(*file["contact_offsets"][number : number + 2])]
            assert close(maps.reshape(len(sequence), len(sequence)), reference.contacts(sequence))
        assert file.attrs["max_seq_length"] == MAX_SEQ_LENGTH
        assert len(file.attrs["model_hash"]) == len(file.attrs["tokenizer_hash"]) == 64


def test_attributes_name_the_weights_as_inspect_does(reference: Reference, everything: Path) -> None:
    from esm2mega.checkpoint.tensors import TensorReader
    from esm2mega.convert.checksum import weights_sha256

    assert "lm_head.dense.weight" in TensorReader(reference.checkpoint).index
    with h5py.File(everything) as file:
        assert file.attrs["model_hash"] == weights_sha256(reference.checkpoint)


@pytest.mark.parametrize("pooling", ["cls", "max"])
def test_pooling(reference: Reference, fasta: Path, tmp_path: Path, pooling: str) -> None:
    run(reference, fasta, tmp_path / "x.h5", "infer.outputs=[pooled]", f"infer.pooling={pooling}")
    with h5py.File(tmp_path / "x.h5") as file:
        assert "residue" not in file
        for number, (_, sequence) in enumerate(PROTEINS):
            states = reference.run(sequence).hidden_states[-1][0]
            expected = states[0] if pooling == "cls" else states[1:-1].amax(0)
            assert close(file[f"pooled/layer_{LAYERS}"][number], expected)


def rows_of(everything: Path, name: str, number: int) -> Any:
    with h5py.File(everything) as file:
        if name.startswith("pooled"):
            return file[name][number]
        offsets = file["contact_offsets" if name == "contacts" else "offsets"]
        return file[name][slice(*offsets[number : number + 2])]


NAMES = [f"{kind}/layer_{layer}" for kind in ("residue", "pooled") for layer in (0, 2, LAYERS)] + [
    "logits",
    "contacts",
]
ALL = ("infer.outputs=[residue,pooled,logits,contacts]", "infer.layers=[0,2,-1]")


def test_npz_and_parquet_and_pt_hold_the_same_bits(
    reference: Reference, fasta: Path, everything: Path, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("x.npz", "x.parquet", "x"):
        # Another pack size: the bits of a protein must not depend on it.
        run(reference, fasta, tmp_path / name, *ALL, "infer.micro_batch_tokens=4096")
    table = parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["id"] for row in table] == [name for name, _ in PROTEINS]
    with np.load(tmp_path / "x.npz") as archive, (tmp_path / "x" / "index.csv").open() as index:
        files = [line.split(",")[2] for line in index.read().splitlines()[1:]]
        assert archive["ids"].tolist() == [name for name, _ in PROTEINS]
        assert len(set(files)) == len(PROTEINS) and files[3] == "p3.pt"
        for number, (protein, _) in enumerate(PROTEINS):
            entry = torch.load(tmp_path / "x" / files[number], weights_only=True)
            assert entry["label"] == protein
            for name in NAMES:
                expected = rows_of(everything, name, number)
                offsets = archive["contact_offsets" if name == "contacts" else "offsets"]
                rows = number if name.startswith("pooled") else slice(*offsets[number : number + 2])
                assert np.array_equal(archive[name][rows], expected)
                cell = np.array(table[number][name.replace("/", "_")], dtype=np.float32)
                assert np.array_equal(cell, expected)
                kind, _, layer = name.partition("/layer_")
                key = {"residue": "representations", "pooled": "mean_representations"}.get(kind, kind)
                value = entry[key][int(layer)] if layer else entry[key]
                assert np.array_equal(value.reshape(expected.shape), expected)


@pytest.mark.parametrize("compression", ["none", "gzip", "lzf"])
def test_bionemo_layout(
    reference: Reference, fasta: Path, everything: Path, tmp_path: Path, compression: str
) -> None:
    run(reference, fasta, tmp_path / "x.h5", "infer.layout=bionemo", f"infer.compression={compression}")
    with (
        h5py.File(tmp_path / "x_hiddens.h5") as hiddens,
        h5py.File(tmp_path / "x_embeddings.h5") as embeddings,
    ):
        assert len(hiddens) == len(embeddings) == len(PROTEINS)
        for number, (protein, _) in enumerate(PROTEINS):
            for file in (hiddens, embeddings):
                assert file[str(number)].attrs["original_id"] == protein
                assert file[str(number)].compression == (None if compression == "none" else compression)
            assert np.array_equal(
                hiddens[str(number)], rows_of(everything, f"residue/layer_{LAYERS}", number)
            )
            assert np.array_equal(
                embeddings[str(number)], rows_of(everything, f"pooled/layer_{LAYERS}", number)
            )
    assert verify(tmp_path / "x_hiddens.h5") and verify(tmp_path / "x_embeddings.h5")


@pytest.mark.parametrize("out", ["x.h5", "x.npz", "x"])
def test_other_layouts_are_not_compressed(
    reference: Reference, fasta: Path, tmp_path: Path, out: str
) -> None:
    with pytest.raises(UserError, match=rf"--compression gzip is for --layout bionemo, .*{out} has another"):
        run(reference, fasta, tmp_path / out, "infer.compression=gzip")


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_storage_rounds_once(
    reference: Reference, fasta: Path, everything: Path, tmp_path: Path, dtype: str, torch_dtype: torch.dtype
) -> None:
    run(reference, fasta, tmp_path / "x.h5", f"infer.dtype={dtype}")
    with h5py.File(tmp_path / "x.h5") as file, h5py.File(everything) as full:
        name = f"residue/layer_{LAYERS}"
        stored = torch.from_numpy(file[name][:])
        stored = stored.view(torch.bfloat16) if dtype == "bf16" else stored
        assert torch.equal(stored, torch.from_numpy(full[name][:]).to(torch_dtype))


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.05), ("fp16", 0.05 / 8)])
def test_half_compute_is_near(
    reference: Reference, fasta: Path, everything: Path, tmp_path: Path, precision: str, bound: float
) -> None:
    report = run(reference, fasta, tmp_path / "x.h5", f"infer.precision={precision}")
    how = f"computed in {precision} on cpu, attention (native|sdpa); the checkpoint is in fp32"
    assert re.fullmatch(how, report[-1])
    with h5py.File(tmp_path / "x.h5") as file, h5py.File(everything) as full:
        name = f"residue/layer_{LAYERS}"
        actual, expected = file[name][:], full[name][:]
        # bf16 keeps 8 bits, fp16 11; this random model is steeper than a trained one.
        assert 0 < np.abs(actual - expected).mean() < bound * np.abs(expected).mean()
        assert file.attrs["precision"] == precision


def test_fp64_is_stored_as_it_is_computed(reference: Reference, fasta: Path, tmp_path: Path) -> None:
    overrides = ("infer.precision=fp64", "infer.dtype=fp64", "infer.outputs=[residue,pooled,logits]")
    run(reference, fasta, tmp_path / "x.h5", *overrides)
    with h5py.File(tmp_path / "x.h5") as file, in_double(reference) as exact:
        names = {"residue": f"residue/layer_{LAYERS}", "pooled": f"pooled/layer_{LAYERS}", "logits": "logits"}
        assert {file[name].dtype for name in names.values()} == {np.dtype("float64")}
        for number, (_, sequence) in enumerate(PROTEINS):
            theirs, rows = exact.run(sequence), slice(*file["offsets"][number : number + 2])
            states = theirs.hidden_states[-1][0, 1:-1]
            for name, where, expected in (
                ("residue", rows, states),
                ("pooled", number, states.mean(0)),
                ("logits", rows, theirs.logits[0, 1:-1]),
            ):
                difference = np.abs(file[names[name]][where] - expected.numpy()).max()
                # Sums of up to 416 products in fp64, whose order differs.
                assert difference <= 1e-12 * expected.abs().max()


LONG = random_proteins([300], seed=8)[0]


@pytest.fixture
def long_fasta(tmp_path: Path) -> Path:
    return write_fasta(
        tmp_path / "long.fasta", [("a", PROTEINS[1][1]), ("long", LONG), ("b", PROTEINS[3][1])]
    )


def test_long_proteins_are_an_error_that_names_one(
    reference: Reference, long_fasta: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"'long' \(number 2\) has 300 residues, more than the 126 .* --too-long crop"
    ):
        run(reference, long_fasta, tmp_path / "x.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.fasta"]


def test_cropped_proteins_are_as_if_cut_and_marked(
    reference: Reference, long_fasta: Path, tmp_path: Path
) -> None:
    report = run(reference, long_fasta, tmp_path / "x.h5", "infer.too_long=crop")
    assert "1 proteins were cropped by 174 residues" in report[1]
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["truncated"][:].tolist() == [False, True, False]
        assert (file["lengths"][1], file["original_lengths"][1]) == (126, 300)
        expected = reference.run(LONG[:126]).hidden_states[-1][0, 1:-1]
        assert close(file[f"residue/layer_{LAYERS}"][slice(*file["offsets"][1:3])], expected)


def test_chunked_proteins_are_means_over_windows(
    reference: Reference, long_fasta: Path, tmp_path: Path
) -> None:
    outputs = "infer.outputs=[residue,pooled,logits,contacts]"
    run(reference, long_fasta, tmp_path / "x.h5", "infer.too_long=chunk", "infer.overlap=50", outputs)
    ids = ids_of(LONG)
    total, logits, count = torch.zeros(302, 48), torch.zeros(302, 33), torch.zeros(302, 1)
    windows = overlapping(300, MAX_SEQ_LENGTH, 50)
    for window in windows:
        span = slice(window.start, window.stop)
        theirs = reference.run_ids(ids[:, span])
        total[span] += theirs.hidden_states[-1][0]
        logits[span] += theirs.logits[0]
        count[span] += 1
    expected = (total / count)[1:-1]
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["num_windows"][:].tolist() == [1, len(windows), 1] and len(windows) == 4
        rows = slice(*file["offsets"][1:3])
        assert close(file[f"residue/layer_{LAYERS}"][rows], expected)
        assert close(file[f"pooled/layer_{LAYERS}"][1], expected.mean(0))
        assert close(file["logits"][rows], (logits / count)[1:-1])
        maps = file["contacts"][slice(*file["contact_offsets"][1:3])].reshape(300, 300)
        far = np.abs(np.subtract.outer(np.arange(300), np.arange(300))) >= MAX_SEQ_LENGTH
        assert np.isnan(maps[far]).all() and not np.isnan(np.diag(maps)).any()


def test_resume_goes_on_and_gives_the_same_bits(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proteins = [(f"p{i}", s) for i, s in enumerate(random_proteins([100] * 130, seed=4))]
    fasta = write_fasta(tmp_path / "many.fasta", proteins)
    run(reference, fasta, tmp_path / "whole.h5")

    class Stop(Exception):
        pass

    from esm2mega.infer import job as module

    compute = module._compute

    def stops(job: Any, work: Any, ranks: Any, pieces: Any) -> None:
        assert len(pieces) == 4
        compute(job, work, ranks, pieces[:2])
        raise Stop

    monkeypatch.setattr(module, "_compute", stops)
    with pytest.raises(Stop):
        run(reference, fasta, tmp_path / "x.h5")
    seen: list[int] = []

    def goes_on(job: Any, work: Any, ranks: Any, pieces: Any) -> None:
        seen.extend(pieces)
        compute(job, work, ranks, pieces)

    monkeypatch.setattr(module, "_compute", goes_on)
    with pytest.raises(UserError, match="unfinished output of an earlier start"):
        run(reference, fasta, tmp_path / "x.h5")
    with pytest.raises(UserError, match=r"other settings: dtype was 'fp32' and is 'fp16'"):
        run(reference, fasta, tmp_path / "x.h5", "infer.dtype=fp16", mode="resume")
    run(reference, fasta, tmp_path / "x.h5", mode="resume")
    assert seen == [2, 3]
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not (tmp_path / "x.h5.partial").exists()


@pytest.mark.parametrize("name", ["x.h5", "x.npz"])
def test_a_kill_behind_the_last_step_leaves_an_output(
    reference: Reference, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The output has its name, but what it was made of is still there."""
    out = tmp_path / name

    class Stop(Exception):
        pass

    def stops(path: Path) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(
            "esm2mega.infer.work.shutil", SimpleNamespace(rmtree=stops, disk_usage=shutil.disk_usage)
        )
        with pytest.raises(Stop):
            run(reference, fasta, out)
    before = out.read_bytes()
    run(reference, fasta, out, mode="resume")
    assert out.read_bytes() == before and sorted(tmp_path.iterdir()) == [out]


def test_a_model_that_is_refused_leaves_nothing_but_earlier_work(
    reference: Reference, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal when the model is loaded, as that of a drift in int8, has computed nothing to resume."""

    def refused(*_: Any) -> None:
        raise UserError("the drift is too large")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out.h5"
    with monkeypatch.context() as patched, pytest.raises(UserError, match="drift"):
        patched.setattr("esm2mega.infer.embed.EmbedJob.load", refused)
        run(reference, fasta, out)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("esm2mega.infer.job._compute", interrupted)
        run(reference, fasta, out)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="drift"):
        patched.setattr("esm2mega.infer.embed.EmbedJob.load", refused)
        run(reference, fasta, out, mode="resume")
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5.partial"]
    run(reference, fasta, out, mode="resume")
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


def test_existing_output_needs_a_word(reference: Reference, fasta: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    run(reference, fasta, out, "infer.outputs=[pooled]")
    before = out.read_bytes()
    with pytest.raises(UserError, match="exists; replace it with --overwrite"):
        run(reference, fasta, out)
    assert run(reference, fasta, out, "infer.outputs=[pooled]", mode="resume") == [f"{out} is complete"]
    with pytest.raises(UserError, match="is of other settings: outputs was"):
        run(reference, fasta, out, mode="resume")
    assert out.read_bytes() == before
    run(reference, fasta, out, mode="overwrite")
    with np.load(out) as archive:
        assert f"residue/layer_{LAYERS}" in archive


def test_only_folders_of_embeddings_are_replaced(reference: Reference, fasta: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for mode in ("new", "overwrite", "resume"):
        with pytest.raises(UserError, match="mine: is a folder that `embed` did not write"):
            run(reference, fasta, out, mode=mode)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.tex"]
    for name in (".", "..", "/"):
        with pytest.raises(UserError, match="is no name of a file or folder to make"):
            embed(EmbedRequest(str(reference.checkpoint), str(fasta), name, "overwrite"))
    for mode in ("new", "overwrite"):
        run(reference, fasta, tmp_path / "ours", mode=mode)


def test_every_protein_has_a_file_of_its_own(reference: Reference, tmp_path: Path) -> None:
    ids = ["a", "a", "a.0", "a~1", "A", "a/1", "a_1.5", "蛋" * 100, "蛋" * 100]
    rows = "".join(f"{name},{'M' * (i + 1)}\n" for i, name in enumerate(ids))
    (tmp_path / "t.csv").write_text("id,sequence\n" + rows)
    run(reference, tmp_path / "t.csv", tmp_path / "x")
    files = [line.split(",")[2] for line in (tmp_path / "x" / "index.csv").read_text().splitlines()[1:]]
    assert len({file.lower() for file in files}) == len(ids) and files[2] == "a.0.pt"
    for number, file in enumerate(files):
        entry = torch.load(tmp_path / "x" / file, weights_only=True)
        assert entry["label"] == ids[number] and len(entry["representations"][LAYERS]) == number + 1


def test_bad_input_is_one_line(reference: Reference, fasta: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.fasta"
    empty.write_text(">a\nMKT\n>b\n>c\nMK\n")
    with pytest.raises(UserError, match=r"empty.fasta:3: no sequence under the header of 'b'"):
        run(reference, empty, tmp_path / "x.h5")
    with pytest.raises(UserError, match=r"x.h5: cannot be written"):
        run(reference, fasta, fasta / "x.h5")
    with pytest.raises(UserError, match="unknown ending '.pkl'"):
        run(reference, fasta, tmp_path / "x.pkl")
    with pytest.raises(UserError, match="hidden states 0 to 4"):
        run(reference, fasta, tmp_path / "x.h5", "infer.layers=[7]")
    with pytest.raises(UserError, match="did you mean residue"):
        run(reference, fasta, tmp_path / "x.h5", "infer.outputs=[residues]")
    with pytest.raises(UserError, match=r"--contact-maps .*/maps: cannot be written: Not a directory"):
        run(reference, fasta, tmp_path / "x.h5", contact_maps=str(fasta / "maps"))
    with pytest.raises(UserError, match="absent.fasta: there is no such file"):
        run(reference, tmp_path / "absent.fasta", tmp_path / "x.h5")
    assert list(tmp_path.iterdir()) == [empty]


def test_odd_letters_and_line_ends_are_counted_and_kept(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.fasta.gz"
    with gzip.open(path, "wb") as stream:
        stream.write(b">a one\r\nmkT\r\nAY*-J\r>b\nMKTAY\n>b\r\nMKTAY".replace(b"\r>", b"\r\n>"))
    run(reference, path, tmp_path / "x.h5")
    assert "2 lower-case residues raised, 2 unknown residues stored as <unk>" in capsys.readouterr().err
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["ids"].asstr()[:].tolist() == ["a", "b", "b"]
        expected = reference.run("MKTAY*-J").hidden_states[-1][0, 1:-1]
        assert close(file[f"residue/layer_{LAYERS}"][:8], expected)


def test_tables_and_stores_are_inputs_too(
    reference: Reference, fasta: Path, everything: Path, tmp_path: Path
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("name,residues\n" + "".join(f"{name},{sequence}\n" for name, sequence in PROTEINS))
    columns = ("data.sequence_column=residues", "data.id_column=name")
    packed = tmp_path / "t.csv.gz"
    packed.write_bytes(gzip.compress(table.read_bytes()))
    # `import pyarrow` alone brings no pyarrow.parquet.
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"name": [name for name, _ in PROTEINS], "residues": [sequence for _, sequence in PROTEINS]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    prepare_fasta([str(fasta)], str(tmp_path / "store"))
    for path in (table, packed, tmp_path / "t.parquet", tmp_path / "store" / "train"):
        out = tmp_path / f"{path.name}.h5"
        run(reference, path, out, *columns)
        with h5py.File(out) as file, h5py.File(everything) as full:
            assert file["ids"][:].tolist() == full["ids"][:].tolist()
            assert np.array_equal(file[f"residue/layer_{LAYERS}"], full[f"residue/layer_{LAYERS}"])


def test_a_protein_of_20_000_residues(reference: Reference, tmp_path: Path) -> None:
    giant = random_proteins([20_000], seed=9)[0]
    fasta = write_fasta(tmp_path / "giant.fasta", [("titin", giant), ("small", "MKT")])
    with pytest.raises(UserError, match=r"'titin' \(number 1\) has 20,000 residues"):
        run(reference, fasta, tmp_path / "x.h5")
    report = run(reference, fasta, tmp_path / "x.h5", "infer.too_long=chunk", "infer.max_seq_length=1024")
    assert "1 proteins are means over overlapping windows" in report[1]
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["lengths"][:].tolist() == [20_000, 3] and file["num_windows"][0] == 39
        # The first residues are in one window, which is the first 1,024 tokens.
        states = reference.run_ids(ids_of(giant)[:, :1024]).hidden_states[-1][0]
        assert close(file[f"residue/layer_{LAYERS}"][:500], states[1:501])
        assert np.isfinite(file[f"residue/layer_{LAYERS}"][()]).all()


FLIP = Path(__file__).parents[4] / "shared" / "data" / "flip" / "secondary_structure" / "sequences.fasta"


@pytest.mark.skipif(not FLIP.is_file(), reason="the files of FLIP are not here")
def test_proteins_of_flip_keep_their_names(reference: Reference, tmp_path: Path) -> None:
    """The first of them, with the shipped configuration; ids are what stands before the first space."""
    lines = FLIP.read_text().splitlines()[:40]
    (tmp_path / "sequences.fasta").write_text("\n".join(lines) + "\n")
    run(reference, tmp_path / "sequences.fasta", tmp_path / "x.h5", config="infer")
    headers = [line[1:].split()[0] for line in lines if line.startswith(">")]
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["ids"].asstr()[:].tolist() == headers
        assert file["offsets"][-1] == sum(len(line) for line in lines if not line.startswith(">"))


def test_contact_maps_are_drawn(reference: Reference, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "few.fasta", PROTEINS[:3])
    run(reference, fasta, tmp_path / "x.h5", "infer.outputs=[pooled]", contact_maps=str(tmp_path / "maps"))
    drawn = sorted((tmp_path / "maps").iterdir())
    assert [path.name for path in drawn][:2] == ["000000.p0.png", "000001.p1.png"]
    assert len(drawn) == 3 and all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn)


def test_the_shipped_configuration_is_used(reference: Reference, long_fasta: Path, tmp_path: Path) -> None:
    run(reference, long_fasta, tmp_path / "x.h5", config="infer")
    with h5py.File(tmp_path / "x.h5") as file:
        assert file[f"residue/layer_{LAYERS}"].dtype == np.float16
        assert json.loads(file.attrs["esm2mega"])["too_long"] == "chunk"
