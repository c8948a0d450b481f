"""Runs packs of windows through the model, in one process or at any other layout.

Legend: ``T`` tokens of a pack, ``h`` hidden size, ``m`` tokens that get logits, ``v`` vocabulary (33), and
``l`` residues of a window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from esm2mega.batch import host_borders
from esm2mega.config.schema import Run
from esm2mega.data.stream.packing import plan_packs
from esm2mega.infer.maps import ContactMap
from esm2mega.infer.source import ModelSource
from esm2mega.infer.windows import Window
from esm2mega.model.build import build_model
from esm2mega.model.contact_maps import ContactMaps, Span
from esm2mega.model.contact_tiles import ContactTiles
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.hidden_states import hidden_states
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.context_collectives import gather_for_all
from esm2mega.parallel.initialize import Ranks
from esm2mega.parcel import Parcel
from esm2mega.vocabulary import PAD

_ROWS_PER_THREAD = 32
"""Sets a least number of rows, since a matrix product of few rows takes a kernel that adds in another order.

Measured with MKL 2024.2 on 1 and 2 threads: from 4 rows per thread on, a row's bits do not depend on the
number of rows.
"""

_IN_FLIGHT = 4
"""Sets how many packs per pipeline stage are handed to the schedule at once."""


@dataclass(frozen=True)
class OutputRequest:
    """Says what to compute.

    Attributes:
        layers: Layers whose hidden states are wanted, numbered as in `esm2mega.model.hidden_states`.
        logits: Whether the head runs.
        contact_head: Weight of each attention map, layer-major, and bias; None for no contacts.
    """

    layers: tuple[int, ...] = ()
    logits: bool = False
    contact_head: tuple[Tensor, float] | None = None


@dataclass(frozen=True)
class WindowPack:
    """Holds windows that pass through the model together.

    Attributes:
        windows: The stretch of its protein that each window covers.
        tokens: Their token ids back to back, uint8 ``[sum of tokens]``.
        logit_positions: Tokens that get logits, ascending, ``[m]``; None for all.
    """

    windows: Sequence[Window]
    tokens: npt.NDArray[np.uint8]
    logit_positions: npt.NDArray[np.int64] | None = None

    def logit_counts(self, lengths: Sequence[int]) -> list[int] | None:
        """Count the tokens that get logits in each of the sequences of these lengths; None if all do."""
        if self.logit_positions is None:
            return None
        borders = np.concatenate([[0], np.cumsum(lengths)])
        return np.diff(np.searchsorted(self.logit_positions, borders)).tolist()


@dataclass
class PackOutputs:
    """Holds the outputs of a pack that this rank has.

    Attributes:
        hidden: Hidden states by layer, ``[T, h]``; only the layers of this pipeline stage.
        logits: Logits, ``[m, v]``; None before the last stage, or if they are not wanted.
        contacts: Contact probabilities of each window, ``[l, l]``, of long ones in tiles; empty before the
            last stage, or if they are not wanted.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    contacts: Sequence[ContactMap] = ()

    def is_finite(self) -> bool:
        """Return whether all values are finite; it waits for the device once, whatever their number."""
        maps = [values for values in self.contacts if isinstance(values, Tensor)]
        tensors = [*self.hidden.values(), *maps, *([] if self.logits is None else [self.logits])]
        if not all(values.is_finite for values in self.contacts if isinstance(values, ContactTiles)):
            return False
        return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def group_windows(num_tokens: npt.ArrayLike, capacity: int) -> list[list[int]]:
    """Choose which windows share a pack.

    Args:
        num_tokens: Number of tokens of each window.
        capacity: Most tokens of a pack with several windows.

    Returns:
        The indices of the windows of each pack; windows of more tokens are alone.
    """
    lengths = np.asarray(num_tokens, dtype=np.int64)
    alone, others = np.flatnonzero(lengths > capacity), np.flatnonzero(lengths <= capacity)
    pack_of = plan_packs(lengths[others], capacity)
    order = np.argsort(pack_of, kind="stable")
    borders = np.flatnonzero(np.diff(pack_of[order])) + 1
    packs = [others[places].tolist() for places in np.split(order, borders)] if len(order) else []
    return [[window] for window in alone.tolist()] + packs


def load_model(source: ModelSource, run: Run, ranks: Ranks) -> ESM2Model:
    """Build this rank's stage with the weights of `source`, ready for inference."""
    chunks = build_model(run.model, run.parallel, ranks.device, run.seed, has_lora=run.lora.rank is not None)
    source.load(chunks)
    (model,) = chunks
    # Without gradients Megatron-Core adds biases and residuals in place.
    return model.eval().requires_grad_(False)


class RunsPacks(Protocol):
    """Runs packs, and yields the outputs of each, in order; packs of `micro_batch_tokens` suit it."""

    micro_batch_tokens: int

    def run(self, packs: Sequence[WindowPack]) -> Iterator[PackOutputs]: ...


class Engine:
    """Runs packs through a model; all ranks of one model replica run the same packs."""

    def __init__(
        self,
        model: ESM2Model,
        ranks: Ranks,
        request: OutputRequest,
        micro_batch_tokens: int,
        scratch: Path | None = None,
    ) -> None:
        """Set the model and what it computes.

        Args:
            model: This rank's stage, from `load_model`.
            ranks: Ranks of this process.
            request: What to compute.
            micro_batch_tokens: Tokens of a pack; with a pipeline, smaller ones are padded to it.
            scratch: Folder for the contacts of long proteins while they are computed; None for the system's
                folder of temporary files.
        """
        self._model, self._ranks = model, ranks
        if request.contact_head is not None:
            # Sent once: each copy of pageable memory waits for the device.
            weight, bias = request.contact_head
            request = replace(request, contact_head=(weight.to(ranks.device), bias))
        self._request = request
        self.micro_batch_tokens = micro_batch_tokens
        self._scratch = scratch

    def run(self, packs: Sequence[WindowPack]) -> Iterator[PackOutputs]:
        """Yield the outputs of each pack, in order."""
        with self._collectors() as (hidden, maps), torch.inference_mode():
            if self._ranks.pp_size == 1:
                for pack in packs:
                    outputs, _ = self._forward(self._model, pack, self._padded(pack), hidden, maps)
                    self._finish_contacts(outputs)
                    yield outputs
                return
            for group in self._groups(packs):
                for outputs in self._pipeline(group, hidden, maps):
                    self._finish_contacts(outputs)
                    yield outputs

    def _groups(self, packs: Sequence[WindowPack]) -> list[list[WindowPack]]:
        """Divide packs into those that pass through the pipeline together, in order.

        Stages send each other tensors of one size, so a pack of more tokens than usual passes alone.
        """
        groups: list[list[WindowPack]] = []
        room = 0
        for pack in packs:
            is_long = len(pack.tokens) > self.micro_batch_tokens
            if is_long or not room:
                groups.append([])
                room = _IN_FLIGHT * self._ranks.pp_size
            groups[-1].append(pack)
            room = 0 if is_long else room - 1
        return groups

    @contextmanager
    def _collectors(self) -> Iterator[tuple[dict[int, Tensor], ContactMaps | None]]:
        with ExitStack() as stack:
            maps = None
            if self._request.contact_head is not None:
                maps = ContactMaps(
                    self._model.encoder.layers, functools.partial(ContactTiles, folder=self._scratch)
                )
                stack.callback(maps.remove)
            yield stack.enter_context(hidden_states(self._model, self._request.layers)), maps

    def _forward(
        self,
        model: ESM2Model,
        pack: WindowPack,
        num_tokens: int,
        hidden: dict[int, Tensor],
        maps: ContactMaps | None,
    ) -> tuple[PackOutputs, Tensor]:
        """Return the outputs of a pack that is padded to `num_tokens`, and the tensor for the next stage."""
        # Where only some tokens get logits, the last layer computes no other tokens.
        assert pack.logit_positions is None or not self._request.layers
        device = self._ranks.device
        lengths = [window.num_tokens for window in pack.windows]
        tail = num_tokens - sum(lengths)
        tokens = np.pad(pack.tokens, (0, tail), constant_values=PAD).astype(np.int64)
        lengths += [tail] * (tail > 0)
        counts = pack.logit_counts(lengths)
        sent = [torch.from_numpy(tokens), host_borders(lengths, counts)]
        if pack.logit_positions is not None:
            sent.append(torch.from_numpy(pack.logit_positions))
        ids, borders, *rows = Parcel.of(sent).to(device)
        packed = PackedSequences.from_lengths(lengths, device, counts, borders, pack.logit_positions)
        if maps is not None:
            assert self._request.contact_head is not None
            starts = np.cumsum([0, *lengths]).tolist()
            spans = [
                Span(start, window.num_tokens, window.residue_tokens)
                for start, window in zip(starts, pack.windows, strict=False)
            ]
            weight = self._request.contact_head[0].view(-1, model.config.num_attention_heads)
            maps.begin(spans, dict(enumerate(weight, start=1)))
        outputs = PackOutputs()
        if self._request.logits or not model.post_process:
            result = model(ids, packed, rows[0] if rows else None)
            outputs.logits = result if model.post_process else None
        else:
            result = model.encode(ids, packed)
        outputs.hidden = {layer: self._of_all_tokens(states) for layer, states in hidden.items()}
        outputs.contacts = [] if maps is None else list(maps.sums)
        return outputs, result

    def _of_all_tokens(self, states: Tensor) -> Tensor:
        """Gather hidden states over the context-parallel group: ``[T/c, h] -> [T, h]``."""
        return gather_for_all(states) if self._ranks.cp_size > 1 else states

    def _padded(self, pack: WindowPack) -> int:
        smallest = _ROWS_PER_THREAD * torch.get_num_threads() if self._ranks.device.type == "cpu" else 1
        return self._in_equal_parts(max(len(pack.tokens), smallest * self._ranks.cp_size))

    def _in_equal_parts(self, num_tokens: int) -> int:
        """Return the least number of tokens from there on that context-parallel processes can divide."""
        size = self._ranks.cp_size
        return -(-num_tokens // size) * size

    def _pipeline(
        self, packs: Sequence[WindowPack], hidden: dict[int, Tensor], maps: ContactMaps | None
    ) -> list[PackOutputs]:
        collected: list[PackOutputs] = []
        num_tokens = self._in_equal_parts(max(self.micro_batch_tokens, len(packs[0].tokens)))

        def step(waiting: Iterator[WindowPack], model: Any) -> tuple[Tensor, Callable[..., Tensor]]:
            outputs, result = self._forward(model, next(waiting), num_tokens, hidden, maps)
            collected.append(outputs)
            return result, lambda output, non_loss_data=True: output.new_zeros(1)

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(packs),
            model=[self._model],
            num_microbatches=len(packs),
            seq_length=num_tokens,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return collected

    def _finish_contacts(self, outputs: PackOutputs) -> None:
        """Add up the shares of all heads and layers; the last stage turns the sums into probabilities.

        The all-reduce runs over the tensor-, the context- and then the pipeline-parallel group.
        """
        if self._request.contact_head is None:
            return
        bias = self._request.contact_head[1]

        def finished(logits: Tensor) -> Tensor:
            if self._ranks.tp_size > 1:
                dist.all_reduce(logits, group=parallel_state.get_tensor_model_parallel_group())
            if self._ranks.cp_size > 1:
                dist.all_reduce(logits, group=parallel_state.get_context_parallel_group())
            if self._ranks.pp_size > 1:
                dist.all_reduce(logits, group=parallel_state.get_pipeline_model_parallel_group())
            return torch.sigmoid(logits + bias)

        maps: list[ContactMap] = []
        for sums in outputs.contacts:
            if isinstance(sums, ContactTiles):
                sums.transform(finished)
                maps.append(sums)
            else:
                assert isinstance(sums, Tensor)
                maps.append(finished(sums))
        outputs.contacts = maps if self._model.post_process else []
