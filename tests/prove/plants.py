"""Errors of exchanges between processes, of attention in packs, and of what a resumed run takes up again.

Each function makes one for the duration of a training; `tests.prove.mutations` names the trial that finds it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from esm2mega.checkpoint import store
from esm2mega.model import attention, esm2, init
from esm2mega.train import step
from esm2mega.train.losses import LossReduction


def gradients_of_one_data_rank() -> AbstractContextManager[Any]:
    return patch.object(
        DistributedDataParallel, "finish_grad_sync", lambda self, *arguments, **keywords: None
    )


def gradients_averaged_over_ranks_too() -> AbstractContextManager[Any]:
    original = DistributedDataParallel.scale_gradients

    def twice(self: Any, factor: Any) -> None:
        original(self, factor / parallel_state.get_data_parallel_world_size())

    return patch.object(DistributedDataParallel, "scale_gradients", twice)


def row_parallel_output_not_reduced() -> AbstractContextManager[Any]:
    return patch(
        "megatron.core.tensor_parallel.layers.reduce_from_tensor_model_parallel_region",
        lambda output, *arguments, **keywords: output,
    )


def parts_of_the_sequence_swapped() -> AbstractContextManager[Any]:
    original = esm2.gather_from_sequence_parallel_region

    def swapped(*arguments: Any, **keywords: Any) -> Tensor:
        return torch.cat(original(*arguments, **keywords).chunk(2)[::-1])

    return patch.object(esm2, "gather_from_sequence_parallel_region", swapped)


def attention_across_proteins() -> AbstractContextManager[Any]:
    def whole_pack(q: Tensor, k: Tensor, v: Tensor, packed: Any, scale: float) -> Tensor:
        # [T, n/t, d] -> [1, n/t, T, d]
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first, scale=scale).squeeze(0).transpose(0, 1)

    return patch.dict(attention.KERNELS, sdpa=whole_pack)


def weights_of_other_ranks_stay_old() -> AbstractContextManager[Any]:
    return patch.object(
        DistributedDataParallel, "start_param_sync", lambda self, *arguments, **keywords: None
    )


def weights_drawn_by_each_rank() -> AbstractContextManager[Any]:
    original = init.draw

    def by_rank(name: str, parameter: Tensor, seed: int, sample: Any) -> Tensor:
        rank = parallel_state.get_tensor_model_parallel_rank()
        return original(name, parameter, seed + rank, sample)

    return patch.object(init, "draw", by_rank)


def dropout_keyed_by_rank() -> AbstractContextManager[Any]:
    original = step.dropout_keys

    def by_rank(seed: int, batch: Any) -> Tensor:
        return original(seed + torch.distributed.get_rank(), batch)

    return patch.object(step, "dropout_keys", by_rank)


def heads_numbered_on_each_rank() -> AbstractContextManager[Any]:
    return patch.object(
        attention, "heads_of_this_rank", lambda count, device: torch.arange(count, device=device)
    )


def evaluation_of_one_data_rank() -> AbstractContextManager[Any]:
    original = LossReduction.means

    def of_the_first(self: LossReduction, reports: Any, device: torch.device) -> dict[str, float]:
        alone = torch.is_grad_enabled() or parallel_state.get_data_parallel_rank() == 0
        return original(self, reports if alone else [], device)

    return patch.object(LossReduction, "means", of_the_first)


def schedule_begins_again() -> AbstractContextManager[Any]:
    return patch.object(OptimizerParamScheduler, "load_state_dict", lambda self, state: None)


def moments_lost_by_resuming() -> AbstractContextManager[Any]:
    original = store._load_optimizer

    def without_moments(optimizer: Any, state: Any) -> None:
        original(optimizer, state)
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            for of_parameter in part.optimizer.state.values():
                of_parameter["exp_avg"].zero_()

    return patch.object(store, "_load_optimizer", without_moments)
