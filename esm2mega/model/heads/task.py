"""Defines ESM-2 with the head of a task instead of the masked-language-model head.

Legend: ``T`` tokens, ``n`` proteins, ``R`` residues and ``P`` pairs of residues of a pack, ``h`` hidden size,
``L`` residues and ``s`` tokens of a protein, ``k`` targets or classes, ``V`` values sent from stage to stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from esm2mega.batch import Segments
from esm2mega.errors import UserError
from esm2mega.model import pipeline_payload
from esm2mega.model.esm2 import ESM2Model, shares_of_tokens
from esm2mega.model.packed import PackedSequences

MakeHead = Callable[[Any, torch.device], Any]
"""Makes a `esm2mega.model.heads.TaskHead` from Megatron-Core's configuration, on a device."""

MakeModel = Callable[..., "ESM2ForTask"]
"""Makes a chunk from the arguments of `ESM2Model` and `make_head`."""


class ESM2ForTask(ESM2Model):
    """Computes the encoder of ESM-2 and the head of a task.

    The last stage has ``head``, replicated over the tensor-parallel group. If the head spans stages, each of
    them has a part.

    Attributes:
        frozen: Whether only weights of the head are trained. Then the features of a protein never change:
            they are computed the first time the protein is seen and kept in memory, ``[h]`` of a protein, or
            ``[L, h]`` or ``[s, h]`` for heads that read residues or tokens. Attention maps are too large to
            be kept.
    """

    has_lm_head = False

    def __init__(self, *stage: Any, make_head: MakeHead) -> None:
        """Build the stage.

        Args:
            *stage: Arguments of `ESM2Model`.
            make_head: Makes the head; called on every stage, though only stages that need the head keep it.
        """
        self._make_head = make_head
        self.frozen = False
        self._features: dict[bytes, Tensor | None] = {}
        super().__init__(*stage)

    def _build_head(self, config: Any, device: torch.device) -> None:
        head = self._make_head(config, device)
        self.head: Any = head if self.post_process or head.spans_stages else None
        if self.head is not None:
            self.head.watch(self.encoder.layers, self.post_process)

    def _tie_embeddings(self) -> None:
        self.share_embeddings_and_output_weights = False
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Describe the weights for a checkpoint, without the output layer that the parent class expects."""
        return MegatronModule.sharded_state_dict(self, *args, **kwargs)

    def forward(self, input_ids: Tensor, packed: PackedSequences, segments: Segments) -> Tensor:  # type: ignore[override]
        """Compute hidden states for the next stage, or predictions on the last one.

        Args:
            input_ids: int64 ``[T]``; read by the first stage only.
            packed: Borders of the sequences.
            segments: Where proteins and residues lie.

        Returns:
            Hidden states in the layout of `encode`, followed by the `carried_rows` of a head that spans
            stages; or predictions, ``[n, k]`` of proteins, ``[R, k]`` of residues or ``[P, 1]`` of pairs, the
            same on every tensor- and context-parallel rank.
        """
        head = self.head
        if head is not None:
            head.begin(segments, self._take_carried(segments))
        if self.frozen and (head is None or head.reads_states):
            return self._forward_frozen(input_ids, packed, segments)
        hidden_states = self.encode(input_ids, packed)
        if self.post_process:
            # [T, 1, h] -> [T, h]
            return head(self.gathered(hidden_states)[:, 0], segments)
        if head is None:
            return hidden_states
        return pipeline_payload.append(hidden_states, head.carry(segments), self.carried_rows)

    def rows_to_carry(self, head_inputs: Segments) -> int:
        if self.config.pipeline_model_parallel_size == 1 or self.head is None or not self.head.spans_stages:
            return 0
        count = self.head.num_carried(head_inputs)
        return pipeline_payload.carried_rows(count, self.config.hidden_size, self.config.params_dtype)

    def _take_carried(self, segments: Segments) -> Tensor | None:
        """Return what the previous stage sent besides hidden states, ``[V]``; None if there is nothing.

        It is removed from the input of the layers.
        """
        received = self.encoder.input_tensor
        if not self.carried_rows or received is None:
            return None
        count = self.head.num_carried(segments)
        hidden_states, carried = pipeline_payload.split(received, count, self.carried_rows)
        self.encoder.set_input_tensor(hidden_states)
        return carried

    def forget_features(self) -> None:
        """Free the features that were kept while `frozen`."""
        self._features.clear()

    def _forward_frozen(self, input_ids: Tensor, packed: PackedSequences, segments: Segments) -> Tensor:
        """Compute `forward` with the features that are kept; stages of a pipeline then exchange zeros.

        All stages and ranks of a model see the same proteins in the same order, so they agree on which are
        known.
        """
        received = self.encoder.input_tensor
        known = all(tokens in self._features for tokens in segments.tokens)
        with torch.no_grad():
            if not known:
                hidden_states = self.encode(input_ids, packed)
                features = None
                if self.post_process:
                    features = self.head.features(self.gathered(hidden_states)[:, 0], segments)
                self._keep(features, segments)
            elif not self.post_process:
                hidden_states = self._zeros(input_ids.numel() // shares_of_tokens(self.config), 1)
        if not self.post_process:
            return self._passed(hidden_states, received)
        kept = [value for tokens in segments.tokens if (value := self._features[tokens]) is not None]
        features = torch.cat(kept) if kept else self._zeros(0)
        return self.head.predict(self._passed(features, received), segments)

    def _zeros(self, *shape: int) -> Tensor:
        """Return zeros ``[*shape, h]``."""
        parameter = next(self.encoder.parameters())
        return parameter.new_zeros(*shape, self.config.hidden_size)

    def _keep(self, features: Tensor | None, segments: Segments) -> None:
        """Keep the features of proteins, ``[1, h]``, ``[L, h]`` or ``[s, h]``; on other stages, mark them."""
        if features is None:
            self._features.update(dict.fromkeys(segments.tokens))
            return
        of_tokens = [len(text) for text in segments.tokens]
        possible = ([1] * segments.num_proteins, segments.residue_counts, of_tokens)
        counts = next((counts for counts in possible if sum(counts) == len(features)), None)
        if counts is None:
            raise UserError(
                f"{type(self.head).__name__}.features returned {list(features.shape)}; a frozen encoder "
                f"keeps a row for each of {segments.num_proteins} proteins, of {len(segments.owners)} "
                f"residues or of {sum(of_tokens)} tokens: return such rows, or set finetune.mode=full"
            )
        # Copies: a view would keep the whole pack in memory.
        for tokens, rows in zip(segments.tokens, features.split(counts), strict=True):
            self._features[tokens] = rows.clone()

    @staticmethod
    def _passed(output: Tensor, received: Tensor | None) -> Tensor:
        """Return `output`, and give the previous stage, whose input was not used, a gradient of zero."""
        return output if received is None else _ZeroGradient.apply(output, received)


class _ZeroGradient(torch.autograd.Function):
    """Returns its first argument, and gives the second a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, received: Tensor) -> Tensor:
        ctx.save_for_backward(received)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (received,) = ctx.saved_tensors
        return None, torch.zeros_like(received)
