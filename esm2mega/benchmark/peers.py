"""Makes passes of other programs on the same proteins: Hugging Face, fair-esm and esm-cpp.

All have random weights of the same shape. transformers, fair-esm and esm-cpp are imported only here.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esm2mega import vocabulary
from esm2mega.benchmark.batches import Batches, pad, padded_tokens, real_tokens
from esm2mega.benchmark.products import DTYPES
from esm2mega.benchmark.proteins import Protein
from esm2mega.benchmark.random_weights import random_weights
from esm2mega.benchmark.turns import Pass
from esm2mega.config.presets import PRESETS
from esm2mega.convert.formats import hf
from esm2mega.doctor.packages import installed_version

LEARNING_RATE = 1e-4

MODULES = {"transformers": "transformers", "fair-esm": "esm.model.esm2", "esm-cpp": "esm_cpp"}
"""Gives the module that each package is imported by."""

ProteinBatches = Sequence[Sequence[Protein]]


def why_absent(package: str) -> str | None:
    """Return why a peer cannot run, in words; None if it can."""
    if (found := installed_version(package)) is None:
        return f"not installed (pip install {package})"
    try:
        importlib.import_module(MODULES[package])
    except Exception as error:  # whatever a package that does not fit this environment raises
        return f"{found} does not import: {' '.join(str(error).split())}"
    return None


def hf_config(size: str) -> Any:
    """Return the `EsmConfig` of a published size."""
    from transformers import EsmConfig

    shape = PRESETS[size]
    return EsmConfig(
        vocab_size=len(vocabulary.VOCAB),
        mask_token_id=vocabulary.MASK,
        pad_token_id=vocabulary.PAD,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.ffn_hidden_size,
        max_position_embeddings=1026,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
        # As in the published checkpoints; the class default is 0.1.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class HuggingFaceTrainer:
    """Trains `EsmForMaskedLM` with AdamW and clipping on padded batches, in bf16 under autocast.

    Attributes:
        model: The model, with its attention from PyTorch's `scaled_dot_product_attention`.
    """

    def __init__(self, size: str, precision: str, device: torch.device) -> None:
        from transformers import EsmForMaskedLM

        torch.manual_seed(0)
        self.model: Any = EsmForMaskedLM(hf_config(size)).to(device).train()
        self.model.set_attn_implementation("sdpa")
        self._device, self._precision = device, precision
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=LEARNING_RATE,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )

    def on_device(self, batches: Batches) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return batches as `step` takes them."""
        padded = (pad(batch) for batch in batches)
        return [
            (ids.to(self._device), mask.to(self._device), labels.to(self._device))
            for ids, mask, labels in padded
        ]

    def step(self, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Update the weights once by the sum of the gradients of the batches."""
        self._optimizer.zero_grad()
        for input_ids, attention_mask, labels in batches:
            half = self._precision == "bf16"
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half):
                output = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()

    def pass_over(self, batches: Batches) -> Pass:
        """Return whole optimizer steps, one for each batch; units are real tokens."""
        padded = self.on_device(batches)

        def steps() -> None:
            for batch in padded:
                self.step([batch])

        real = real_tokens(batches)
        return Pass(steps, real, padded_tokens(batches) / real)


def pad_tokens(proteins: Sequence[Protein]) -> Tensor:
    """Return token ids with `<cls>` and `<eos>`, padded, ``[b, s]``."""
    width = max(map(len, proteins)) + 2
    ids = torch.full((len(proteins), width), vocabulary.PAD)
    for row, residues in enumerate(proteins):
        ids[row, 0] = vocabulary.CLS
        ids[row, 1 : len(residues) + 1] = torch.from_numpy(residues.astype(np.int64))
        ids[row, len(residues) + 1] = vocabulary.EOS
    return ids


def hf_embedding(batches: ProteinBatches, size: str, precision: str, device: torch.device) -> Pass:
    """Return the pass of Hugging Face's model, with the attention of PyTorch."""
    from transformers import EsmModel

    model: Any = EsmModel(hf_config(size), add_pooling_layer=False)
    model.set_attn_implementation("sdpa")
    model = model.to(device, DTYPES[precision]).eval()

    def states(ids: Tensor) -> Tensor:
        return model(ids, attention_mask=(ids != vocabulary.PAD).long()).last_hidden_state

    return _padded_pass(batches, states, device)


def fair_esm_embedding(batches: ProteinBatches, size: str, precision: str, device: torch.device) -> Pass:
    """Return fair-esm's pass; it has no bf16 mode, so it is cast as a whole."""
    import esm

    shape = PRESETS[size]
    model = esm.model.esm2.ESM2(
        num_layers=shape.num_layers,
        embed_dim=shape.hidden_size,
        attention_heads=shape.num_attention_heads,
        alphabet=esm.data.Alphabet.from_architecture("ESM-1b"),
    )
    model = model.to(device, DTYPES[precision]).eval()
    last = shape.num_layers
    return _padded_pass(batches, lambda ids: model(ids, repr_layers=[last])["representations"][last], device)


def esm_cpp_embedding(batches: ProteinBatches, size: str, precision: str, threads: int) -> Pass:
    """Return the pass of esm-cpp, which schedules all proteins itself and computes logits besides.

    In int8 it multiplies weights that were quantized without calibration, which changes values and no times.
    """
    # It is read when the first model is loaded.
    os.environ["ESM_NUM_THREADS"] = str(threads)
    import esm_cpp

    with tempfile.TemporaryDirectory(prefix="esm2mega_") as folder:
        hf.write(random_weights(size), Path(folder))
        model = esm_cpp.Model.load_from_safetensors(str(Path(folder) / "model.safetensors"))
    if precision == "int8":
        model.quantize_weights()
    proteins = [protein for batch in batches for protein in batch]
    ids = [np.array([vocabulary.CLS, *protein, vocabulary.EOS], dtype=np.int32) for protein in proteins]
    return Pass(lambda: model.forward_scheduled(ids), sum(map(len, ids)))


def _padded_pass(batches: ProteinBatches, states: Callable[[Tensor], Tensor], device: torch.device) -> Pass:
    """Return the pass of a model that takes padded batches; `states` returns ``[b, s, h]``."""
    padded = [(pad_tokens(batch), [len(protein) for protein in batch]) for batch in batches]

    @torch.inference_mode()
    def embed() -> None:
        for ids, lengths in padded:
            output = states(ids.to(device))
            for row, n in enumerate(lengths):
                assert len(output[row, 1 : n + 1].float().cpu().clone()) == n

    tokens = sum(n + 2 for _, lengths in padded for n in lengths)
    return Pass(embed, tokens, sum(ids.numel() for ids, _ in padded) / tokens)
