"""A random ESM-2 of Hugging Face as an esm2mega checkpoint, for the tests of inference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from esm2mega.checkpoint.layout import step_dir
from esm2mega.checkpoint.store import save_checkpoint
from esm2mega.config.schema import ParallelConfig
from esm2mega.data.tokenizer import PAD, encode_residues
from esm2mega.parallel.initialize import process_groups
from tests.parity import references
from tests.parity.references import Shape

LETTERS = "LAGVSERTIDPKQNFYMHWC"
SHAPE = Shape(num_layers=4, hidden_size=48, num_attention_heads=6, ffn_hidden_size=104)
MAX_SEQ_LENGTH = 128


@dataclass(frozen=True)
class Reference:
    """A model of Hugging Face, and the checkpoint with the same weights."""

    model: Any
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


def write_checkpoint(run_dir: Path, model: Any, shape: Shape) -> Path:
    """Save the weights of an `EsmForMaskedLM`, contact head included, as a checkpoint of a run."""
    from tests.unit.runs import tiny_run, train_state

    sizes = [f"model.{name}={value}" for name, value in vars(shape).items()]
    run = tiny_run(*sizes, "model.precision=fp32", f"data.max_seq_length={MAX_SEQ_LENGTH}", run_dir=run_dir)
    state = dict(model.state_dict())
    weights = references.from_hugging_face(state, shape)
    with process_groups(ParallelConfig(), seed=1):
        training = train_state(run)
        with torch.no_grad():
            for name, parameter in training.model[0].module.named_parameters():
                parameter[: weights[name].shape[0]] = weights[name]
        training.optimizer.reload_model_params()
        directory = step_dir(run_dir, 1)
        directory.parent.mkdir(parents=True)
        save_checkpoint(directory, training.model, training.optimizer, run, {"step": 1, "valid_loss": None})
    head = {
        f"contact_head.regression.{part}": state[f"esm.contact_head.regression.{part}"]
        for part in ("weight", "bias")
    }
    save_file(head, directory / "auxiliary.safetensors")
    return directory


def make_reference(folder: Path) -> Reference:
    """A model of `SHAPE` with random values in every tensor."""
    model = references.hugging_face(SHAPE)
    model.set_attn_implementation("eager")
    return Reference(model, write_checkpoint(folder / "run", model, SHAPE))


def random_proteins(lengths: list[int], seed: int = 3) -> list[str]:
    """Random standard residues."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), size=length)) for length in lengths]


def write_fasta(path: Path, proteins: dict[str, str] | list[tuple[str, str]]) -> Path:
    """Ids and sequences, in order."""
    pairs = proteins.items() if isinstance(proteins, dict) else proteins
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in pairs))
    return path
