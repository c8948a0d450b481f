"""Cuts proteins into windows, packs them for the engine, and joins the results to embeddings.

Legend: ``L`` residues of a protein that are kept, ``h`` hidden size, ``v`` vocabulary (33), ``n`` proteins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esm2mega.checkpoint.finite import not_finite
from esm2mega.config.infer import absolute_layers, window_tokens
from esm2mega.config.schema import DataConfig, InferConfig, ModelConfig
from esm2mega.errors import UserError
from esm2mega.infer.engine import OutputRequest, PackOutputs, RunsPacks, WindowPack, group_windows
from esm2mega.infer.maps import JoinedMap, row_blocks
from esm2mega.infer.source import ModelSource
from esm2mega.infer.windows import Window, overlapping, whole

Values = dict[str, Any]
"""Holds the values of a protein or a window by the name of their array in the output.

The names and shapes are ``residue/layer_N [L, h]``, ``pooled/layer_N [h]``, ``logits [L, v]`` and
``contacts [L, L]``. All are tensors, but contacts, which are a `ContactMap`.
"""


@dataclass(frozen=True)
class Lengths:
    """Says what becomes of proteins that are longer than the model sees at once.

    Attributes:
        width: Most tokens at once.
        too_long: ``error``, ``crop`` or ``chunk``.
        overlap: Tokens that neighbouring windows share.
    """

    width: int
    too_long: str
    overlap: int

    @classmethod
    def of(cls, infer: InferConfig, data: DataConfig) -> Lengths:
        """Read the limits from `infer`; where it sets no length, `data` has it."""
        width = window_tokens(infer, data)
        overlap = width // 2 if infer.overlap is None else infer.overlap
        return cls(width, infer.too_long, min(overlap, width - 3))

    @property
    def most_residues(self) -> int:
        """Return the number of residues of the longest protein that fits whole."""
        return self.width - 2

    def kept(self, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Return how many residues are kept of proteins of these lengths, ``[n]``."""
        longest = self.most_residues if self.too_long == "crop" else np.iinfo(np.int64).max
        return np.minimum(lengths.astype(np.int64), longest)

    def windows(self, num_residues: int) -> list[Window]:
        """Return the windows of a protein, which cover the residues that are kept of it.

        Raises:
            UserError: The protein is too long, and neither cropping nor windows are configured.
        """
        if num_residues <= self.most_residues:
            return [whole(num_residues)]
        if self.too_long == "crop":
            return [whole(self.most_residues)]
        if self.too_long == "chunk":
            return overlapping(num_residues, self.width, self.overlap)
        raise UserError(
            f"{num_residues:,} residues are more than the {self.most_residues:,} that the model sees "
            "at once; load the model with too_long='crop' or 'chunk', or with a greater max_seq_length"
        )

    def counts(self, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return the number of windows of each protein of these lengths, ``[n]``; 1 unless ``chunk``."""
        beyond = np.maximum(lengths.astype(np.int64) - self.most_residues, 0)
        steps = -(-beyond // (self.width - self.overlap)) if self.too_long == "chunk" else 0
        return (1 + steps * np.ones_like(beyond)).astype(np.int32)


class Embedder:
    """Computes what a configuration asks for, protein by protein."""

    def __init__(self, engine: RunsPacks, infer: InferConfig, limits: Lengths, checkpoint: Path) -> None:
        """Set what is computed.

        Args:
            engine: An engine with the request `output_request(infer, …)`.
            infer: Outputs to compute.
            limits: Treatment of long proteins.
            checkpoint: The model, for errors.
        """
        self._engine = engine
        self._checkpoint = checkpoint
        self._outputs = frozenset(infer.outputs)
        self._pooling = infer.pooling
        self._limits = limits

    def run(
        self, proteins: Sequence[npt.NDArray[np.uint8]], name: Callable[[int], str]
    ) -> Iterator[tuple[int, Values]]:
        """Yield the number of each protein and its values, in the order in which they get ready.

        Values do not depend on which proteins share a pack. With a pipeline, each stage yields what it has.

        Args:
            proteins: Token ids of residues, without special tokens, uint8 ``[L]`` each.
            name: Returns the name of a protein by its number, for errors.

        Raises:
            UserError: A value is not finite.
        """
        jobs = [
            (number, index, window)
            for number, residues in enumerate(proteins)
            for index, window in enumerate(self._limits.windows(len(residues)))
        ]
        num_windows = np.bincount([number for number, _, _ in jobs], minlength=len(proteins))
        plan = group_windows([window.num_tokens for _, _, window in jobs], self._engine.micro_batch_tokens)
        packs = [
            WindowPack(
                [jobs[i][2] for i in members],
                np.concatenate([self._tokens(proteins[jobs[i][0]], jobs[i][2]) for i in members]),
            )
            for members in plan
        ]
        waiting: dict[int, dict[int, tuple[Window, Values]]] = {}
        for members, pack, outputs in zip(plan, packs, self._engine.run(packs), strict=True):
            is_finite = outputs.is_finite()
            for i, values in zip(members, self._of_windows(pack, outputs), strict=True):
                number, index, window = jobs[i]
                if not is_finite:
                    self._check(name(number), values)
                if num_windows[number] == 1:
                    yield number, self._of_protein(values)
                    continue
                pieces = waiting.setdefault(number, {})
                # Copies: a view would keep the whole pack in memory.
                pieces[index] = (
                    window,
                    {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()},
                )
                if len(pieces) == num_windows[number]:
                    # Joined in the order of the windows, whatever packs they were in, sums have equal bits.
                    joined = _join([pieces[p] for p in range(len(pieces))])
                    del waiting[number]
                    yield number, self._of_protein(joined)

    def _check(self, protein: str, values: Values) -> None:
        """Refuse values of a window that are not finite."""
        for name, value in values.items():
            if not all(bool(rows.isfinite().all()) for _, rows in row_blocks(value)):
                kind, slash, layer = name.partition("/")
                # Pooled values are made of those of residues, or of <cls>.
                output = name if kind in self._outputs else f"pooled{slash}{layer}"
                raise not_finite(protein, output, self._checkpoint)

    @staticmethod
    def _tokens(residues: npt.NDArray[np.uint8], window: Window) -> npt.NDArray[np.uint8]:
        return window.tokens(residues[: window.num_residues])

    def _of_windows(self, pack: WindowPack, outputs: PackOutputs) -> Iterator[Values]:
        """Yield the values of every window: ``residue``, ``logits``, ``contacts``, and ``cls/layer_N``."""
        first = 0
        for number, window in enumerate(pack.windows):
            span = window.residue_tokens
            residues = slice(first + span.start, first + span.stop)
            values: Values = {}
            for layer, states in outputs.hidden.items():
                values[f"residue/layer_{layer}"] = states[residues]
                if window.start == 0:
                    values[f"cls/layer_{layer}"] = states[first]
            if outputs.logits is not None and "logits" in self._outputs:
                values["logits"] = outputs.logits[residues]
            if outputs.contacts:
                values["contacts"] = outputs.contacts[number]
            first += window.num_tokens
            yield values

    def _of_protein(self, values: Values) -> Values:
        """Pool the values of a protein, and leave out what was not asked for."""
        result: Values = {}
        for name, value in values.items():
            kind, _, layer = name.partition("/")
            if kind == "residue" and "pooled" in self._outputs and self._pooling != "cls":
                # At least fp32: a mean of a thousand bf16 numbers would lose most of its digits.
                rows = value.to(torch.promote_types(value.dtype, torch.float32))
                result[f"pooled/{layer}"] = rows.mean(dim=0) if self._pooling == "mean" else rows.amax(dim=0)
            if kind == "cls" and "pooled" in self._outputs and self._pooling == "cls":
                result[f"pooled/{layer}"] = value
            if kind in self._outputs:
                result[name] = value
        return result


def _join(pieces: Sequence[tuple[Window, Values]]) -> Values:
    """Average over the windows that hold a residue, or both residues of a contact.

    Pairs that no window holds have no contact probability, so they are NaN.
    """
    length = pieces[0][0].num_residues
    joined: Values = {}
    for name, example in pieces[0][1].items():
        if name == "contacts":
            joined[name] = JoinedMap([(window, values[name]) for window, values in pieces])
            continue
        if name.startswith("cls/"):
            joined[name] = example
            continue
        dtype = torch.promote_types(example.dtype, torch.float32)
        total = torch.zeros(length, example.shape[1], dtype=dtype, device=example.device)
        count = torch.zeros(length, 1, dtype=dtype, device=example.device)
        for window, values in pieces:
            total[window.residues] += values[name]
            count[window.residues] += 1
        joined[name] = total / count
    return joined


def micro_batch_tokens(infer: InferConfig, device: torch.device) -> int:
    """Return the tokens of a pack: the configured number or what suits the device.

    A 35M model on 2 cores of an AMD EPYC embedded 1,390, 1,460, 1,240 and 1,180 tokens/s in packs of 1,024,
    2,048, 4,096 and 8,192. The size for GPUs is not measured.
    """
    return infer.micro_batch_tokens or (2048 if device.type == "cpu" else 16384)


def output_request(infer: InferConfig, model: ModelConfig, source: ModelSource) -> OutputRequest:
    """Say what the engine has to compute for `infer`.

    Raises:
        UserError: Contacts are asked of a model without a contact head, or logits of one without an LM head.
    """
    outputs = infer.outputs
    if "logits" in outputs:
        source.check_lm_head()
    head = source.contact_head if "contacts" in outputs else None
    if "contacts" in outputs and head is None:
        raise UserError(
            f"{source.path}: has no contact head, so there are no contacts; those that come from published "
            "ESM-2 weights have one"
        )
    layers = absolute_layers(infer, model) if {"residue", "pooled"} & set(outputs) else []
    return OutputRequest(tuple(layers), "logits" in outputs, head)
