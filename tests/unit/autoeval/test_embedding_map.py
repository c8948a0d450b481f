"""`esm2mega map`: the page, its search and its names; and the bundle, read as ProtSpace reads it."""

from __future__ import annotations

import base64
import csv
import hashlib
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from esm2mega.autoeval.plane import pca
from esm2mega.autoeval.protspace import write_bundle
from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.infer.hdf5_checksums import seal

COUNT, HIDDEN = 40, 6
IDS = ["<b>p0</b>", 'p"1', *(f"p{n}" for n in range(2, COUNT))]
FAMILIES = ["kinase", "a|b;c%", "</title><script>alert(1)</script>"]


@pytest.fixture
def vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(1).normal(size=(COUNT, HIDDEN)).astype(np.float32)
    write(Path("e.h5"), IDS, vectors)
    rows = [f'"{name.replace(chr(34), chr(34) * 2)}","{FAMILIES[n % 3]}",{n}' for n, name in enumerate(IDS)]
    Path("labels.csv").write_text("id,family,size\n" + "\n".join(rows[:-1]) + "\n")
    return vectors


def write(path: Path, ids: Sequence[str], pooled: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("ids", data=list(ids), dtype=h5py.string_dtype())
        file.create_dataset("offsets", data=np.zeros(len(ids) + 1, dtype=np.int64))
        file.create_dataset("pooled/layer_2", data=pooled)
        seal(file)


class Page(HTMLParser):
    """The points of a page with their titles, and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.points: list[dict[str, Any]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "circle":
            self.points.append({**found, "title": ""})
        self._in_title = tag == "title"

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False

    def handle_data(self, data: str) -> None:
        if self._in_title and self.points:
            self.points[-1]["title"] += data


def test_a_page_of_classes(vectors: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "e.h5", "--labels", "labels.csv", "--column", "family", "--out", "m.html"]) == 0
    said = capsys.readouterr().out
    assert "40 proteins of e.h5, layer_2: Principal components" in said
    assert "1 proteins have no row in labels.csv; their label is none" in said
    text = Path("m.html").read_text()
    page = Page(text)
    expected = {f"{name}\n{FAMILIES[n % 3]}" for n, name in enumerate(IDS[:-1])} | {f"{IDS[-1]}\nnone"}
    points = page.points[:COUNT]
    assert {point["title"] for point in points} == expected
    assert len({point["class"] for point in points}) == 4, "a colour for each family, and one for none"
    # The places are the principal components, up to scale and place of each axis.
    order = [IDS.index(point["title"].split("\n")[0]) for point in points]
    plane = pca(vectors)[order]
    for name, values in (("cx", plane[:, 0]), ("cy", plane[:, 1])):
        drawn = np.array([float(point[name]) for point in points])
        assert abs(np.corrcoef(drawn, values)[0, 1]) > 0.9999
    # Nothing is loaded, one script runs, and that is the one of the policy.
    assert not [tag for tag, found in page.tags if {"src", "href", "onload", "onclick"} & found.keys()]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "alert(1)" not in script


def test_a_page_without_labels_and_one_of_numbers(vectors: np.ndarray) -> None:
    assert main(["map", "e.h5", "--out", "m.html", "--layer", "2"]) == 0
    page = Page(Path("m.html").read_text())
    assert {point["title"] for point in page.points[:COUNT]} == set(IDS)
    Path("sizes.csv").write_text("name,size\n" + "".join(f"p{n},{n}\n" for n in range(2, COUNT)))
    write(Path("f.h5"), IDS[2:], vectors[2:])
    options = ["--labels", "sizes.csv", "--id-column", "name", "--out", "n.html"]
    assert main(["map", "f.h5", *options]) == 0
    page = Page(Path("n.html").read_text())
    assert {point["class"] for point in page.points[: COUNT - 2]} == {f"point s{n}" for n in range(5)}


def test_numbers_keep_their_ranges_where_some_are_missing(vectors: np.ndarray) -> None:
    """And the column of the ids can colour as any other."""
    assert main(["map", "e.h5", "--labels", "labels.csv", "--column", "size", "--out", "m.html"]) == 0
    classes = [point["class"] for point in Page(Path("m.html").read_text()).points[:COUNT]]
    assert {*classes} == {*(f"point s{n}" for n in range(5)), "point c6"} and classes.count("point c6") == 1
    assert main(["map", "e.h5", "--labels", "labels.csv", "--column", "id", "--out", "i.html"]) == 0


def test_words_in_a_column_of_numbers_are_said(
    vectors: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of detection, and numbers with decimal commas where they are declared."""
    cells = [f"{number},5" for number in range(len(IDS))]
    cells[1], cells[3] = ">100", "n/a"
    with Path("t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "melting"], *zip(IDS, cells, strict=True)])
    words = ["map", "e.h5", "--labels", "t.csv", "--numbers", "decimal_comma", "--out"]
    assert main([*words, "commas.html"]) == 0
    assert "cells of melting that are not numbers, such as '>100': 2, in grey" in capsys.readouterr().out
    page = Path("commas.html").read_text()
    assert "no number (2)" in page and " to " in page
    assert main([*[word for word in words if "numbers" not in word and "comma" not in word], "p.html"]) == 0
    assert "not numbers" not in capsys.readouterr().out, "all are classes"


def read_bundle(path: Path) -> list[Any]:
    """The three tables, taken apart as ProtSpace does."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    parts = path.read_bytes().split(b"---PARQUET_DELIMITER---")
    return [parquet.read_table(pa.BufferReader(part)) for part in parts]


def test_a_bundle_for_protspace(vectors: np.ndarray) -> None:
    assert main(["map", "e.h5", "--labels", "labels.csv", "--out", "m.parquetbundle"]) == 0
    annotations, projections, points = read_bundle(Path("m.parquetbundle"))
    assert annotations.column_names == ["identifier", "family", "size"]
    assert annotations["identifier"].to_pylist() == IDS
    assert annotations["family"].to_pylist()[1] == "a%7Cb%3Bc%25", "what has a meaning there is written so"
    assert annotations.schema.metadata[b"protspace_format_version"] == b"2"
    assert "PCA_2" in projections["projection_name"].to_pylist()
    rows = [row for row in points.to_pylist() if row["projection_name"] == "PCA_2"]
    assert [row["identifier"] for row in rows] == IDS and {row["z"] for row in rows} == {None}
    np.testing.assert_allclose([[row["x"], row["y"]] for row in rows], pca(vectors))
    with pytest.raises(UserError, match="'p' is there twice"):
        write_bundle(Path("x.parquetbundle"), {"pca": pca(vectors)[:2]}, ["p", "p"], {})
    with pytest.raises(UserError, match="give --id-column identifier if it holds the ids"):
        write_bundle(Path("x.parquetbundle"), {"pca": pca(vectors)[:1]}, ["p"], {"identifier": ["q"]})
    with pytest.raises(UserError, match="which ends a table; rename it"):
        write_bundle(
            Path("x.parquetbundle"), {"pca": pca(vectors)[:1]}, ["p"], {"a": ["---PARQUET_DELIMITER---"]}
        )
    assert not Path("x.parquetbundle").exists()


@pytest.mark.slow
def test_protspace_opens_the_bundle(vectors: np.ndarray) -> None:
    """By the reader of ProtSpace itself."""
    bundle = pytest.importorskip("protspace.data.io.bundle", reason="protspace is not here: `make protspace`")
    reader = pytest.importorskip("protspace.utils.arrow_reader")
    encoding = pytest.importorskip("protspace.data.annotations.encoding")
    assert main(["map", "e.h5", "--labels", "labels.csv", "--out", "m.parquetbundle"]) == 0
    opened = reader.ArrowReader(Path(bundle.extract_bundle_to_dir(Path("m.parquetbundle"))))
    assert opened.get_protein_ids() == IDS and opened.should_decode()
    assert set(opened.get_all_annotations()) == {"family", "size"}
    assert encoding.decode_field(opened.get_protein_annotations(IDS[1])["family"]) == FAMILIES[1]
    found = {each["identifier"]: each["coordinates"] for each in opened.get_projection_data("PCA_2")}
    np.testing.assert_allclose([[found[name]["x"], found[name]["y"]] for name in IDS], pca(vectors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "m.png"], "name it NAME.html for a page, or NAME.parquetbundle for ProtSpace"),
        (["--out", "there.html"], "there.html: exists"),
        (["--out", "m.html", "--column", "family"], "is a column of --labels; give that too"),
        (["--out", "m.html", "--labels", "labels.csv"], "has the columns family, size; name the one"),
        (["--out", "m.html", "--labels", "labels.csv", "--column", "x"], "no column 'x'"),
        (["--out", "m.html", "--labels", "others.csv"], "none of its ids, first 'q', is in e.h5"),
        (["--out", "m.html", "--labels", "twice.csv"], "the id 'p3' occurs more than once"),
        (["--out", "m.html", "--layer", "7"], "--layer 7: e.h5 holds 2; give one of these"),
        (["--out", "m.html", "--labels", "ids.csv"], "has ids and nothing else; leave --labels out"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_refusals(
    options: list[str], message: str, vectors: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.html").touch()
    Path("others.csv").write_text("id,family\nq,a\n")
    Path("ids.csv").write_text("id\np3\n")
    Path("twice.csv").write_text("id,family\np3,a\np3,b\n")
    assert main(["map", "e.h5", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("m.html").exists() and not Path("there.html").read_bytes()


def test_a_map_needs_three_proteins(vectors: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("two.h5"), IDS[:2], vectors[:2])
    assert main(["map", "two.h5", "--out", "m.html"]) == 2
    assert "two.h5: holds 2 proteins; a map needs 3" in capsys.readouterr().err
