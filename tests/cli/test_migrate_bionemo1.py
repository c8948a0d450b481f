"""`examples/migrate/bionemo1.sh` on small data in the layouts that BioNeMo 1, UniRef and FLIP have."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from esm2mega.data.store.token_store import TokenStore
from esm2mega.vocabulary import CLS, EOS, encode_residues
from tests import foreign
from tests.cli.scripts import SMALL, random_sequences, records, run, warm_python

for package in ("esm", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install esm2mega[dev]")

FEW_STEPS = ("train.max_epochs=null", "train.max_steps=2", "train.eval_every=0", "schedule.warmup_steps=0")
STATES = "CEH"


def fasta(path: Path, entries: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f">{head}\n{body}\n" for head, body in entries.items()))
    return path


def write_uniref(folder: Path) -> None:
    """Ten clusters of two members, one of which is the representative, and two clusters for validation."""
    found = random_sequences(32, seed=1)
    clusters = {f"UniRef50_{n}": (found[2 * n], found[2 * n + 1]) for n in range(10)}
    fasta(folder / "uniref50_train_filt.fasta", {name: pair[0] for name, pair in clusters.items()})
    members = {f"UniRef90_{name[9:]}{m}": pair[m] for name, pair in clusters.items() for m in (0, 1)}
    fasta(folder / "ur90_ur50_sampler.fasta", members)
    rows = [f"{name}\tUniRef90_{name[9:]}0,UniRef90_{name[9:]}1\n" for name in clusters]
    (folder / "mapping.tsv").write_text("uniref50_id\tuniref90_ids\n" + "".join(rows))
    fasta(folder / "uniref50_valid.fasta", {f"UniRef50_v{n}": found[30 + n] for n in range(2)})


def write_flip(folder: Path) -> None:
    """A task of residues in three files, with the splits in the headers."""
    rng, found = np.random.default_rng(2), random_sequences(24, seed=3)
    marks = [f"SET={'test' if n >= 20 else 'train'} VALIDATION={16 <= n < 20}" for n in range(24)]
    residues = folder / "secondary_structure"
    fasta(residues / "sequences.fasta", {f"Sequence{n}": text for n, text in enumerate(found)})
    labels = ["".join(rng.choice(list(STATES), len(text) - 3)) + STATES for text in found]
    fasta(residues / "sampled.fasta", {f"Sequence{n} {marks[n]}": text for n, text in enumerate(labels)})
    resolved = {f"Sequence{n}": "0" + "1" * (len(text) - 1) for n, text in enumerate(found)}
    fasta(residues / "resolved.fasta", resolved)


@pytest.mark.slow
def test_the_published_sequence_of_commands(tmp_path: Path) -> None:
    write_uniref(tmp_path / "uniref")
    write_flip(tmp_path / "flip")
    # One protein of training is in the validation file, under another name.
    mine = random_sequences(12, seed=4)
    fasta(tmp_path / "mine.fasta", {f"p{n} of mine": text for n, text in enumerate(mine)})
    fasta(tmp_path / "valid.fasta", {"v0": mine[5], "v1": random_sequences(1, seed=5)[0]})
    truth = foreign.truth(torch.float32, "fp16")
    foreign.unpacked(foreign.write_nemo1(truth, tmp_path, tp=2))
    variables = {
        "UNIREF": "uniref", "FLIP": "flip", "FLIP_OPTIONS": "--allow-other-sizes", "NEMO": "unpacked",
        "FASTA": "mine.fasta", "VALID": "valid.fasta", "OUT": "out", "CONFIG": "base", "STEPS": "1",
        "TASKS": "secondary_structure", "FINETUNE": " ".join((*SMALL, *FEW_STEPS)),
    }  # fmt: skip
    overrides = [f"model.{key}={value}" for key, value in foreign.SHAPE.items()]
    overrides += ["model.layer_spec=local", *SMALL]
    with warm_python(tmp_path):
        done = run("migrate/bionemo1.sh", *overrides, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"

    store = TokenStore(out / "uniref" / "train")
    assert store.clusters is not None and len(store) == 20
    assert json.loads((out / "pretrained" / "test.json").read_text())["num_sequences"] == 2
    # Files in the place of stores: prepared once, then trained on, from the weights of the archive.
    assert "mine.fasta is prepared, once, into out/prepared" in done.stderr
    assert [r["step"] for r in records(out / "continued") if r["kind"] == "train"] == [1]
    assert "without 1 sequences of the input that are also in --valid; the first is 'p5'" in done.stdout
    assert len(TokenStore(out / "store" / "train")) == 11
    with (
        h5py.File(out / "proteins_hiddens.h5") as hiddens,
        h5py.File(out / "proteins_embeddings.h5") as pooled,
    ):
        assert [hiddens[str(n)].attrs["original_id"] for n in range(12)] == [f"p{n}" for n in range(12)]
        assert [hiddens[str(n)].shape for n in range(12)] == [(len(text), foreign.H) for text in mine]
        assert {data.compression for data in hiddens.values()} == {"gzip"}
        for n in range(12):
            assert np.allclose(pooled[str(n)], hiddens[str(n)][()].mean(0), atol=1e-5)
        ids = torch.tensor([[CLS, *encode_residues(mine[3]).tolist(), EOS]])
        with torch.no_grad():
            states = truth.model(ids, repr_layers=[foreign.L])["representations"][foreign.L][0, 1:-1]
        # fp32 sums in another order.
        assert np.abs(hiddens["3"] - states.numpy()).max() <= 1e-5 * states.abs().max()
    assert 0 <= records(out / "secondary_structure")[-1]["test_accuracy"] <= 1
    (adapted,) = (out / "lora" / "checkpoints").iterdir()
    assert "mode: lora" in (adapted / "config.yaml").read_text()
    with (out / "states.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"p{n}" for n in range(12)]
    assert (out / "bionemo2" / "context" / "io.json").is_file()
    assert json.loads((out / "bionemo2.verify.json").read_text())["passed"]
