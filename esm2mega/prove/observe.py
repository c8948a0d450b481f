"""Records what one process sees of a training: its part of every gradient and of the final weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

# A part of a whole tensor: the dimension that is split over the tensor-parallel group (-1 for none), the
# shape of this rank's slice, the element of the flattened slice at which the values begin, and the values.
Piece = tuple[int, tuple[int, ...], int, Tensor]


class Observer:
    """Collects what a rank really holds, without communication, so that copies which went apart are seen."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Piece]] = []
        self._model: list[Any] = []
        self._ranks = (0, 1)

    def __call__(self, model: list[Any]) -> None:
        """Keep a copy of the gradients (see `esm2mega.train.step.TrainState`)."""
        self._model = model
        self._ranks = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        self.gradients.append({})
        for chunk in model:
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                sharded = buffer.ddp_config.use_distributed_optimizer
                for bucket in buffer.buckets:
                    self._take_bucket(chunk, bucket, buffer.data_parallel_group if sharded else None)

    def _take_bucket(self, chunk: Any, bucket: Any, group: Any) -> None:
        """Copy the gradients of a bucket; with `group`, only the share that this rank's optimizer reads."""
        (model,) = unwrap_model([chunk])
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        share = bucket.grad_data.numel() // (group.size() if group else 1)
        first = bucket.grad_data.storage_offset() + share * (group.rank() if group else 0)
        for parameter in bucket.params:
            gradient = parameter.main_grad
            begin = max(first - gradient.storage_offset(), 0)
            end = min(first + share - gradient.storage_offset(), gradient.numel())
            if begin < end:
                values = gradient.flatten()[begin:end].clone()
                name = model.global_parameter_name(names[id(parameter)])
                self.gradients[-1][name] = (*_split_of(parameter), begin, values)

    def save(self, path: Path) -> None:
        """Write the observations, with the weights as they are now."""
        weights: dict[str, Piece] = {}
        for model in unwrap_model(self._model):
            for name, parameter in model.named_parameters():
                values = parameter.detach().flatten()
                weights[model.global_parameter_name(name)] = (*_split_of(parameter), 0, values)
        rank, size = self._ranks
        torch.save({"tp_rank": rank, "tp_size": size, "gradients": self.gradients, "weights": weights}, path)


def _split_of(parameter: Tensor) -> tuple[int, tuple[int, ...]]:
    split = getattr(parameter, "tensor_model_parallel", False)
    return (int(parameter.partition_dim) if split else -1), tuple(parameter.shape)  # type: ignore[attr-defined]
