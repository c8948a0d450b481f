"""`prepare uniref`: exact membership whatever the order of the inputs, every refusal with its place."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from esm2mega import vocabulary
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.uniref import cluster_join, id_index
from esm2mega.data.uniref.build import UniRefInputs, bytes_to_read, prepare_uniref
from esm2mega.data.uniref.leakage import SplitSizes
from esm2mega.errors import MachineError, UserError
from esm2mega.quickstart.simulate import simulate_families
from tests.unit.data.cluster_ids import cluster_ids

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

UF50 = ">UniRef50_A rep of A\nMKTL\n>UniRef50_B\nAAC\n>UniRef50_C\nWWW\n"
# In neither the order of the mapping nor that of the UniRef50 file.
UF90 = (
    ">UniRef90_c1\nWWW\n>UniRef90_a2 second of A\nMKT\n>UniRef90_b1\nAAC\n>UniRef90_x\nGGG\n"
    ">UniRef90_a1\nMKTL\n"
)
MAPPING = (
    "uniref50\turef90\tmore\n"
    "UniRef50_B\tUniRef90_b1\tignored\tignored too\n"
    "UniRef50_A\tUniRef90_a1,UniRef90_a2\n"
    "\n"
    "UniRef50_C\tUniRef90_c1\n"
)
CLUSTERS = {
    "UniRef50_B": ["UniRef90_b1"],
    "UniRef50_A": ["UniRef90_a1", "UniRef90_a2"],
    "UniRef50_C": ["UniRef90_c1"],
}


def write(folder: Path, **texts: str) -> UniRefInputs:
    """Writes the three files and further ones; a text given by name replaces the one above."""
    names = {"uf50": UF50, "uf90": UF90, "mapping": MAPPING, **texts}
    paths = {}
    for name, text in names.items():
        paths[name] = folder / (f"{name}.tsv" if name == "mapping" else f"{name}.fasta")
        paths[name].write_text(text)
    return UniRefInputs(**paths)


def ids(store: TokenStore) -> list[str]:
    return [store.id(i) for i in range(len(store))]


def clusters_of(store: TokenStore) -> dict[str, list[str]]:
    """Member ids by cluster id, in the order of the store's arrays."""
    assert store.clusters is not None
    offsets, members = store.clusters.offsets, store.clusters.members
    assert offsets.dtype == members.dtype == np.int64
    return {
        name: [store.id(row) for row in members[offsets[j] : offsets[j + 1]].tolist()]
        for j, name in enumerate(cluster_ids(store))
    }


def error_of(inputs: UniRefInputs, sizes: SplitSizes | None = None) -> str:
    """The message of the refusal, without the folder; nothing but the inputs may be left."""
    folder = Path(inputs.uf50).parent
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as caught:
        prepare_uniref(inputs, folder / "out", sizes)
    assert sorted(folder.iterdir()) == before
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


def test_the_store_is_literally_this(tmp_path: Path) -> None:
    report = prepare_uniref(write(tmp_path), tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["train"]
    store = TokenStore(tmp_path / "out" / "train")
    store.verify()
    assert ids(store) == ["UniRef90_c1", "UniRef90_a2", "UniRef90_b1", "UniRef90_a1"]
    assert [vocabulary.decode(store.residues(i)) for i in range(4)] == ["WWW", "MKT", "AAC", "MKTL"]
    assert store.clusters is not None and len(store.clusters) == 3
    assert store.clusters.offsets.tolist() == [0, 1, 3, 4]
    assert store.clusters.members.tolist() == [2, 3, 1, 0]
    assert cluster_ids(store) == ["UniRef50_B", "UniRef50_A", "UniRef50_C"]
    assert clusters_of(store) == CLUSTERS
    manifest = store.manifest
    assert manifest["clusters"] == {"clusters": 3, "largest": 2, "held_out": 0, "left_out": 0}
    assert manifest["split"] == {"name": "train"} and manifest["dropped_sequences"] == 1
    assert [(source["name"], source["role"]) for source in manifest["sources"]] == [
        ("uf50.fasta", "uniref50"),
        ("uf90.fasta", "uniref90"),
        ("mapping.tsv", "mapping"),
    ]
    assert all(len(source["sha256"]) == 64 for source in manifest["sources"])
    train = tmp_path / "out" / "train"
    assert report.lines() == [
        f"{train}: 4 sequences, 13 residues; 0 lower-case residues raised, "
        "0 unknown residues stored as <unk>, 1 sequences dropped",
        f"{train}: 3 clusters of 1.33 members on average, 2 in the largest; 0 clusters held out, 0 left out, "
        "not being in the UniRef50 file; dropped sequences are those of no training cluster",
    ]


def test_both_separators_line_ends_and_compression(tmp_path: Path) -> None:
    inputs = write(tmp_path)
    other = MAPPING.replace(",", "; ").replace("UniRef90_b1\t", "UniRef90_b1;\t").replace("\n", "\r\n")
    (tmp_path / "other.tsv.gz").write_bytes(gzip.compress(other.encode(), mtime=0))
    uf90 = tmp_path / "uf90.fasta.zst"
    uf90.write_bytes(zstd.compress(UF90.encode()))
    compressed = UniRefInputs(inputs.uf50, uf90, tmp_path / "other.tsv.gz")
    prepare_uniref(inputs, tmp_path / "a")
    prepare_uniref(compressed, tmp_path / "b")
    one, two = TokenStore(tmp_path / "a" / "train"), TokenStore(tmp_path / "b" / "train")
    assert clusters_of(two) == CLUSTERS
    assert one.manifest["files"] == two.manifest["files"]


def test_ids_are_not_cut_and_may_hold_a_comma(tmp_path: Path) -> None:
    mapping = "h\nx\tab,c; d\n"
    inputs = write(tmp_path, uf50=">x\nMK\n", uf90=">d\nMK\n>ab,c\nAC\n>UniRef90_d\nWW\n", mapping=mapping)
    prepare_uniref(inputs, tmp_path / "out")
    assert clusters_of(TokenStore(tmp_path / "out" / "train")) == {"x": ["ab,c", "d"]}


def test_small_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, sizes = write(tmp_path), SplitSizes(1, 0, 3)
    prepare_uniref(inputs, tmp_path / "a", sizes)
    monkeypatch.setattr(cluster_join, "_BATCH_RESIDUES", 1)
    monkeypatch.setattr(cluster_join, "_BLOCK", 1)
    monkeypatch.setattr(id_index, "_BLOCK", 1)
    monkeypatch.setattr("esm2mega.data.uniref.mapping._BATCH_MEMBERS", 1)
    prepare_uniref(inputs, tmp_path / "b", sizes)
    for name in ("train", "valid"):
        one, two = TokenStore(tmp_path / "a" / name), TokenStore(tmp_path / "b" / name)
        assert one.manifest == two.manifest


def test_files_of_their_own_for_validation_and_test(tmp_path: Path) -> None:
    # D is held out and in the mapping; its member is in the UniRef90 file, and must not be trained on.
    inputs = write(
        tmp_path,
        valid=">UniRef50_E\nMEM\n>UniRef50_D\nMDM\n",
        test=">UniRef50_F\nMFM\n",
        mapping=MAPPING + "UniRef50_D\tUniRef90_x,UniRef90_absent\n",
    )
    report = prepare_uniref(inputs, tmp_path / "out")
    split = {name: TokenStore(tmp_path / "out" / name) for name in ("train", "valid", "test")}
    assert clusters_of(split["train"]) == CLUSTERS
    assert "UniRef90_x" not in ids(split["train"])
    assert ids(split["valid"]) == ["UniRef50_E", "UniRef50_D"] and ids(split["test"]) == ["UniRef50_F"]
    assert split["valid"].clusters is None and split["valid"].manifest["split"] == {"name": "valid"}
    assert report.held_out_clusters == 1 and report.other_clusters == 0
    assert split["valid"].manifest["sources"][0]["role"] == "valid"


def test_a_drawn_split_is_pinned_and_shares_no_cluster(tmp_path: Path) -> None:
    letters = "ABCDEFGHIJ"
    inputs = write(
        tmp_path,
        uf50="".join(f">UniRef50_{x}\nMK{'A' * i}\n" for i, x in enumerate(letters)),
        uf90="".join(f">UniRef90_{x}{k}\nMKW\n" for k in (2, 1) for x in letters),
        mapping="h\n" + "".join(f"UniRef50_{x}\tUniRef90_{x}1,UniRef90_{x}2\n" for x in reversed(letters)),
    )
    report = prepare_uniref(inputs, tmp_path / "out", SplitSizes(2, 3, 7))
    split = {name: TokenStore(tmp_path / "out" / name) for name in ("train", "valid", "test")}
    assert ids(split["valid"]) == ["UniRef50_I", "UniRef50_J"]
    assert ids(split["test"]) == ["UniRef50_A", "UniRef50_F", "UniRef50_H"]
    expected = {f"UniRef50_{x}": [f"UniRef90_{x}1", f"UniRef90_{x}2"] for x in "GEDCB"}
    assert list(clusters_of(split["train"]).items()) == list(expected.items())
    assert ids(split["train"]) == [f"UniRef90_{x}{k}" for k in (2, 1) for x in "BCDEG"]
    assert report.held_out_clusters == 5 and report.stores.counts["train"].dropped_sequences == 10
    described = {"seed": 7, "valid_size": 2, "test_size": 3, "total": 10}
    assert all(store.manifest["split"] == {"name": name, **described} for name, store in split.items())
    # The same draw as that of `prepare fasta` from the same file.
    prepare_fasta([inputs.uf50], tmp_path / "plain", 2, 3, 7)
    for name in ("valid", "test"):
        plain = TokenStore(tmp_path / "plain" / name)
        assert plain.fingerprint == split[name].fingerprint and ids(plain) == ids(split[name])


BAD: dict[str, tuple[Mapping[str, str], str]] = {
    "cluster not in UniRef50": (
        {"mapping": MAPPING + "UniRef50_Z\tUniRef90_x\nUniRef50_Y\tUniRef90_x\n"},
        "mapping.tsv:6: cluster 'UniRef50_Z' is not in uf50.fasta; ",
    ),
    "cluster without mapping": (
        {"uf50": UF50 + ">UniRef50_Y\nMK\n>UniRef50_Z\nMK\n"},
        "uf50.fasta:7: cluster 'UniRef50_Y' has no line in mapping.tsv; add its line",
    ),
    "no header": (
        {"mapping": MAPPING.partition("\n")[2]},
        "uf50.fasta:3: cluster 'UniRef50_B' has no line in mapping.tsv; it stands in the first line",
    ),
    "member not in UniRef90": (
        {"mapping": MAPPING.replace("UniRef90_a2", "UniRef90_a3,a1")},
        "mapping.tsv:3: member 'UniRef90_a3' of cluster 'UniRef50_A' is not in uf90.fasta (2 such",
    ),
    "UniRef90 ids cut": (
        {"uf90": UF90.replace("UniRef90_", "")},
        "mapping.tsv:2: member 'UniRef90_b1' of cluster 'UniRef50_B' is not in uf90.fasta (4 such",
    ),
    "member in two clusters": (
        {"mapping": MAPPING.replace("\tUniRef90_c1", "\tUniRef90_c1,UniRef90_a1")},
        "mapping.tsv:5: member 'UniRef90_a1' of cluster 'UniRef50_C' is in cluster 'UniRef50_A' too, at",
    ),
    "member twice": (
        {"mapping": MAPPING.replace("UniRef90_a2", "UniRef90_a2,UniRef90_a1")},
        "mapping.tsv:3: member 'UniRef90_a1' is listed twice in cluster 'UniRef50_A'; ",
    ),
    "cluster twice": (
        {"mapping": MAPPING + "UniRef50_A\tUniRef90_x\n"},
        "mapping.tsv:6: cluster 'UniRef50_A' is listed before, at mapping.tsv:3; ",
    ),
    "no member": (
        {"mapping": MAPPING.replace("\tUniRef90_b1", "\t")},
        "mapping.tsv:2: cluster 'UniRef50_B' has no members",
    ),
    "empty member": (
        {"mapping": MAPPING.replace("UniRef90_a1,", "UniRef90_a1,,")},
        "mapping.tsv:3: cluster 'UniRef50_A' has an empty member id between two separators",
    ),
    "no tab": (
        {"mapping": MAPPING + "UniRef50_D UniRef90_x\n"},
        "mapping.tsv:6: 'UniRef50_D UniRef90_x' is not followed by a tab",
    ),
    "no cluster id": ({"mapping": MAPPING + "\tUniRef90_x\n"}, "mapping.tsv:6: the cluster has no id"),
    "empty mapping": ({"mapping": "h\n"}, "mapping.tsv: no clusters in the file"),
    "UniRef50 id twice": (
        {"uf50": UF50 + ">UniRef50_A\nMK\n"},
        "uf50.fasta:7: 'UniRef50_A' occurs earlier, at uf50.fasta:1",
    ),
    "member twice in UniRef90": (
        {"uf90": UF90 + ">UniRef90_a2\nMK\n"},
        "uf90.fasta:11: 'UniRef90_a2' occurs earlier, at uf90.fasta:3; a member must",
    ),
    "only unknown residues": (
        {"uf90": UF90.replace("AAC", "JJJ")},
        "uf90.fasta:5: the sequence of 'UniRef90_b1' has only unknown residues ('JJJ')",
    ),
    "bad UniRef90": ({"uf90": UF90 + ">y\n"}, "uf90.fasta:11: no sequence under the header of 'y'"),
    "bad UniRef50": ({"uf50": ">a\nM1\n"}, "uf50.fasta:2: '1' in the sequence of 'a' is no residue"),
    "validation is a training cluster": (
        {"valid": ">UniRef50_E\nMK\n>UniRef50_A\nMK\n"},
        "valid.fasta:3: 'UniRef50_A' is held out but also a training cluster in uf50.fasta",
    ),
    "validation is a training member": (
        {"valid": ">UniRef50_E\nMK\n>UniRef90_a1\nMK\n"},
        "valid.fasta:3: 'UniRef90_a1' is held out but a member of a cluster in mapping.tsv",
    ),
    "validation has the content of the training file": (
        {"valid": UF50},
        "valid.fasta: has the same content as uf50.fasta; what is trained on cannot be held out",
    ),
    "test and validation share an id": (
        {"valid": ">UniRef50_E\nMK\n", "test": ">UniRef50_F\nMK\n>UniRef50_E\nMK\n"},
        "test.fasta:3: 'UniRef50_E' is held out but also in valid.fasta",
    ),
    "validation id twice": (
        {"valid": ">UniRef50_E\nMK\n>UniRef50_E\nMK\n"},
        "valid.fasta:3: 'UniRef50_E' occurs earlier, at valid.fasta:1",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("batches", ["large", "small"])
def test_refusals_name_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, batches: str
) -> None:
    if batches == "small":
        monkeypatch.setattr(cluster_join, "_BATCH_RESIDUES", 1)
        monkeypatch.setattr("esm2mega.data.uniref.mapping._BATCH_MEMBERS", 1)
    texts, expected = BAD[name]
    message = error_of(write(tmp_path, **texts))
    assert message.startswith(expected)


def test_members_of_drawn_clusters_must_exist_too(tmp_path: Path) -> None:
    inputs = write(tmp_path, mapping=MAPPING.replace("UniRef90_c1", "UniRef90_c9"))
    for seed in range(4):
        message = error_of(inputs, SplitSizes(1, 1, seed))
        assert message.startswith("mapping.tsv:5: member 'UniRef90_c9' of cluster 'UniRef50_C' is not")


def test_other_clusters_can_be_left_out(tmp_path: Path) -> None:
    inputs = write(tmp_path, mapping=MAPPING + "UniRef50_Z\tUniRef90_x,UniRef90_nowhere\n")
    report = prepare_uniref(inputs, tmp_path / "out", drop_other_clusters=True)
    assert report.other_clusters == 1
    store = TokenStore(tmp_path / "out" / "train")
    assert clusters_of(store) == CLUSTERS and store.manifest["clusters"]["left_out"] == 1


def test_arguments_are_checked_before_reading(tmp_path: Path) -> None:
    inputs = write(tmp_path, valid=">UniRef50_E\nMK\n")
    assert "--val-size=-1 is negative" in error_of(inputs, SplitSizes(-1))
    assert "give one or the other" in error_of(inputs, SplitSizes(1))
    (tmp_path / "link.fasta").hardlink_to(inputs.uf50)
    same = UniRefInputs(inputs.uf50, inputs.uf90, inputs.mapping, valid=tmp_path / "link.fasta")
    assert error_of(same) == (
        "link.fasta: given both as --uf50 and as --valid; what is trained on cannot be held out"
    )
    twice = UniRefInputs(inputs.uf50, inputs.uf90, inputs.mapping, inputs.valid, inputs.valid)
    assert "given both as --valid and as --test; each has a file of its own" in error_of(twice)
    absent = UniRefInputs(inputs.uf50, inputs.uf90, tmp_path / "absent.tsv")
    assert error_of(absent) == "absent.tsv: no such mapping file"
    for sizes in (SplitSizes(3), SplitSizes(1, 2)):
        drawn = UniRefInputs(inputs.uf50, inputs.uf90, inputs.mapping)
        assert "leave nothing to train on: the UniRef50 file has 3 sequences" in error_of(drawn, sizes)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        prepare_uniref(inputs, tmp_path / "out")


KILLED_BEFORE_THE_LAST_RENAME = """
import os, signal, sys
from esm2mega.data.uniref.build import UniRefInputs, prepare_uniref
rename = os.rename
def rename_or_die(source, target):
    if str(target) == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = rename_or_die
prepare_uniref(UniRefInputs(*sys.argv[1:4]), sys.argv[4])
"""


def test_a_killed_prepare_leaves_nothing_that_is_accepted(tmp_path: Path) -> None:
    inputs, out = write(tmp_path), tmp_path / "out"
    before = set(tmp_path.iterdir())
    paths = [str(path) for path in (inputs.uf50, inputs.uf90, inputs.mapping, out)]
    subprocess.run([sys.executable, "-c", KILLED_BEFORE_THE_LAST_RENAME, *paths], timeout=60, check=False)
    (left,) = set(tmp_path.iterdir()) - before
    with pytest.raises(UserError, match="interrupted"):
        TokenStore(left / "out" / "train")
    prepare_uniref(inputs, out)
    assert set(tmp_path.iterdir()) - before == {out}  # what the kill had left is gone
    assert len(TokenStore(out / "train")) == 4


def test_any_exception_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write(tmp_path)
    before = sorted(tmp_path.iterdir())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster_join.ClusterTable, "write_clusters", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_uniref(inputs, tmp_path / "out", SplitSizes(1))
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        prepare_uniref(inputs, tmp_path / "file" / "out")


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    class Count:
        done = 0

        def update(self, n: int) -> None:
            self.done += n

    inputs = write(tmp_path, valid=">UniRef50_E\nMK\n")
    drawn = UniRefInputs(inputs.uf50, inputs.uf90, inputs.mapping)
    for number, (files, sizes) in enumerate(((inputs, SplitSizes()), (drawn, SplitSizes(1, 1)))):
        count = Count()
        prepare_uniref(files, tmp_path / f"out{number}", sizes, progress=count)
        assert count.done == bytes_to_read(files, sizes)


def test_simulated_clusters_against_a_plain_join(tmp_path: Path) -> None:
    simulate_families(tmp_path / "all.fasta", 150, 12, clusters_dir=tmp_path)
    lines = (tmp_path / "mapping.tsv").read_text().splitlines()
    rng = np.random.default_rng(0)
    mixed = [lines[0], *(lines[1 + i] for i in rng.permutation(len(lines) - 1))]
    (tmp_path / "mapping.tsv").write_text("\n".join(mixed) + "\n")
    records = [record for record in ("\n" + (tmp_path / "uf90.fasta").read_text()).split("\n>") if record]
    rng.shuffle(records)
    (tmp_path / "uf90.fasta").write_text("".join(f">{record.strip()}\n" for record in records))
    inputs = UniRefInputs(*(tmp_path / name for name in ("uf50.fasta", "uf90.fasta", "mapping.tsv")))
    prepare_uniref(inputs, tmp_path / "out", SplitSizes(20, 10))

    expected = {row.split("\t")[0]: row.split("\t")[1].split(",") for row in mixed[1:]}
    sequences = {record.split("\n")[0]: "".join(record.split("\n")[1:]) for record in records}
    split = {name: TokenStore(tmp_path / "out" / name) for name in ("train", "valid", "test")}
    assert [len(split[name]) for name in ("valid", "test")] == [20, 10]
    for name in ("valid", "test"):
        for cluster in ids(split[name]):
            expected.pop(cluster)
    train = split["train"]
    assert clusters_of(train) == expected and len(expected) > 100 and max(map(len, expected.values())) > 5
    assert sorted(ids(train)) == sorted(member for members in expected.values() for member in members)
    for i in range(len(train)):
        assert vocabulary.decode(train.residues(i)) == sequences[train.id(i)].replace("J", "<unk>")
    assert json.loads((train.path / "manifest.json").read_text())["clusters"]["clusters"] == len(expected)
