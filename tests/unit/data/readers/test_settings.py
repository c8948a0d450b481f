"""Tables of variants: read as the sequences they stand for, in every format and by every way of labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import LabelledProteins, proteins_of_pairs, read_labelled
from esm2mega.data.readers.settings import options_of
from esm2mega.data.readers.sources import open_source
from esm2mega.data.store.cache import open_store
from esm2mega.errors import UserError

WILD = "MKTAYIAKQR"
ROWS = [("WT", WILD, 0.0), ("K2N:A4G", "MNTGYIAKQR", 0.5), ("p.Lys2del", "MTAYIAKQR", -1.5)]
TASK = TaskConfig(kind="regression")


def write(path: Path, column: str, values: list[str]) -> Path:
    rows = [{column: value, "target": target} for value, (_, _, target) in zip(values, ROWS, strict=True)]
    if path.suffix == ".csv":
        lines = [f"{column};target", *(f"{row[column]};{row['target']}" for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip(
            "pyarrow", reason="pyarrow is not installed: pip install esm2mega[parquet]"
        )
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def variants(folder: Path) -> DataConfig:
    (folder / "wt.fasta").write_text(f">enzyme\n{WILD[:4]}\n{WILD[4:].lower()}\n")
    return DataConfig(wild_type=str(folder / "wt.fasta"))


def read(path: Path, data: DataConfig) -> LabelledProteins:
    return read_labelled(path, TASK, data, None, "data.train")[0]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_table_of_variants_is_read_as_one_of_sequences(tmp_path: Path, ending: str) -> None:
    data = variants(tmp_path)
    expected = read(write(tmp_path / f"s{ending}", "sequence", [row[1] for row in ROWS]), DataConfig())
    table = write(tmp_path / f"t{ending}", "mutant", [row[0] for row in ROWS])
    found = read(table, data)
    assert found.fingerprint == expected.fingerprint and found.ids == [row[0] for row in ROWS]
    store = open_store(str(table), DataConfig(**{**vars(data), "cache_dir": str(tmp_path / "c")}), None, "x")
    assert [store.id(row) for row in range(3)] == found.ids
    assert store.tokens.tolist() == found.tokens.tolist()
    other = write(tmp_path / f"o{ending}", "change", [row[0] for row in ROWS])
    renamed = DataConfig(wild_type=data.wild_type, mutation_column="change")
    assert read(other, renamed).fingerprint == expected.fingerprint


def test_residues_are_numbered_as_the_table_does(tmp_path: Path) -> None:
    data = variants(tmp_path)
    expected = read(write(tmp_path / "s.csv", "sequence", ["MNTAYIAKQR"] * 3), DataConfig())
    table = write(tmp_path / "t.csv", "mutant", ["K22N"] * 3)
    shifted = DataConfig(**{**vars(data), "first_residue": 21, "cache_dir": str(tmp_path / "c")})
    assert read(table, shifted).fingerprint == expected.fingerprint
    # Other residues are another store.
    (tmp_path / "wt.fasta").write_text(">a\nMKKKYIAKQR\n")
    table = write(tmp_path / "t.csv", "mutant", ["K3N"] * 3)
    stores = [
        open_store(str(table), DataConfig(**{**vars(shifted), "first_residue": first}), None, "x")
        for first in (1, 2)
    ]
    assert stores[0].tokens.tolist() != stores[1].tokens.tolist()


def test_a_table_of_sequences_beside_those_of_variants(tmp_path: Path) -> None:
    """What a run writes of its splits, or proteins that intervals are calibrated on."""
    table = write(tmp_path / "s.csv", "sequence", [row[1] for row in ROWS])
    found = read(table, data := variants(tmp_path))
    assert found.fingerprint == read(table, DataConfig()).fingerprint
    source = open_source(table, options_of(data))
    assert source.notes()[0] == f"{table}: has no column of variants, so 'sequence' is read"


def test_a_column_that_may_hold_the_variants_is_never_passed_over(tmp_path: Path) -> None:
    """Sheets often have the wild type in every row of their column of sequences."""
    data = variants(tmp_path)
    rows = "".join(f"{variant},{WILD},{target}\n" for variant, _, target in ROWS)
    for name, asked in (("mutation", "mutant"), ("Mutation", "mutations"), ("mutants", "mutant")):
        (tmp_path / "t.csv").write_text(f"{name},sequence,target\n{rows}")
        with pytest.raises(UserError, match=rf"no column '{asked}' .* data.mutation_column={name}"):
            read(tmp_path / "t.csv", DataConfig(wild_type=data.wild_type, mutation_column=asked))


def test_the_column_that_is_read_is_part_of_the_name_of_a_store(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sequence,other\nMKTAYI,MKV\nMKTAYL,MKI\n")
    data = {**vars(variants(tmp_path)), "cache_dir": str(tmp_path / "c")}
    found = [
        open_store(str(tmp_path / "t.csv"), DataConfig(**{**data, "sequence_column": name}), None, "x")
        for name in ("sequence", "other")
    ]
    assert [store.lengths.tolist() for store in found] == [[6, 6], [3, 3]]


def test_the_wild_type_is_part_of_the_name_of_a_cached_store(tmp_path: Path) -> None:
    """Another wild type with the same table is another store, and so are the same bytes as sequences."""
    table = write(tmp_path / "t.csv", "mutant", ["K2N", "K2A", "K2G"])
    data = DataConfig(**{**vars(variants(tmp_path)), "cache_dir": str(tmp_path / "c")})
    first = open_store(str(table), data, None, "x")
    (tmp_path / "wt.fasta").write_text(">b\nMKV\n")
    second = open_store(str(table), data, None, "x")
    assert first.path != second.path and first.lengths.tolist() == [10] * 3
    assert second.lengths.tolist() == [3] * 3


def test_rows_of_a_program_and_labels_in_a_file_of_their_own(tmp_path: Path) -> None:
    data = variants(tmp_path)
    expected = read(write(tmp_path / "s.csv", "sequence", [row[1] for row in ROWS]), DataConfig())
    rows = [{"mutant": variant, "target": target} for variant, _, target in ROWS]
    for given in (rows, [(variant, target) for variant, _, target in ROWS]):
        found = proteins_of_pairs(given, TASK, None, "data.train", data)[0]
        assert found.fingerprint == expected.fingerprint and found.ids == [row[0] for row in ROWS]
    (tmp_path / "l.csv").write_text("id,target\nb,1\na,2\n")
    (tmp_path / "v.csv").write_text("id,mutant\na,K2N\nb,WT\n")
    joined = TaskConfig(kind="regression", label_file=str(tmp_path / "l.csv"))
    proteins = read_labelled(tmp_path / "v.csv", joined, data, None, "data.train")[0]
    assert proteins.ids == ["a", "b"] and proteins.labels is not None
    assert proteins.labels.tolist() == [[2.0], [1.0]]


def test_what_is_refused_is_named_with_its_place(tmp_path: Path) -> None:
    data = variants(tmp_path)
    table = write(tmp_path / "t.csv", "mutant", ["K2N", "A2G", "WT"])
    with pytest.raises(
        UserError, match=r"t.csv:3: A2G: residue 2 of the sequence is K, not A; correct it, or set"
    ):
        read(table, data)
    with pytest.raises(UserError, match=r"data\[1\]: A2G: residue 2 of the sequence is K"):
        proteins_of_pairs([("K2N", 1.0), ("A2G", 2.0)], TASK, None, "data", data)
    with pytest.raises(UserError, match=r"t.csv:3: the variant of '3' is empty; complete or remove the row$"):
        read(write(table, "mutant", ["K2N", "", "WT"]), data)
    with pytest.raises(
        UserError, match=r"t.csv: no column 'sequence' .* set data.wild_type=FILE.fasta if 'm"
    ):
        read(table, DataConfig())
    named = r"set data.wild_type=FILE.fasta data.mutation_column=Mutation if 'Mutation' holds variants"
    with pytest.raises(UserError, match=named):
        read(write(tmp_path / "m.csv", "Mutation", ["K2N", "A2G", "WT"]), DataConfig())
    with pytest.raises(UserError, match=r"did you mean data.mutation_column=Mutation\?"):
        read(tmp_path / "m.csv", data)
    unnamed = r"m.csv:2: 'K2N' is a variant, not a sequence; .* data.mutation_column=Mutation$"
    with pytest.raises(UserError, match=unnamed):
        read(tmp_path / "m.csv", DataConfig(sequence_column="Mutation"))
    with pytest.raises(UserError, match=r"data\[0\]: 'K2N' is a variant, not a sequence; name its protein"):
        proteins_of_pairs([("K2N", 1.0)], TASK, None, "data", DataConfig())
    with pytest.raises(UserError, match=r"no column 'mutant' among x.* data.mutation_column="):
        read(write(tmp_path / "s.csv", "x", ["K2N", "A2G", "WT"]), data)
    (tmp_path / "p.fasta").write_text(">a target=1\nMK\n")
    with pytest.raises(UserError, match=r"p.fasta: data.wild_type is set, and variants are read from tables"):
        read(tmp_path / "p.fasta", data)
    (tmp_path / "wt.fasta").write_text(">a\nMK\n>b\nML\n")
    with pytest.raises(UserError, match=r"data.wild_type=.*wt.fasta: holds 2 proteins"):
        options_of(data)
    with pytest.raises(UserError, match=r"data.wild_type=none.fasta: none.fasta: no such FASTA file"):
        options_of(DataConfig(wild_type="none.fasta"))
