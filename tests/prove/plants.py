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
from esm2mega.model import attention, context_parallel, esm2, init
from esm2mega.train import optimizer, step
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
    return patch.object(attention, "first_head_of_this_rank", lambda count: 0)


def labels_counted_by_one_context_rank() -> AbstractContextManager[Any]:
    """Labels are counted over data-parallel ranks alone, as gradients are not."""
    original = parallel_state.get_data_parallel_group

    def without_context(with_context_parallel: bool = False, **keywords: Any) -> Any:
        return original(**keywords)

    return patch.object(
        optimizer, "parallel_state", _With(parallel_state, get_data_parallel_group=without_context)
    )


def keys_of_a_neighbour() -> AbstractContextManager[Any]:
    """Queries attend to all keys that a rank has fetched, those of other proteins too."""
    original = context_parallel._between

    def joined(*arguments: Any) -> Any:
        local = original(*arguments)
        keys, queries = sum(local.seqlens), sum(local.query_lens)
        whole = context_parallel.PackedSequences.from_lengths([keys]).with_queries([queries])
        if local.rows is not None:
            whole.rows, whole.row_counts = local.rows, (len(local.rows),)
        return whole

    return patch.object(context_parallel, "_between", joined)


def positions_begin_anew_in_each_part() -> AbstractContextManager[Any]:
    original = esm2.own_part

    def first_part(values: Tensor, config: Any, dim: int = 0) -> Tensor:
        return (
            original(values, config, dim) if dim == 0 else values.chunk(config.context_parallel_size, dim)[0]
        )

    return patch.object(esm2, "own_part", first_part)


def gradients_of_fetched_keys_lost() -> AbstractContextManager[Any]:
    def of_own_alone(ctx: Any, *gradients: Tensor) -> Any:
        pieces = gradients[0].split([rows.stop - rows.start for rows in ctx.given])
        rank = parallel_state.get_context_parallel_rank()
        own = gradients[0].new_zeros(ctx.length, *gradients[0].shape[1:])
        own[ctx.given[rank]] = pieces[rank]
        return own, None

    return patch.object(context_parallel._Pick, "backward", staticmethod(of_own_alone))


def _counted_once(module: Any, collective: str) -> AbstractContextManager[Any]:
    original = getattr(module, collective)

    def divided(own: Tensor) -> Tensor:
        result = original(own)
        if result.requires_grad:
            result.register_hook(lambda gradient: gradient / parallel_state.get_context_parallel_world_size())
        return result

    return patch.object(module, collective, divided)


def gradient_of_what_all_compute_counted_once() -> AbstractContextManager[Any]:
    return _counted_once(context_parallel, "sum_for_all")


def gradient_of_gathered_states_counted_once() -> AbstractContextManager[Any]:
    return _counted_once(esm2, "gather_for_all")


def dropout_of_the_first_part() -> AbstractContextManager[Any]:
    original = esm2.PackedSequences.with_share
    return patch.object(esm2.PackedSequences, "with_share", lambda self, size, rank: original(self, size, 0))


class _With:
    """A module with some of its functions replaced, for one of the modules that use it."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module, self._replaced = module, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(self._module, name)


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
