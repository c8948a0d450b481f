"""Configures the small training that is proven, and makes its proteins.

The training is such that every micro-batch size trains on the same proteins in the same step. After cropping,
a protein has more than 11/12 of `TOKENS_PER_PROTEIN` tokens and at most all of them, and a window holds the
proteins of one step. So a pack of k times that length takes exactly k proteins, whichever these are. A
quarter of the proteins have one known residue and a quarter have five; their other residues are unknown and
never predicted. So the label counts of micro-batches and ranks differ widely and include zero.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from esm2mega.config.scalars import as_word
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.prove.layouts import PROTEINS_PER_STEP, TOKENS_PER_PROTEIN

STEPS = 6
"""Counts the optimizer steps of a run."""

SAVED = 3
"""Names the step after which a run is stopped to be resumed at another layout."""

MID_WINDOW = (f"data.pack_window={PROTEINS_PER_STEP + 8}",)
"""Makes runs that are resumed stand inside a window after `SAVED` steps, as real runs do.

What a step takes then depends on the number of proteins per micro-batch, so the reference needs the same one.
"""

MIXED = (f"data.max_seq_length={PROTEINS_PER_STEP * TOKENS_PER_PROTEIN}",)
"""Makes runs take proteins of very different lengths, of which the longest fill the pack of a step alone.

How many proteins a step takes then depends on the length of a pack, so the reference needs the same one.
"""

SETTINGS = [
    # All dimensions differ and divide by TP 4.
    "model.hidden_size=48",
    "model.num_attention_heads=12",
    "model.ffn_hidden_size=88",
    f"data.max_seq_length={TOKENS_PER_PROTEIN}",
    f"data.pack_window={PROTEINS_PER_STEP}",
    # In so narrow a model 0.02 would leave attention nearly uniform.
    "model.init_std=0.1",
    "optim.lr=4e-3",
    # Below the norms that occur, so that clipping takes part.
    "optim.clip_grad=0.1",
    "schedule.warmup_steps=2",
    f"schedule.decay_steps={STEPS}",
    "train.log_every=1",
    f"train.eval_every={SAVED}",
    # No evaluation after the first improves by so much: the counter of early stopping moves.
    "train.early_stopping.patience=5",
    "train.early_stopping.min_delta=10",
    f"checkpoint.save_every={SAVED}",
    "checkpoint.keep_best=0",
]
"""Lists the overrides of every run."""

# Most layouts cannot deal 13 validation proteins out evenly, so they fill up with packs without labels.
_TRAIN, _VALID = 40, 13
_SHORTEST, _LONGEST = 57, 80
_KNOWN = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
_UNKNOWN = b"J"


def write_stores(folder: Path) -> Path:
    """Write the proteins and their token stores ``train`` and ``valid``, and return the directory of both."""
    rng = np.random.default_rng(3)
    fasta = folder / "proteins.fasta"
    with fasta.open("wb") as file:
        for number in range(_TRAIN + _VALID):
            residues = rng.choice(_KNOWN, size=rng.integers(_SHORTEST, _LONGEST + 1))
            if number % 4 < 2:
                residues[1 if number % 4 else 5 :] = ord(_UNKNOWN)
            file.write(b">p%d\n%s\n" % (number, residues.tobytes()))
    prepare_fasta([fasta], folder / "stores", valid_size=_VALID)
    _write_mixed(folder)
    _write_tables(folder / "stores")
    return folder / "stores"


def _write_mixed(folder: Path) -> None:
    """Write the stores ``mixed/train`` and ``mixed/valid``; one protein in six is as long as a pack."""
    rng = np.random.default_rng(7)
    fasta, most = folder / "mixed.fasta", PROTEINS_PER_STEP * TOKENS_PER_PROTEIN - 2
    with fasta.open("wb") as file:
        for number in range(_TRAIN + _VALID):
            length = most if number % 6 == 0 else round(most ** rng.random())
            file.write(b">m%d\n%s\n" % (number, rng.choice(_KNOWN, size=length).tobytes()))
    prepare_fasta([fasta], folder / "stores" / "mixed", valid_size=_VALID)


def _write_tables(folder: Path) -> None:
    """Write ``train.csv`` and ``valid.csv`` with labels of every kind, most of them missing or masked."""
    rng, shapes, more = (np.random.default_rng(seed) for seed in (4, 5, 6))

    def coil(length: int) -> list[list[float]]:
        steps = shapes.normal(size=(length, 3))
        steps *= 3.8 / np.linalg.norm(steps, axis=1, keepdims=True)
        return np.cumsum(steps, axis=0).round(3).tolist()

    for split, count in (("train", _TRAIN), ("valid", _VALID)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            columns = ["letters", "mask", "numbers", "atoms", "states", "seen"]
            table.writerow(["sequence", "a", "b", "class", "flags", *columns])
            for number in range(count):
                length = int(rng.integers(_SHORTEST, _LONGEST + 1))
                residues = rng.choice(_KNOWN, size=length).tobytes().decode()
                a, b = rng.normal(3.0, 2.0, 2).tolist()
                numbers = [f"{x:.3f}" for x in rng.normal(size=length)]
                # For two proteins in three, nothing or next to nothing is known.
                known = number % 3 == 0
                first = "1" + "0" * (length - 1)
                table.writerow(
                    [
                        residues,
                        a if known else "",
                        b if number % 4 == 0 else "",
                        "xyz"[number % 3],
                        ";".join(name for name in "uvw" if rng.random() < 0.5),
                        "".join(rng.choice(list("CEH"), size=length)),
                        "1" * length if known else first,
                        " ".join(numbers if known else ["nan"] * length),
                        # A random coil, 3.8 Angstrom between neighbours; some proteins have only its start.
                        json.dumps([*coil(length if known else 7), *[None] * (0 if known else length - 7)]),
                        # A second column of classes, known for other proteins than the first.
                        "".join(more.choice(list("12345"), size=length)),
                        ("1" if number % 4 == 1 else "0") * length,
                    ]
                )


def settings(
    stores: Path,
    run_dir: Path,
    precision: str,
    seed: int,
    stop: int,
    labelled: bool = False,
    mixed: bool = False,
) -> list[str]:
    """Return all overrides of a run but those of its layout.

    Args:
        stores: Directory of the token stores, from `write_stores`.
        run_dir: Directory of the run, which is new or resumed.
        precision: ``fp64``, ``fp32``, ``bf16`` or ``fp16``.
        seed: Seed of weights, data and masks.
        stop: Step after which the run ends; the schedule is always that of `STEPS` steps.
        labelled: Fine-tune on the tables.
        mixed: Take the proteins of `MIXED`.
    """
    ending = ".csv" if labelled else ""
    stores = stores / "mixed" if mixed else stores
    return [
        *SETTINGS,
        as_word("run_dir", run_dir),
        as_word("data.train", stores / f"train{ending}"),
        as_word("data.valid", stores / f"valid{ending}"),
        *(["data.too_long=crop"] if labelled else []),
        f"model.precision={precision}",
        # Low enough that no step in fp16 is skipped, as none is in fp32.
        "optim.initial_loss_scale=16",
        f"seed={seed}",
        f"train.max_steps={stop}",
    ]
