"""Configures Megatron-Core's data parallelism, optimizer and learning-rate schedule for ESM-2."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from esm2mega.config.schema import ModelConfig, OptimConfig, ParallelConfig, Run, ScheduleConfig
from esm2mega.errors import UserError
from esm2mega.model.build import DTYPES
from esm2mega.model.esm2 import ESM2Model
from esm2mega.parallel.fp64 import keep_fp64
from esm2mega.parallel.initialize import Ranks
from esm2mega.train.losses import LossReduction
from esm2mega.train.step import MIN_LOSS_SCALE, TrainState


def wrap_data_parallel(
    chunks: list[ESM2Model], model: ModelConfig, parallel: ParallelConfig
) -> list[DistributedDataParallel]:
    """Wrap the chunks in Megatron-Core's data parallelism, and let the schedule finalise their gradients.

    Gradients of bf16 and fp16 models are kept and reduced in fp32. With the distributed optimizer they are
    reduced in pieces, each as soon as the backward pass has made it. That needs a gradient of every weight in
    every step, which a language model has and a user's head may not have.
    """
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = _finalize_with_exact_count
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=model.precision in ("bf16", "fp16"),
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.distributed_optimizer and all(type(c) is ESM2Model for c in chunks),
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    # By these the schedule keeps gradients from being reduced before the last micro-batch has added its own.
    without_reduction = [chunk.no_sync for chunk in wrapped]
    for chunk in chunks:
        chunk.config.no_sync_func = without_reduction if len(wrapped) > 1 else without_reduction[0]
    return wrapped


def train_state(
    run: Run,
    chunks: list[ESM2Model],
    loss: LossReduction,
    ranks: Ranks,
    on_gradients: Callable[[list[Any]], None] | None,
    scales: Mapping[torch.Tensor, float] | None = None,
) -> TrainState:
    """Make what a step needs from chunks whose weights are loaded and, where not trained, frozen.

    Args:
        run: The configuration.
        chunks: This rank's chunks.
        loss: The loss and its reduction.
        ranks: Where this process stands.
        on_gradients: See `TrainState`.
        scales: Factors of the learning rate by parameter, where they are not 1.
    """
    model = wrap_data_parallel(chunks, run.model, run.parallel)
    optimizer = build_optimizer(run.optim, run.schedule, run.model.precision, model, scales)
    schedule = build_schedule(run.schedule, run.optim, optimizer)
    seed = run.seed if run.drops_in_encoder else None
    return TrainState(
        model, optimizer, schedule, loss, ranks.device, on_gradients=on_gradients, dropout_seed=seed
    )


def _finalize_with_exact_count(model: list[Any], num_tokens: torch.Tensor, **kwargs: Any) -> None:
    """Reduce the gradients, and divide them by the global number of labels, without waiting for that.

    Megatron-Core 0.16.1 takes the number to the host to see whether it is above 0.
    """
    finalize_model_grads(model, None, **kwargs)
    # The quotient of an integer tensor would be in fp32; in fp64 it is exact enough for every precision.
    count = num_tokens.double()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() > 1:
        # Only the last stage of a pipeline has counted; its other stages get the number here …
        dist.broadcast(count, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    # … and every rank holds the sum over the ranks that the gradients are summed over: context-parallel ranks
    # count the same labels once each, as `esm2mega.model.context_parallel` says.
    dist.all_reduce(count, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    # Without any label the gradients are 0 and stay so.
    scaling = 1.0 / count.clamp(min=1.0)
    for chunk in model:
        chunk.scale_gradients(scaling)


def build_optimizer(
    config: OptimConfig,
    schedule: ScheduleConfig,
    precision: str,
    model: list[DistributedDataParallel],
    scales: Mapping[torch.Tensor, float] | None = None,
) -> MegatronOptimizer:
    """Make Adam with decoupled weight decay on matrices, and none on biases and LayerNorms.

    It is PyTorch's fused Adam on every machine. Parameters with a factor of the learning rate in `scales` are
    in groups of their own. The optimizer is distributed if `model` was wrapped for that. In fp16 it scales
    the loss, and the schedules of `model` are told to ask it by how much.

    Raises:
        UserError: The distributed optimizer was asked for in fp64 on a GPU.
    """
    distributed = model[0].ddp_config.use_distributed_optimizer
    if precision == "fp64" and distributed and next(model[0].parameters()).is_cuda:
        raise UserError(
            "parallel.distributed_optimizer=true has no fp64 on a GPU; "
            "set parallel.distributed_optimizer=false or model.precision=fp32"
        )
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.lr * schedule.min_lr_ratio,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        # Without clipping the norm is still wanted in the log: no norm exceeds infinity.
        clip_grad=config.clip_grad or math.inf,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        initial_loss_scale=config.initial_loss_scale,
        min_loss_scale=MIN_LOSS_SCALE,
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(
        settings,
        model,
        {**get_standard_config_overrides(settings), **_scaled_groups(settings, scales or {})},
        use_gloo_process_groups=distributed,
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            # One pass over the state, not eight: PyTorch's default, which Megatron-Core keeps, is unfused.
            for group in part.optimizer.param_groups:
                group["fused"] = True
    if precision == "fp64":
        keep_fp64(optimizer)
    if precision == "fp16":
        for chunk in model:
            chunk.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _scaled_groups(settings: OptimizerConfig, scales: Mapping[torch.Tensor, float]) -> dict[ParamKey, Any]:
    """Return, in Megatron-Core's form, which parameters have which bounds of the learning rate.

    Megatron-Core uses `lr_mult` to tell groups apart when a checkpoint is loaded; it does not multiply by it.
    """
    assert settings.lr is not None and settings.min_lr is not None
    return {
        ParamKey(
            predicate=ParamPredicate(
                f"learning rate x {factor}", lambda p, factor=factor: scales.get(p) == factor
            )
        ): {"max_lr": settings.lr * factor, "min_lr": settings.min_lr * factor, "lr_mult": factor}
        for factor in sorted(set(scales.values()))
    }


def build_schedule(
    config: ScheduleConfig, optim: OptimConfig, optimizer: MegatronOptimizer
) -> OptimizerParamScheduler:
    """Make the learning-rate schedule, which gives the rate of step s, counted from 0.

    With w warmup steps, d decay steps, peak p and floor m = ratio * p, the rate is ``p * s / w`` up to w, so
    the very first update has rate 0 as in the published recipe. After w, ``linear`` is a straight line from p
    at w to m at d, flat after d; ``cosine`` and ``cosine_plateau`` are half a cosine from p at w to m at d,
    flat after d (they differ in the default of d: the last step, or 90 % of it); ``constant`` stays at p.
    """
    style = {"linear": "linear", "cosine": "cosine", "cosine_plateau": "cosine", "constant": "constant"}[
        config.name
    ]
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.lr * config.min_lr_ratio,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(config.decay_steps or 0, config.warmup_steps + 1),
        lr_decay_style=style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        # Only the step is taken from a checkpoint; the shape follows the configuration of this start.
        override_opt_param_scheduler=True,
    )
