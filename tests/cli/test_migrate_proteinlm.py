"""`examples/migrate/proteinlm.sh` on small data in the layout that ProteinLM and TAPE publish."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from esm2mega.convert.formats.registry import open_weights
from esm2mega.data.benchmarks.names import TAPE_TASKS
from esm2mega.data.readers.megatron import VOCAB
from esm2mega.data.store.token_store import TokenStore
from tests.cli.scripts import run, warm_python

RNG = np.random.default_rng(8)
# Small enough for a second of a CPU, at the numerics of the configuration.
SMALL = (
    *(
        "model.num_layers=2",
        "model.hidden_size=24",
        "model.num_attention_heads=3",
        "model.ffn_hidden_size=48",
    ),
    *("model.precision=fp32", "model.max_positions=40", "data.max_seq_length=40", "train.max_steps=2"),
    *("train.micro_batch_tokens=80", "train.global_batch_tokens=80", "schedule.warmup_steps=0"),
    *("schedule.decay_steps=2", "train.eval_every=0"),
)
TUNED = (
    *("data.max_seq_length=40", "train.micro_batch_tokens=80", "train.global_batch_tokens=80"),
    *("train.max_epochs=1", "schedule.warmup_steps=0", "train.eval_every=0", "task.num_classes=null"),
    *("task.bootstrap=2",),
)


@pytest.fixture(autouse=True)
def _warm_python(tmp_path: Path) -> Iterator[None]:
    with warm_python(tmp_path):
        yield


def proteins(count: int) -> list[str]:
    letters = list("LAGVSERTIDPKQNFYMHWC")
    return ["".join(RNG.choice(letters, size=RNG.integers(12, 30))) for _ in range(count)]


def write_pfam(folder: Path, sequences: list[str]) -> Path:
    """What tools/preprocess_data.py writes: all three parts, one behind the other."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "pfam_text_document.bin"), dtype=np.uint8)
    for sequence in sequences:
        builder.add_item(torch.tensor([VOCAB.index(letter) for letter in sequence]))
        builder.end_document()
    builder.finalize(str(folder / "pfam_text_document.idx"))
    return folder / "pfam_text_document.idx"


def write_task(folder: Path, name: str) -> None:
    task = TAPE_TASKS[name]
    (folder / task.folder).mkdir(parents=True)
    for split in task.splits:
        environment = lmdb.open(str(folder / task.folder / f"{task.folder}_{split}.lmdb"), map_size=1 << 20)
        with environment, environment.begin(write=True) as transaction:
            for number, sequence in enumerate(proteins(4)):
                record: dict[str, Any] = {
                    "primary": sequence,
                    "id": f"{split}{number}",
                    task.field: number % 2,
                }
                transaction.put(str(number).encode(), pickle.dumps(record))
            transaction.put(b"num_examples", pickle.dumps(4))


def test_the_way_of_proteinlm(tmp_path: Path) -> None:
    sequences = proteins(12)
    pfam = write_pfam(tmp_path, sequences)
    write_task(tmp_path / "data", "remote_homology")
    variables = {
        "PFAM": str(pfam),
        "TAPE": str(tmp_path / "data"),
        "SPLIT": "8,3,1",
        "TASKS": "remote_homology",
        "OPTIONS": " ".join(TUNED),
        "OUT": "out",
    }
    done = run("migrate/proteinlm.sh", *SMALL, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    stores = [TokenStore(out / "pfam" / split) for split in ("train", "valid", "test")]
    assert [store.id(0) for store in stores] == ["1", "9", "12"]
    for folder in (out, out / "remote_homology"):
        assert json.loads((folder / "for_tape.verify.json").read_text())["passed"]
    weights = open_weights(out / "remote_homology/for_tape")
    assert weights.description.task is not None and weights.description.task.info.names == ["0", "1"]
    for split in TAPE_TASKS["remote_homology"].splits[2:]:
        found = json.loads((out / "remote_homology" / f"{split}.json").read_text())
        assert len(found["predictions"]) == 4 and 0 <= found["accuracy"] <= 1
    assert done.stdout.count("\naccuracy: ") == 3
