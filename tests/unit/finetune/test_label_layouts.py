"""The commonest layouts of labels run through, and the same labels give the same losses in all of them.

FLIP's FASTA and CSV, TAPE's LMDB, biotrainer's FASTA, lists of Hugging Face's datasets in Parquet, JSON lines
and CSV, and what a spreadsheet exports.
"""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.finetune.api import train_model
from esm2mega.inspect import inspect_path
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(5)
LETTERS = list("LAGVSERTIDPKQNFYMHWC")
SETS = ["train"] * 8 + ["val"] * 3 + ["test"] * 3
SEQUENCES = ["".join(RNG.choice(LETTERS, length)) for length in RNG.integers(6, 30, len(SETS))]
STATES = ["".join("CEH"[LETTERS.index(letter) % 3] for letter in sequence) for sequence in SEQUENCES]
MASKS = ["".join("0" if letter in "WC" else "1" for letter in sequence) for sequence in SEQUENCES]
NUMBERS = [len(sequence) / 8 - 1.5 for sequence in SEQUENCES]
NAMES = [f"p{number}" for number in range(len(SETS))]
SPLITS = {"train": "train", "valid": "val", "test": "test"}


def rows(set_name: str) -> list[int]:
    return [number for number, each in enumerate(SETS) if each == set_name]


def fasta(path: Path, bodies: list[str], headers: list[str] | None = None) -> Path:
    words = headers or [""] * len(bodies)
    path.write_text("".join(f">{n} {w}\n{b}\n" for n, w, b in zip(NAMES, words, bodies, strict=True)))
    return path


def flip_sets() -> list[str]:
    """FLIP's form: validation proteins are training proteins that are marked."""
    return [f"SET={'test' if s == 'test' else 'train'} VALIDATION={s == 'val'}" for s in SETS]


def same_file(path: Path) -> list[str]:
    return [f"data.{split}={path}" for split in SPLITS]


def per_split(write: Callable[[str, list[int]], Path]) -> list[str]:
    return [f"data.{split}={write(split, rows(name))}" for split, name in SPLITS.items()]


def prepared(folder: Path, *command: str) -> list[str]:
    assert main(["prepare", *command, "--source", str(folder), "--out", str(folder / "out")]) == 0
    return [f"data.{split}={folder / 'out' / split}.csv" for split in SPLITS]


def losses(run_dir: Path, *overrides: str) -> tuple[list[float], str]:
    """Losses of training, validation and test, and the checkpoint."""
    trained = train_model(
        [
            *SETTINGS,
            f"run_dir={run_dir}",
            "train.max_steps=2",
            "train.eval_every=2",
            "task.bootstrap=0",
            *overrides,
        ]
    )
    return [trained.metrics[name] for name in ("loss", "valid_loss", "test_loss")], str(trained.checkpoint)


# Labels of proteins: each writes the numbers, and returns the settings.


def flip_fasta(folder: Path) -> list[str]:
    headers = [f"TARGET={number!r} {words}" for number, words in zip(NUMBERS, flip_sets(), strict=True)]
    fasta(folder / "two_vs_rest.fasta", SEQUENCES, headers)
    return prepared(folder, "flip", "gb1", "--allow-other-sizes")


def flip_csv(folder: Path) -> list[str]:
    with (folder / "two_vs_rest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sequence", "target", "set", "validation"])
        for sequence, number, name in zip(SEQUENCES, NUMBERS, SETS, strict=True):
            table.writerow([sequence, number, "test" if name == "test" else "train", name == "val" or ""])
    return prepared(folder, "flip", "gb1", "--allow-other-sizes")


def flip_fasta_as_it_is(folder: Path) -> list[str]:
    headers = [f"TARGET={number!r} {words}" for number, words in zip(NUMBERS, flip_sets(), strict=True)]
    return [*same_file(fasta(folder / "all.fasta", SEQUENCES, headers)), "task.target_columns=[TARGET]"]


def biotrainer(folder: Path) -> list[str]:
    headers = [f"SET={name} TARGET={number!r}" for number, name in zip(NUMBERS, SETS, strict=True)]
    return [*same_file(fasta(folder / "all.fasta", SEQUENCES, headers)), "task.target_columns=[TARGET]"]


def spreadsheet(folder: Path) -> list[str]:
    def write(split: str, chosen: list[int]) -> Path:
        lines = [f"{NAMES[i]};{SEQUENCES[i]};{NUMBERS[i]}" for i in chosen]
        text = "\r\n".join(["id;sequence;target", *lines, ""])
        (folder / f"{split}.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
        return folder / f"{split}.csv"

    return per_split(write)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of plain CSV files."""
    folder = tmp_path_factory.mktemp("numbers")

    def write(split: str, chosen: list[int]) -> Path:
        lines = [f"{SEQUENCES[i]},{NUMBERS[i]!r}" for i in chosen]
        (folder / f"{split}.csv").write_text("\n".join(["sequence,target", *lines]))
        return folder / f"{split}.csv"

    return losses(folder / "run", *per_split(write), "task.kind=regression")[0]


@pytest.mark.parametrize("layout", [flip_fasta, flip_csv, flip_fasta_as_it_is, biotrainer, spreadsheet])
def test_labels_of_proteins(
    tmp_path: Path, layout: Callable[[Path], list[str]], numbers: list[float]
) -> None:
    assert losses(tmp_path / "run", *layout(tmp_path), "task.kind=regression")[0] == numbers


def test_decimal_commas_of_a_spreadsheet_are_named_and_read_when_asked(tmp_path: Path) -> None:
    settings = spreadsheet(tmp_path)
    expected = losses(tmp_path / "plain", *settings, "task.kind=regression")
    for name in ("train.csv", "valid.csv", "test.csv"):
        table = tmp_path / name
        table.write_bytes(table.read_bytes().replace(b".", b","))
    found = losses(tmp_path / "comma", *settings, "task.kind=regression", "data.numbers=decimal_comma")
    assert found[0] == expected[0]
    with pytest.raises(
        UserError,
        match=r"train.csv:2: '.+,.+' in column 'target' .*; set data.numbers=decimal_comma",
    ):
        losses(tmp_path / "run", *settings, "task.kind=regression")


# Labels of residues: each writes states and masks.


def flip_residues(folder: Path) -> list[str]:
    fasta(folder / "sequences.fasta", SEQUENCES)
    fasta(folder / "sampled.fasta", STATES, flip_sets())
    fasta(folder / "mask.fasta", MASKS)
    return [
        *prepared(folder, "flip", "secondary_structure", "--allow-other-sizes"),
        "task.mask_column=mask",
    ]


def biotrainer_residues(folder: Path) -> list[str]:
    sequences = fasta(folder / "sequences.fasta", SEQUENCES)
    labels = fasta(folder / "labels.fasta", STATES, [f"SET={name}" for name in SETS])
    masks = fasta(folder / "mask.fasta", MASKS)
    return [*same_file(sequences), f"task.label_file={labels}", f"task.mask_file={masks}"]


def tape(folder: Path) -> list[str]:
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed: pip install esm2mega[tape]")
    for split, name in {"train": "train", "valid": "val", "cb513": "test"}.items():
        environment = lmdb.open(str(folder / f"secondary_structure_{split}.lmdb"), map_size=1 << 22)
        with environment, environment.begin(write=True) as transaction:
            chosen = rows(name)
            for number, row in enumerate(chosen):
                record = {
                    "primary": SEQUENCES[row],
                    "ss3": np.array(["CEH".index(state) for state in STATES[row]]),
                    "valid_mask": np.array([mark == "1" for mark in MASKS[row]]),
                }
                transaction.put(str(number).encode(), pickle.dumps(record))
            transaction.put(b"num_examples", pickle.dumps(len(chosen)))
    settings = prepared(folder, "tape", "secondary_structure")[:2]
    return [*settings, f"data.test={folder / 'out' / 'cb513.csv'}"]


def entries(row: int) -> list[int]:
    """As datasets of Hugging Face hold them: numbers of classes, -100 for residues that do not count."""
    return ["CEH".index(s) if mark == "1" else -100 for s, mark in zip(STATES[row], MASKS[row], strict=True)]


def hugging_face_parquet(folder: Path) -> list[str]:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install esm2mega[parquet]")
    import pyarrow.parquet as pq

    def write(split: str, chosen: list[int]) -> Path:
        table = pa.table(
            {
                "sequence": pa.array([SEQUENCES[row] for row in chosen], pa.large_string()),
                "labels": pa.array([entries(row) for row in chosen], pa.list_(pa.int64())),
            }
        )
        feature = {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "Sequence"}
        described = {"info": {"features": {"sequence": {"dtype": "large_string"}, "labels": feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
        pq.write_table(table, folder / f"{split}.parquet")
        return folder / f"{split}.parquet"

    return [*per_split(write), "task.target_columns=[labels]"]


def hugging_face_json_lines(folder: Path) -> list[str]:
    def write(split: str, chosen: list[int]) -> Path:
        lines = [json.dumps({"sequence": SEQUENCES[row], "labels": entries(row)}) for row in chosen]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
        return folder / f"{split}.jsonl"

    return [*per_split(write), "task.target_columns=[labels]"]


def hugging_face_csv(folder: Path) -> list[str]:
    """`Dataset.to_csv` writes the text of the list."""

    def write(split: str, chosen: list[int]) -> Path:
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [["sequence", "labels"], *([SEQUENCES[i], entries(i)] for i in chosen)]
            )
        return folder / f"{split}.csv"

    return [*per_split(write), "task.target_columns=[labels]"]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """The losses of plain CSV files with masks, and without."""
    folder = tmp_path_factory.mktemp("states")

    def write(split: str, chosen: list[int]) -> Path:
        lines = [f"{SEQUENCES[i]},{STATES[i]},{MASKS[i]}" for i in chosen]
        (folder / f"{split}.csv").write_text("\n".join(["sequence,target,mask", *lines]))
        return folder / f"{split}.csv"

    settings = [*per_split(write), "task.kind=token_classification"]
    masked = losses(folder / "masked", *settings, "task.mask_column=mask")[0]
    return [masked, losses(folder / "all", *settings)[0]]


@pytest.mark.parametrize(
    "layout",
    [
        flip_residues,
        biotrainer_residues,
        tape,
        hugging_face_parquet,
        hugging_face_json_lines,
        hugging_face_csv,
    ],
)
def test_labels_of_residues(
    tmp_path: Path,
    layout: Callable[[Path], list[str]],
    states: list[list[float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, checkpoint = losses(tmp_path / "run", *layout(tmp_path), "task.kind=token_classification")
    assert found == states[layout is tape]  # TAPE's `prepare` keeps no mask of states
    form = "lists" if "hugging_face" in layout.__name__ else "a character for each residue"
    column = "labels" if "hugging_face" in layout.__name__ else "target"
    assert f"labels   column {column} holds {form}\n" in capsys.readouterr().err
    assert f"\ncolumn {column} held {form}\n" in inspect_path(checkpoint)
    state = json.loads((Path(checkpoint) / "train_state.json").read_text())
    assert state["task"]["forms"] == ["lists" if form == "lists" else "characters"]
