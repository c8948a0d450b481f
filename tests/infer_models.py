"""A random ESM-2 of Hugging Face as an esm2mega checkpoint, for the tests of inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml

from esm2mega.checkpoint.digests import write_digests
from esm2mega.checkpoint.layout import CONFIG
from esm2mega.convert.convert import convert
from esm2mega.infer.windows import optimal
from esm2mega.vocabulary import MASK, PAD, encode_residues
from tests.parity import references
from tests.parity.references import Shape

LETTERS = "LAGVSERTIDPKQNFYMHWC"
SHAPE = Shape(num_layers=4, hidden_size=48, num_attention_heads=6, ffn_hidden_size=104)
MAX_SEQ_LENGTH = 128


@dataclass(frozen=True)
class Reference:
    """A model of Hugging Face, its directory, and the checkpoint that was made of it."""

    model: Any
    hugging_face: Path
    checkpoint: Path

    @torch.no_grad()
    def run(self, sequence: str) -> Any:
        """Its outputs for one protein: hidden states and logits with ``<cls>`` and ``<eos>``, fp32."""
        return self.run_ids(ids_of(sequence))

    @torch.no_grad()
    def run_ids(self, ids: torch.Tensor) -> Any:
        """The same for token ids ``[1, s]``."""
        return self.model(ids, attention_mask=(ids != PAD).long(), output_hidden_states=True)

    @torch.no_grad()
    def contacts(self, sequence: str) -> torch.Tensor:
        ids = ids_of(sequence)
        return self.model.esm.predict_contacts(ids, torch.ones_like(ids))[0]


def ids_of(sequence: str) -> torch.Tensor:
    """int64 ``[1, s]``."""
    return torch.tensor([[0, *encode_residues(sequence).tolist(), 2]])


@contextmanager
def in_double(reference: Reference) -> Iterator[Reference]:
    """A copy that computes in fp64 within the block, where Hugging Face would go to fp32 by `.float()` too.

    The frequencies of the rotation stay numbers of 32 bits, as a checkpoint has them.
    """
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield replace(reference, model=copy.deepcopy(reference.model).double())


@torch.no_grad()
def pseudo_log_likelihood(reference: Reference, sequence: str, width: int = MAX_SEQ_LENGTH) -> float:
    """Sum of log p(residue) by Hugging Face's model in fp64, with one protein and one mask at a time,
    of a long protein `width` tokens around it.
    """
    total = 0.0
    with in_double(reference) as exact:
        for residue in range(len(sequence)):
            ids, token = ids_of(sequence), residue + 1
            own = int(ids[0, token])
            ids[0, token] = MASK
            window = optimal(residue, len(sequence), width)
            seen = ids[:, window.start : window.stop]
            logits = exact.run_ids(seen).logits[0, token - window.start]
            total += float(logits.log_softmax(-1)[own])
    return total


def make_reference(folder: Path, shape: Shape = SHAPE) -> Reference:
    """A model with random values in every tensor."""
    model = references.hugging_face(shape)
    model.set_attn_implementation("eager")
    model.save_pretrained(folder / "hf")
    checkpoint = folder / "run" / "checkpoints" / "step_00000000"
    convert(folder / "hf", checkpoint, "esm2mega")
    # As after training on shorter pieces than the default, so that short proteins are long ones.
    configuration = yaml.safe_load((checkpoint / CONFIG).read_text())
    configuration["data"]["max_seq_length"] = MAX_SEQ_LENGTH
    (checkpoint / CONFIG).write_text(yaml.safe_dump(configuration))
    write_digests(checkpoint)
    return Reference(model, folder / "hf", checkpoint)


def random_proteins(lengths: list[int], seed: int = 3) -> list[str]:
    """Random standard residues."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), size=length)) for length in lengths]


def write_fasta(path: Path, proteins: dict[str, str] | list[tuple[str, str]]) -> Path:
    """Ids and sequences, in order."""
    pairs = proteins.items() if isinstance(proteins, dict) else proteins
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in pairs))
    return path
