"""`probe` on made-up vectors: heads against scikit-learn by hand, layers, layouts, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from esm2mega.autoeval.probe import convolution, heads
from esm2mega.autoeval.probe.heads import LOGISTIC_STRENGTHS, RIDGE_STRENGTHS
from esm2mega.cli.app import main
from esm2mega.infer.hdf5_checksums import CHECKSUM, seal
from tests.infer_models import random_proteins

HIDDEN = 12
SPLITS = ["train"] * 40 + ["valid"] * 15 + ["test"] * 25
LENGTHS = [5 + number % 23 for number in range(len(SPLITS))]
IDS = [f"p{number}" for number in range(len(SPLITS))]
SEQUENCES = random_proteins(LENGTHS)

Run = Callable[..., dict[str, Any]]


class Data:
    """Vectors of residues and proteins: layer 1 is noise, layer 2 knows the labels, which have noise too."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        total = sum(LENGTHS)
        self.offsets = np.cumsum([0, *LENGTHS])
        self.residue = {f"layer_{n}": rng.normal(3, 2, (total, HIDDEN)).astype(np.float32) for n in (1, 2)}
        self.pooled = {
            name: np.stack([part.mean(axis=0) for part in np.split(values, self.offsets[1:-1])])
            for name, values in self.residue.items()
        }
        weights, bias = rng.normal(size=HIDDEN), 3 * HIDDEN**0.5
        known = self.pooled["layer_2"].astype(np.float64)
        self.numbers = known @ weights + rng.normal(size=len(IDS)) * 0.2
        order = np.argsort(np.argsort(self.numbers))
        self.classes = [("low", "mid", "high")[int(rank * 3 // len(IDS))] for rank in order]
        states = self.residue["layer_2"] @ weights[:, None] + bias
        self.states = np.digitize(states[:, 0], np.quantile(states, [1 / 3, 2 / 3]))

    def residue_labels(self) -> list[str]:
        parts = np.split(self.states, self.offsets[1:-1])
        return ["".join("CEH"[state] for state in part) for part in parts]


@pytest.fixture(scope="module")
def data() -> Data:
    return Data()


def write_ours(path: Path, data: Data, numbers: list[int], kinds: str = "residue pooled") -> Path:
    """The layout ``ragged`` of some proteins."""
    rows = np.concatenate([np.arange(*data.offsets[n : n + 2]) for n in numbers])
    with h5py.File(path, "w") as file:
        file.create_dataset("ids", data=[IDS[n] for n in numbers], dtype=h5py.string_dtype())
        file["offsets"] = np.cumsum([0, *(LENGTHS[n] for n in numbers)])
        for name in ("layer_1", "layer_2"):
            if "residue" in kinds:
                file[f"residue/{name}"] = data.residue[name][rows]
            if "pooled" in kinds:
                file[f"pooled/{name}"] = data.pooled[name][numbers]
        seal(file)
    return path


def write_bionemo(path: Path, data: Data, kind: str) -> Path:
    """The layout of BioNeMo 1: a data set for each protein, of layer 2, in another order."""
    with h5py.File(path, "w") as file:
        for number, protein in enumerate(reversed(range(len(IDS)))):
            rows = data.residue["layer_2"][slice(*data.offsets[protein : protein + 2])]
            entry = file.create_dataset(
                str(number), data=rows if kind == "residue" else data.pooled["layer_2"][protein]
            )
            # Ids of a fixed length are bytes in h5py.
            entry.attrs["original_id"] = IDS[protein] if protein % 2 else np.bytes_(IDS[protein])
        file.create_group(str(len(IDS)))  # is no data set, and no protein
    return path


def write_labels(path: Path, columns: Mapping[str, Any], splits: list[str] = SPLITS) -> Path:
    rows = zip(IDS, SEQUENCES, splits, *columns.values(), strict=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "sequence", "split", *columns])
        writer.writerows(rows)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command, and return its results with the rows of the predictions."""

    def probe(embeddings: Path | list[Path], labels: Path, *words: str) -> dict[str, Any]:
        files = [str(path) for path in (embeddings if isinstance(embeddings, list) else [embeddings])]
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        command = ["probe", *files, "--labels", str(labels), "--out", str(out), "task.bootstrap=20", *words]
        assert main(command) == 0
        with (out / "predictions.csv").open() as file:
            rows = list(csv.DictReader(file))
        return {**json.loads((out / "results.json").read_text()), "rows": rows}

    return probe


def split(values: Any, name: str) -> Any:
    return np.asarray(values)[[part == name for part in SPLITS]]


def test_ridge_is_that_of_scikit_learn(data: Data, run: Run, tmp_path: Path) -> None:
    """The layer that knows is chosen; files may share the proteins out, and vectors may be means."""
    labels = write_labels(tmp_path / "labels.csv", {"target": data.numbers})
    parts = [write_ours(tmp_path / f"{n}.h5", data, list(range(n, len(IDS), 2))) for n in (0, 1)]
    found = run(parts, labels, "task.kind=regression")
    assert found["layer"] == "layer_2" and list(found["layers"]) == ["layer_1", "layer_2"]
    scaler = StandardScaler().fit(split(data.pooled["layer_2"], "train").astype(np.float64))
    x = {name: scaler.transform(split(data.pooled["layer_2"], name)) for name in ("train", "valid", "test")}
    losses = {}
    for alpha in RIDGE_STRENGTHS:
        model = Ridge(alpha).fit(x["train"], split(data.numbers, "train"))
        losses[alpha] = float(np.mean((model.predict(x["valid"]) - split(data.numbers, "valid")) ** 2))
    best = min(losses, key=lambda alpha: losses[alpha])
    (chosen,) = found["layers"]["layer_2"]["chosen"]
    assert chosen["alpha"] == best and chosen["valid_loss"] == pytest.approx(losses[best], rel=1e-4)
    expected = Ridge(best).fit(x["train"], split(data.numbers, "train")).predict(x["test"])
    # fp32 vectors of a size of 3, scaled by 2 at most, times some weights.
    np.testing.assert_allclose([float(row["target"]) for row in found["rows"]], expected, atol=2e-4)
    assert [row["id"] for row in found["rows"]] == [IDS[n] for n, name in enumerate(SPLITS) if name == "test"]
    low, high = found["test"]["intervals"]["spearman"]
    assert low < found["test"]["spearman"] < high and found["test"]["spearman"] > 0.9
    assert found["test"]["mse"] < 0.2 * found["test"]["baseline_mse"]
    means = run(
        write_ours(tmp_path / "means.h5", data, list(range(len(IDS))), "residue"),
        labels,
        "task.kind=regression",
    )
    assert means["test"]["mse"] == pytest.approx(found["test"]["mse"], rel=1e-4)


@pytest.mark.parametrize("kind", ["pooled", "residue"])
def test_the_layout_of_bionemo_gives_the_same(data: Data, run: Run, tmp_path: Path, kind: str) -> None:
    ours = write_ours(tmp_path / "ours.h5", data, list(range(len(IDS))))
    theirs = write_bionemo(tmp_path / "theirs.h5", data, kind)
    if kind == "pooled":
        labels = write_labels(tmp_path / "labels.csv", {"target": data.numbers})
        words = ["task.kind=regression"]
    else:
        labels = write_labels(tmp_path / "labels.csv", {"target": data.residue_labels()})
        words = ["task.kind=token_classification", "task.bootstrap=0"]
    mine, other = run(ours, labels, "--layers", "2", *words), run(theirs, labels, *words)
    assert mine["rows"] == other["rows"] and mine["test"] == other["test"]
    assert other["layer"] == "embeddings"


def test_logistic_regression_is_that_of_scikit_learn(data: Data, run: Run, tmp_path: Path) -> None:
    """A class without a training label has the probability 0."""
    classes = ["rare" if n == len(IDS) - 1 else name for n, name in enumerate(data.classes)]
    labels = write_labels(tmp_path / "labels.csv", {"target": classes})
    names = ["high", "low", "mid", "rare"]
    words = ["--layers", "layer_2", "task.kind=classification", f"task.classes=[{','.join(names)}]"]
    found = run(write_ours(tmp_path / "x.h5", data, list(range(len(IDS)))), labels, *words)
    scaler = StandardScaler().fit(split(data.pooled["layer_2"], "train").astype(np.float64))
    x = {name: scaler.transform(split(data.pooled["layer_2"], name)) for name in ("train", "valid", "test")}
    fits = [
        LogisticRegression(C=c, max_iter=1000).fit(x["train"], split(classes, "train"))
        for c in LOGISTIC_STRENGTHS
    ]
    losses = [log_loss(split(classes, "valid"), fit.predict_proba(x["valid"])) for fit in fits]
    (chosen,) = found["layers"]["layer_2"]["chosen"]
    assert chosen["C"] == LOGISTIC_STRENGTHS[int(np.argmin(losses))]
    expected = fits[int(np.argmin(losses))].predict_proba(x["test"])
    columns = [[float(row[f"p_{name}"]) for row in found["rows"]] for name in names]
    # The optimiser stops at a gradient of 1e-4.
    np.testing.assert_allclose(np.transpose(columns[:3]), expected, atol=2e-3)
    assert set(columns[3]) == {0.0}
    assert found["test"]["accuracy"] > 0.5 > found["test"]["baseline_accuracy"]


@pytest.mark.parametrize("head", ["linear", "mlp", "cnn"])
def test_labels_of_residues(
    data: Data, run: Run, tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residues that a mask hides count nowhere, and are predicted all the same."""
    monkeypatch.setattr(convolution, "EPOCHS", 12)
    monkeypatch.setattr(heads, "MLP_EPOCHS", 12)
    masks = ["".join("0" if place == 2 else "1" for place in range(length)) for length in LENGTHS]
    wrong = [text[:2] + "C" + text[3:] for text in data.residue_labels()]
    labels = write_labels(tmp_path / "labels.csv", {"target": wrong, "mask": masks})
    embeddings = write_ours(tmp_path / "x.h5", data, list(range(len(IDS))))
    words = ["--head", head, "--layers", "2", "task.kind=token_classification", "task.mask_column=mask"]
    found = run(embeddings, labels, *words, "task.bootstrap=0")
    least = {"linear": 0.85, "mlp": 0.6, "cnn": 0.45}[head]  # in a few epochs
    assert found["test"]["accuracy"] > least > found["test"]["baseline_accuracy"]
    states = [text for text, name in zip(data.residue_labels(), SPLITS, strict=True) if name == "test"]
    rows = found["rows"]
    assert [len(row["prediction"]) for row in rows] == [len(text) for text in states]
    counted = [
        (p, s)
        for row, text in zip(rows, states, strict=True)
        for n, (p, s) in enumerate(zip(row["prediction"], text, strict=True))
        if n != 2
    ]
    assert found["test"]["accuracy"] == pytest.approx(np.mean([p == s for p, s in counted]))
    assert run(embeddings, labels, *words, "task.bootstrap=0")["rows"] == rows, "the seed decides all of it"


def test_several_targets_with_gaps(data: Data, run: Run, tmp_path: Path) -> None:
    other = [math.nan if n % 5 == 0 else 100 + 10 * value for n, value in enumerate(data.numbers)]
    columns = {"a": data.numbers, "b": ["" if math.isnan(value) else value for value in other]}
    labels = write_labels(tmp_path / "labels.csv", columns)
    embeddings = write_ours(tmp_path / "x.h5", data, list(range(len(IDS))))
    words = ["task.kind=regression", "task.target_columns=[a,b]", "--layers", "2", "task.bootstrap=20"]
    found = run(embeddings, labels, *words)
    assert found["test"]["spearman/a"] > 0.9 and found["test"]["spearman/b"] > 0.9
    assert len(found["layers"]["layer_2"]["chosen"]) == 2
    deep = run(embeddings, labels, *words, "--head", "mlp", f"seed={1 << 40}")
    assert deep["test"]["r2/b"] > 0.5, "numbers of any size"
    flags = {"x": (data.numbers > np.median(data.numbers)).astype(int), "y": [n % 2 for n in range(len(IDS))]}
    write_labels(labels, flags)
    words[:2] = ["task.kind=multilabel", "task.target_columns=[x,y]"]
    assert run(embeddings, labels, *words)["test"]["auroc"] > 0.6


def test_numbers_of_residues(data: Data, run: Run, tmp_path: Path) -> None:
    values = data.residue["layer_2"][:, 3]
    cells = [" ".join(map(repr, part.tolist())) for part in np.split(values, data.offsets[1:-1])]
    labels = write_labels(tmp_path / "labels.csv", {"target": cells})
    embeddings = write_ours(tmp_path / "x.h5", data, list(range(len(IDS))))
    words = ["--layers", "2", "task.kind=token_regression", "task.bootstrap=0"]
    assert run(embeddings, labels, *words)["test"]["mse"] < 1e-6
    # More columns than labels: the value is no longer found exactly.
    few = run(embeddings, labels, *words, "--max-residues", "5")
    assert few["max_residues"] == 5 and few["test"]["mse"] > 1e-3
    assert len(few["rows"]) == SPLITS.count("test"), "all residues of the test are predicted"
    assert run(embeddings, labels, *words, "--head", "cnn")["test"]["spearman"] > 0.8


def test_labels_in_a_folder_and_in_headers(data: Data, run: Run, tmp_path: Path) -> None:
    embeddings = write_ours(tmp_path / "x.h5", data, list(range(len(IDS))))
    whole = write_labels(tmp_path / "labels.csv", {"target": data.numbers})
    expected = run(embeddings, whole, "task.kind=regression")
    (tmp_path / "folder").mkdir()
    lines = whole.read_text().splitlines()
    for name in ("train", "valid", "test"):
        kept = [line for line in lines[1:] if f",{name}," in line]
        (tmp_path / "folder" / f"{name}.csv").write_text("\n".join([lines[0], *kept]) + "\n")
    headers = tmp_path / "labels.fasta"
    entries = []
    for name, sequence, part, number in zip(IDS, SEQUENCES, SPLITS, data.numbers, strict=True):
        kind = "test" if part == "test" else "train"
        entries.append(
            f">{name} TARGET={float(number)!r} SET={kind} VALIDATION={part == 'valid'}\n{sequence}\n"
        )
    headers.write_text("".join(entries))
    for labels in (tmp_path / "folder", headers):
        words = ["task.target_columns=[TARGET]"] if labels == headers else []
        found = run(embeddings, labels, "task.kind=regression", *words)
        assert found["test"]["mse"] == expected["test"]["mse"], labels


def _repeated(data: Data, path: Path) -> Path:
    return write_ours(path, data, [*range(len(IDS)), 3])


def _short(data: Data, path: Path) -> Path:
    return write_ours(path, data, list(range(len(IDS) - 2)))


def _damaged(data: Data, path: Path) -> Path:
    content = bytearray(write_ours(path, data, list(range(len(IDS)))).read_bytes())
    content[content.index(data.pooled["layer_2"].tobytes()) + 9] ^= 1
    path.write_bytes(content)
    return path


def _other(data: Data, path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["x"] = [1.0]
    return path


def _not_finite(data: Data, path: Path) -> Path:
    write_bionemo(path, data, "pooled")
    with h5py.File(path, "a") as file:
        file["3"][1] = np.nan
    return path


def _wider(data: Data, path: Path) -> Path:
    write_bionemo(path, data, "residue")
    with h5py.File(path, "a") as file:
        values, name = file["3"][()], file["3"].attrs["original_id"]
        del file["3"]
        file["3"] = np.concatenate([values, values], axis=1)
        file["3"].attrs["original_id"] = name
    return path


def _wider_vector(data: Data, path: Path) -> Path:
    write_bionemo(path, data, "pooled")
    with h5py.File(path, "a") as file:
        name = file["3"].attrs["original_id"]
        del file["3"]
        file["3"] = np.zeros(99, np.float32)
        file["3"].attrs["original_id"] = name
    return path


def _changed(name: str, make: Callable[[Any], Any]) -> Callable[[Data, Path], Path]:
    """A file in whose layout one data set is another one, and which no checksum guards."""

    def write(data: Data, path: Path) -> Path:
        with h5py.File(write_ours(path, data, list(range(len(IDS)))), "a") as file:
            old = file[name][()]
            del file[name]
            if (new := make(old)) is None:
                file.create_group(name)
            elif new is not ...:
                file[name] = new
            for item in (file, *(file[key] for key in _every_name(file))):
                item.attrs.pop(CHECKSUM, None)
        return path

    return write


def _every_name(file: Any) -> list[str]:
    names: list[str] = []
    file.visit(names.append)
    return names


def _linked(data: Data, path: Path) -> Path:
    """A protein that another file would have to give."""
    write_bionemo(path, data, "pooled")
    with h5py.File(path, "a") as file:
        del file["3"]
        file["3"] = h5py.ExternalLink(str(path.with_name("other.h5")), "/x")
    return path


def _mixed(data: Data, path: Path) -> Path:
    write_bionemo(path, data, "pooled")
    with h5py.File(path, "a") as file:
        del file["3"]
        file["3"] = data.residue["layer_2"][:4]
    return path


def _text(data: Data, path: Path) -> Path:
    path.write_text("x")
    return path


@pytest.mark.parametrize(
    ("make", "words", "expected"),
    [
        (
            _repeated,
            [],
            r"labels.csv \(train\): the id 'p3' is there more than once in .*; give every protein an",
        ),
        (
            _short,
            [],
            r"labels.csv \(test\): 2 of 25 proteins, first 'p78', have no embedding in .*x.h5; embed",
        ),
        (_damaged, [], r"x.h5: is damaged"),
        (_other, [], r"x.h5: holds no embeddings of proteins; make them with `esm2mega embed"),
        (_text, [], r"x.h5: is not a readable HDF5 file"),
        (_not_finite, [], r"x.h5: holds a value that is not finite"),
        (_wider, [], r"x.h5: its vectors have \d+ channels, those of another protein \d+; embed"),
        (_wider_vector, [], r"x.h5: its vectors have \d+ channels, those of another protein \d+; embed"),
        (_changed("ids", lambda old: None), [], r"x.h5: is not a readable HDF5 file \(.*\); make it again"),
        (_changed("ids", lambda old: np.arange(len(old))), [], r"x.h5: is not a readable HDF5 file \("),
        (_changed("offsets", lambda old: ...), [], r"x.h5: is not a readable HDF5 file \(.*offsets"),
        (_changed("offsets", lambda old: old[:-9]), [], r"\(its offsets are not those of 80 proteins\)"),
        (_changed("offsets", lambda old: old[::-1]), [], r"\(its offsets are not those of 80 proteins\)"),
        (_changed("pooled/layer_2", lambda old: old[:9]), [], r"\(pooled/layer_2 has 9 rows, where .* 80\)"),
        (_changed("residue/layer_1", lambda old: old[:9]), [], r"\(residue/layer_1 has 9 rows, where"),
        (_changed("pooled/layer_1", lambda old: old[:, 0]), [], r"\(pooled/layer_1 is float32 \[80\], in pl"),
        (_changed("pooled/layer_1", lambda old: old[:, :0]), [], r"\(pooled/layer_1 is float32 \[80, 0\],"),
        (_changed("pooled/layer_1", lambda old: None), [], r"x.h5: is not a readable HDF5 file \("),
        (_changed("pooled/layer_1", lambda old: old.astype("S9")), [], r"layer_1 is \|S9 \[80, 12\]"),
        (_linked, [], r"1 of \d+ proteins, first 'p76', have no embedding in .*x.h5"),
        (_mixed, [], r"\(3 is float32 \[4, 12\], in place of vectors of numbers\); make it again"),
        (None, ["--layers", "7"], r"--layers layer_7: there are layer_1, layer_2; name some of them"),
        (None, ["--head", "cnn"], r"--head cnn is for labels of residues"),
        (None, ["task.kind=contact"], r"task.kind=contact needs pairs of residues"),
        (None, ["task.kind=null"], r"task.kind is not set"),
        (None, ["task.classes=[a,b]"], r"task.classes=\['a', 'b'\] does not go with task.kind=regression"),
        (None, ["task.bootstrap=-1"], r"task.bootstrap=-1 is too small"),
        (
            None,
            ["--split-column", "part"],
            r"labels.csv: has no column 'part', which says whether a row is for",
        ),
        (
            None,
            ["--split-column", "sequence"],
            r"labels.csv:2: sequence='.*' is not one of train, val, test, valid, validation, dev",
        ),
        (None, ["task.target_columns=[split]"], r"labels.csv: the column 'split' says which split a row"),
    ],
)
def test_what_is_refused(
    data: Data,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Data, Path], Path] | None,
    words: list[str],
    expected: str,
) -> None:
    path = tmp_path / "x.h5"
    (make or (lambda data, path: write_ours(path, data, list(range(len(IDS))))))(data, path)
    labels = write_labels(tmp_path / "labels.csv", {"target": data.numbers})
    command = ["probe", str(path), "--labels", str(labels), "--out", str(tmp_path / "out")]
    assert main([*command, "task.kind=regression", *words]) == 2
    *progress, line = capsys.readouterr().err.splitlines()  # vectors are read while progress is shown
    assert all(shown.startswith("probe: layer 0 of") for shown in progress)
    assert re.search(expected, line), line
    assert not (tmp_path / "out").exists()


def test_lengths_must_agree_for_residues(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ours(tmp_path / "x.h5", data, list(range(len(IDS))))
    texts = data.residue_labels()
    rows = [["id", "sequence", "split", "target"]]
    rows += [
        [n, s + "A" * (n == "p4"), p, t + "C" * (n == "p4")]
        for n, s, p, t in zip(IDS, SEQUENCES, SPLITS, texts, strict=True)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    command = [
        "probe",
        str(tmp_path / "x.h5"),
        "--labels",
        str(tmp_path / "labels.csv"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "task.kind=token_classification"]) == 2
    assert "'p4' has 10 residues, of which" in capsys.readouterr().err


def test_a_split_is_missing(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ours(tmp_path / "x.h5", data, list(range(len(IDS))))
    parts = ["train" if part == "valid" else part for part in SPLITS]
    labels = write_labels(tmp_path / "labels.csv", {"target": data.numbers}, parts)
    command = ["probe", str(tmp_path / "x.h5"), "--labels", str(labels), "--out", str(tmp_path / "out")]
    assert main([*command, "task.kind=regression"]) == 2
    assert "has no proteins for 'valid'; the head is fitted to 'train'" in capsys.readouterr().err


def test_results_that_are_there_are_kept(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ours(tmp_path / "x.h5", data, list(range(len(IDS))))
    labels = write_labels(tmp_path / "labels.csv", {"target": data.numbers})
    command = ["probe", str(tmp_path / "x.h5"), "--labels", str(labels), "--out", str(tmp_path)]
    command += ["--layers", "2", "task.kind=regression", "task.bootstrap=0"]
    for name in ("results.json", "predictions.csv"):
        (tmp_path / name).write_text("mine")
        assert main(command) == 2
        expected = f"{name}: exists; replace it with --overwrite, or choose another --out"
        assert expected in capsys.readouterr().err and (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert main(command) == 0 and main([*command, "seed=5"]) == 2
    assert main([*command, "seed=5", "--overwrite"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["seed"] == 5
