"""A flipped bit in an HDF5 output, or in what a resumed job goes on with, never becomes another number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.infer import job as module
from esm2mega.infer.embed import EmbedRequest, embed
from esm2mega.infer.hdf5_checksums import dataset_sha256, verify
from tests.infer_models import Reference, random_proteins, write_fasta

FLIPS = 40


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def content_of(path: Path) -> dict[str, Any]:
    """All numbers, texts and attributes as h5py reads them."""
    found: dict[str, Any] = {}
    with h5py.File(path) as file:

        def note(name: str, item: Any) -> None:
            found[name] = {key: repr(value) for key, value in item.attrs.items()}
            if isinstance(item, h5py.Dataset):
                found[f"{name} values"] = (item.dtype, item.shape, item[()].tolist())

        note("", file)
        file.visititems(note)
    return found


def run(reference: Reference, fasta: Path, out: Path, *overrides: str, mode: Any = "new") -> list[str]:
    return embed(EmbedRequest(str(reference.checkpoint), str(fasta), str(out), mode, overrides))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    proteins = [(f"p{i}", s) for i, s in enumerate(random_proteins([100] * 90, seed=2))]
    return write_fasta(tmp_path_factory.mktemp("fasta") / "x.fasta", proteins)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return write_fasta(folder / "x.fasta", [("a", "MKT"), ("a", "MKTAYI"), ("b", "M")])


@pytest.mark.parametrize("layout", ["ragged", "bionemo"])
def test_a_finished_file(reference: Reference, small: Path, tmp_path: Path, layout: str) -> None:
    """The structure of the file is larger than the data, so most flips hit it."""
    out = tmp_path / "x.h5"
    run(reference, small, out, f"infer.layout={layout}", "infer.outputs=[pooled]")
    path = out if layout == "ragged" else tmp_path / "x_embeddings.h5"
    whole, before = path.read_bytes(), content_of(path)
    assert verify(path)
    rng = np.random.default_rng(5)
    noticed = 0
    for place, bit in zip(rng.integers(len(whole), size=FLIPS), rng.integers(8, size=FLIPS), strict=True):
        path.write_bytes(whole)
        flip(path, int(place), int(bit))
        try:
            verify(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: is damaged: ") and "\n" not in str(error)
            noticed += 1
        else:
            assert content_of(path) == before, (place, bit)
    assert noticed > FLIPS // 8


def test_every_number_and_text_is_covered(reference: Reference, small: Path, tmp_path: Path) -> None:
    """Changed by HDF5's own means, and named; the commands that read the file say so in one line."""
    out = tmp_path / "x.h5"
    run(reference, small, out)
    whole = out.read_bytes()

    def number(file: Any) -> None:
        file["residue/layer_4"][3, 2] += 1e-6

    def text(file: Any) -> None:
        file["ids"][1] = "c"

    def length(file: Any) -> None:
        file["lengths"][0] = 4

    def attribute(file: Any) -> None:
        file.attrs["pooling"] = "max"

    def name(file: Any) -> None:
        file.move("pooled/layer_4", "pooled/layer_3")

    changes: dict[str, Callable[[Any], None]] = {
        "residue/layer_4 differs": number,
        "ids differs": text,
        "lengths differs": length,
        "its attributes or the names of its data sets differ": attribute,
        "its attributes or the names": name,
    }
    for said, change in changes.items():
        out.write_bytes(whole)
        with h5py.File(out, "r+") as file:
            change(file)
        with pytest.raises(UserError, match=f"x.h5: is damaged: {said}.*; make it again with --overwrite"):
            verify(out)
        assert main(["inspect", str(out)]) == 2
    out.write_bytes(whole)
    with h5py.File(out, "r+") as file:
        number(file)
    with pytest.raises(UserError, match="residue/layer_4 differs"):
        run(reference, small, out, mode="resume")


def test_inspect_and_outputs_without_checksums(
    reference: Reference, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.h5"
    run(reference, small, out)
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "(checksums hold)" in said and "residue/layer_4" in said and "float32 [10, 48]" in said
    with h5py.File(out, "r+") as file:
        assert file["ids"].attrs["sha256"].decode() == dataset_sha256(file["ids"])
        file.visititems(lambda _, item: item.attrs.pop("sha256", None) and None)
        del file.attrs["sha256"]
    assert main(["inspect", str(out)]) == 0
    assert "without checksums" in capsys.readouterr().out
    assert run(reference, small, out, mode="resume") == [f"{out} is complete"]
    out.write_bytes(b"no HDF5 at all")
    assert main(["inspect", str(out)]) == 2
    assert "x.h5: is damaged: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def begun(reference: Reference, fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of which two of three pieces are done, and finished ones."""
    folder = tmp_path_factory.mktemp("begun")
    compute = module._compute

    class Stop(Exception):
        pass

    def stops(job: Any, work: Any, ranks: Any, pieces: Any) -> None:
        assert len(pieces) == 3
        compute(job, work, ranks, pieces[:2])
        raise Stop

    for name in ("x.h5", "x.npz"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_compute", stops)
            with pytest.raises(Stop):
                run(reference, fasta, folder / name, "infer.outputs=[pooled]")
        run(reference, fasta, folder / "whole" / name, "infer.outputs=[pooled]")
    return {name: folder / name for name in ("x.h5", "x.npz")}


@pytest.mark.some(1)
@pytest.mark.parametrize("name", ["x.npz", "x.h5"])
def test_a_resumed_job(
    reference: Reference, fasta: Path, begun: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Each file of the unfinished output: the end is bit-equal, or there is one line."""
    source = begun[name]
    whole = (source.parent / "whole" / name).read_bytes()
    partial = source.with_name(f"{name}.partial")
    files = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
    rng = np.random.default_rng(7)
    ends = {"equal": 0, "refused": 0}
    own = [path for path in files if len(path.parts) == 1]
    chosen = [*files, *own] if name == "x.h5" else own * 2
    for number, path in enumerate(chosen):
        out = tmp_path / str(number) / name
        shutil.copytree(partial, out.with_name(partial.name))
        target = out.with_name(partial.name) / path
        if not (size := target.stat().st_size):
            continue
        flip(target, int(rng.integers(size)), int(rng.integers(8)))
        try:
            run(reference, fasta, out, "infer.outputs=[pooled]", mode="resume")
        except UserError as error:
            assert "\n" not in str(error) and not out.exists(), path
            ends["refused"] += 1
        else:
            assert out.read_bytes() == whole, path
            ends["equal"] += 1
    assert min(ends.values()) > 1, ends


def test_damaged_pieces_are_computed_again_and_said_so(
    reference: Reference,
    fasta: Path,
    begun: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = begun["x.npz"]
    out = tmp_path / "x.npz"
    partial = out.with_name("x.npz.partial")
    shutil.copytree(source.with_name("x.npz.partial"), partial)
    lines = [line for line in (partial / "done.0").read_text().split("\n") if line]
    first, second = (json.loads(line.rpartition(" ")[0]) for line in lines)
    assert (first[0], second[0]) == (0, 1)
    begin = json.loads((partial / "manifest.json").read_text())["offsets"]["pooled/layer_4"]
    flip(partial / "arrays", begin + 4 * 48 * second[1]["pooled/layer_4"][0][0] + 5, 6)
    (partial / "done.1").write_text(f"\n2\n\n{lines[0][:30]}")  # of an earlier version, and cut short
    seen: list[int] = []
    compute = module._compute

    def notes(job: Any, work: Any, ranks: Any, pieces: Any) -> None:
        seen.extend(pieces)
        compute(job, work, ranks, pieces)

    monkeypatch.setattr(module, "_compute", notes)
    run(reference, fasta, out, "infer.outputs=[pooled]", mode="resume")
    assert seen == [1, 2]
    said = capsys.readouterr().err
    assert (
        f"{partial}: 1 finished pieces no longer have the bytes that were written and 1 lines of done.* are "
        in said
    )
    assert "; these pieces are computed again" in said
    assert out.read_bytes() == (source.parent / "whole" / "x.npz").read_bytes()
