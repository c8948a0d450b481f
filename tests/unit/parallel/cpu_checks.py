"""What each row of `esm2mega.parallel.cpu.ROWS` must achieve: a check within process groups for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    verify_global_md_reuse,
)
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.api import _wrap_exception
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.utils import _DistWrapper

from esm2mega.batch import PackedBatch
from esm2mega.config.schema import ModelConfig, OptimConfig, ParallelConfig, ScheduleConfig
from esm2mega.model.build import DTYPES, build_model, transformer_config
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.initialize import Ranks
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.optimizer import build_optimizer, wrap_data_parallel
from esm2mega.train.step import run_schedule

CPU = torch.device("cpu")
ONE = ParallelConfig()
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
SHARDED = ParallelConfig(distributed_optimizer=True)


@dataclass(frozen=True)
class Check:
    """What a row must achieve: `function` raises unless it does, on each rank of a world as in `parallel`."""

    function: Callable[[Ranks], None]
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def world_size(self) -> int:
        return self.parallel.tensor_model_parallel_size * self.parallel.pipeline_model_parallel_size


SHAPE = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, layer_spec="local"
)


def _model(parallel: ParallelConfig = ONE, precision: str = "fp32") -> Any:
    (model,) = build_model(replace(SHAPE, precision=precision), parallel, CPU, seed=1)
    return model


def _optimizer(model: Any, parallel: ParallelConfig, precision: str) -> MegatronOptimizer:
    wrapped = wrap_data_parallel([model], ModelConfig(precision=precision), parallel)
    return build_optimizer(OptimConfig(), ScheduleConfig(), precision, wrapped)


def _single(optimizer: MegatronOptimizer) -> Any:
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return part


def token_counter(ranks: Ranks) -> None:
    model = _model()
    counters: list[torch.Tensor] = []
    model.config.finalize_model_grads_func = lambda chunks, num_tokens, **kwargs: counters.append(num_tokens)
    batch = PackedBatch(
        input_ids=torch.tensor([0, 5, 32, 2]),
        cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
        seqlens=[4],
        max_seqlen=4,
        label_positions=torch.tensor([1, 2]),
        labels=torch.tensor([5, 6]),
        label_counts=[2],
        num_tokens=4,
        num_residues=2,
        num_sequences=1,
    )
    run_schedule([model], MLMLossReduction(), [batch, batch], CPU, forward_only=False)
    (counter,) = counters
    assert counter.device == CPU
    assert int(counter) == 4


def pipeline_message(ranks: Ranks) -> None:
    communicator = P2PCommunicator(
        parallel_state.get_pipeline_model_parallel_group(), transformer_config(SHAPE, PP2, CPU, "sdpa")
    )
    message = torch.arange(12.0).reshape(3, 1, 4)
    if ranks.pp_rank == 0:
        communicator.send_forward(message, is_last_stage=False)
    else:
        received = communicator.recv_forward(message.shape, is_first_stage=False)
        assert received.device == CPU
        assert torch.equal(received, message)


def memory_buffer(ranks: Ranks) -> None:
    tensor = parallel_state.get_global_memory_buffer().get_tensor([2, 3], torch.float64, "mpu")
    assert (tensor.device, tensor.shape, tensor.dtype) == (CPU, (2, 3), torch.float64)


def sequence_parallel_linear(ranks: Ranks) -> None:
    linear = _model(TP2).encoder.layers[0].mlp.linear_fc1
    own = torch.full((3, 1, 16), 1.0 + ranks.tp_rank, requires_grad=True)
    output, _ = linear(own)
    output.sum().backward()
    assert output.shape == (6, 1, 16)
    # d/dx of the sum over all columns, which are spread over the ranks
    column_sums = linear.weight.detach().sum(dim=0)
    dist.all_reduce(column_sums)
    assert torch.allclose(own.grad, column_sums.expand_as(own))


def sequence_gather(ranks: Ranks) -> None:
    whole = gather_from_sequence_parallel_region(torch.full((1, 2), float(ranks.tp_rank)))
    assert whole.device == CPU
    assert whole.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def tracker_records_seed(ranks: Ranks) -> None:
    before = torch.get_rng_state()
    get_cuda_rng_tracker().add("check", 77)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(
        get_cuda_rng_tracker().get_states()["check"], torch.Generator().manual_seed(77).get_state()
    )


def tracker_goes_on(ranks: Ranks) -> None:
    """The second fork draws on where the first stopped."""
    get_cuda_rng_tracker().add("check", 77)
    drawn = []
    for _ in range(2):
        with get_cuda_rng_tracker().fork("check"):
            drawn.append(torch.rand(3))
    assert torch.equal(torch.cat(drawn), _rand(77, 3, 3))


def tracker_leaves_others_alone(ranks: Ranks) -> None:
    """What is drawn after a fork does not depend on what was drawn within it."""
    get_cuda_rng_tracker().add("check", 77)
    torch.manual_seed(5)
    first = torch.rand(3)
    with get_cuda_rng_tracker().fork("check"):
        assert torch.equal(torch.rand(3), _rand(77, 3))
    assert torch.equal(torch.cat((first, torch.rand(3))), _rand(5, 3, 3))


def _rand(seed: int, *sizes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(size, generator=generator) for size in sizes])


def tied_embedding(ranks: Ranks) -> None:
    weight = _model(PP2).shared_embedding_or_output_weight().data
    assert weight.device == CPU
    both = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(both, weight)
    assert weight.any()
    assert torch.equal(*both)


def gradient_buffers(ranks: Ranks) -> None:
    model = _model()
    (wrapped,) = wrap_data_parallel([model], ModelConfig(), ONE)
    wrapped.zero_grad_buffer()
    wrapped(torch.tensor([0, 5, 6, 2]), PackedSequences.from_lengths([4])).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.main_grad.device == CPU, name
        assert parameter.main_grad.any(), name


def loss_scale(ranks: Ranks) -> None:
    for precision in ("fp32", "bf16"):
        scale = _single(_optimizer(_model(precision=precision), ONE, precision)).get_loss_scale()
        assert scale.device == CPU
        assert scale.tolist() == [1.0]


def dynamic_loss_scale(ranks: Ranks) -> None:
    part = _single(_optimizer(_model(precision="fp16"), ONE, "fp16"))
    part.grad_scaler.update(True)
    part.grad_scaler.update(True)
    assert part.get_loss_scale().device == CPU
    assert part.get_loss_scale().tolist() == [2048.0]


def restored_loss_scale(ranks: Ranks) -> None:
    scaler = _single(_optimizer(_model(precision="fp16"), ONE, "fp16")).grad_scaler
    state = {"scale": torch.tensor([8.0]), "growth_tracker": 3, "hysteresis_tracker": 1}
    scaler.load_state_dict(state)
    assert scaler.state_dict() == state


def main_copies(ranks: Ranks, precision: str = "bf16") -> None:
    part = _single(_optimizer(_model(precision=precision), ONE, precision))
    models = [p for group in part.float16_groups for p in group]
    copies = [p for group in part.fp32_from_float16_groups for p in group]
    assert len(models) == len(copies) > 20
    for parameter, copied in zip(models, copies, strict=True):
        assert (parameter.dtype, copied.dtype, copied.device) == (DTYPES[precision], torch.float32, CPU)
        assert torch.equal(parameter.float(), copied)


def _with_fp32_norm() -> Any:
    model = _model(precision="bf16")
    model.encoder.final_layernorm.float()
    return model


def fp32_in_bf16_model(ranks: Ranks) -> None:
    model = _with_fp32_norm()
    part = _single(_optimizer(model, ONE, "bf16"))
    kept = {id(p) for group in part.fp32_from_fp32_groups for p in group}
    assert kept == {id(p) for p in model.encoder.final_layernorm.parameters()}


def empty_chain(ranks: Ranks) -> None:
    scale = ChainedOptimizer([]).get_loss_scale()
    assert scale.device == CPU
    assert scale.tolist() == [1.0]


def gradient_norm(ranks: Ranks) -> None:
    group = parallel_state.get_model_parallel_group()
    assert get_grad_norm_fp32([], grad_stats_parallel_group=group) == 0.0
    assert (
        get_grad_norm_fp32([torch.tensor([3.0]), torch.tensor([4.0])], grad_stats_parallel_group=group) == 5.0
    )
    infinity = get_grad_norm_fp32(
        [torch.tensor([3.0, -4.0])], norm_type=float("inf"), grad_stats_parallel_group=group
    )
    assert infinity == 4.0


def clipping(ranks: Ranks) -> None:
    for dtype in (torch.float32, torch.float64):
        parameter = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        parameter.grad = torch.tensor([3.0, 4.0], dtype=dtype)
        clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
        assert torch.allclose(parameter.grad, torch.tensor([0.6, 0.8], dtype=dtype))
    half = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    try:
        clip_grad_by_total_norm_fp32([half], max_norm=1.0, total_norm=5.0)
    except AssertionError:
        return
    raise RuntimeError("a bf16 gradient was clipped")


def half_shards(ranks: Ranks, precision: str) -> None:
    part = _single(_optimizer(_model(precision=precision), SHARDED, precision))
    shards = [p for group in part.shard_fp32_from_float16_groups for p in group]
    assert len(shards) > 20
    assert {(p.dtype, p.device) for p in shards} == {(torch.float32, CPU)}


def fp32_shards(ranks: Ranks) -> None:
    part = _single(_optimizer(_with_fp32_norm(), SHARDED, "bf16"))
    shards = [p for group in part.shard_fp32_groups for p in group]
    whole = [p for group in part.model_fp32_groups for p in group]
    assert [s.untyped_storage().data_ptr() for s in shards] == [p.untyped_storage().data_ptr() for p in whole]
    assert len(shards) == 2


def fresh_shard_states(ranks: Ranks) -> None:
    """An optimizer that has made no step yet allocates its states before they are loaded."""
    stepped, part = (_single(_optimizer(_model(), SHARDED, "fp32")) for _ in range(2))
    for parameter in stepped.get_parameters():
        parameter.grad = torch.ones_like(parameter)
    stepped.optimizer.step()
    part.load_state_dict(stepped.state_dict())
    moments = [state["exp_avg"] for state in part.optimizer.state.values()]
    assert len(moments) > 20
    assert {tensor.device for tensor in moments} == {CPU}


def preloading(ranks: Ranks) -> None:
    tensor = torch.arange(3.0)
    ((file, key, (raw, [(item, loaded)])),) = FileSystemWriterAsync.preload_tensors(
        [("file", "key", ([], [(None, tensor)]))], non_blocking=True
    )
    assert torch.equal(loaded, tensor)


def plan_reuse(ranks: Ranks) -> None:
    plan = SavePlan(items=[])
    wrapper = _DistWrapper(group=None, use_dist=True, coordinator_rank=0)
    assert verify_global_md_reuse([plan] * ranks.world_size, plan, ranks.rank, wrapper) is True
    # One rank with another plan is enough that no rank may use the cached one.
    other = SavePlan(items=[], planner_data="other")
    mine = other if ranks.rank == 1 else plan
    assert verify_global_md_reuse([plan] * ranks.world_size, mine, ranks.rank, wrapper) is False


def failed_write(ranks: Ranks) -> None:
    """A write that failed on one rank is an error on both."""
    failure = _wrap_exception(OSError("disk full")) if ranks.rank == 1 else []
    writer = SimpleNamespace(retrieve_write_results=lambda: failure, finish=lambda *args: None)
    wrapper = _DistWrapper(group=None, use_dist=True, coordinator_rank=0)
    try:
        save_state_dict_async_finalize(writer, SimpleNamespace(), wrapper)
    except CheckpointException:
        return
    raise AssertionError(f"rank {ranks.rank} did not learn of the failed write")


def finished_write(ranks: Ranks) -> None:
    """A write is finished when it is finished on both ranks."""
    caller = TemporalAsyncCaller()
    assert not caller.sync_all_async_calls(is_alive=ranks.rank)
    assert caller.sync_all_async_calls(is_alive=0)


CHECKS: dict[str, Check] = {
    "Constant megatron.core.pipeline_parallel.schedules cuda": Check(token_counter),
    "Namespace megatron.core.pipeline_parallel.p2p_communication": Check(pipeline_message, PP2),
    "Namespace megatron.core.utils": Check(memory_buffer),
    "Namespace megatron.core.tensor_parallel.layers": Check(sequence_parallel_linear, TP2),
    "Namespace megatron.core.tensor_parallel.mappings": Check(sequence_gather, TP2),
    "Namespace megatron.core.tensor_parallel.random": Check(tracker_records_seed),
    "Replace megatron.core.tensor_parallel.random._get_cuda_rng_state": Check(tracker_goes_on),
    "Replace megatron.core.tensor_parallel.random._set_cuda_rng_state": Check(tracker_leaves_others_alone),
    "Attribute megatron.core.models.common.language_module.language_module."
    "LanguageModule.setup_embeddings_and_output_layer .cuda": Check(tied_embedding, PP2),
    "Namespace megatron.core.distributed.param_and_grad_buffer": Check(gradient_buffers),
    "Constant megatron.core.optimizer.optimizer cuda": Check(loss_scale),
    "Constant megatron.core.optimizer.optimizer torch.cuda.BFloat16Tensor": Check(main_copies),
    "Constant megatron.core.optimizer.optimizer torch.cuda.HalfTensor": Check(
        partial(main_copies, precision="fp16")
    ),
    "Constant megatron.core.optimizer.grad_scaler cuda": Check(dynamic_loss_scale),
    "Replace megatron.core.optimizer.grad_scaler.DynamicGradScaler.load_state_dict": Check(
        restored_loss_scale
    ),
    "Constant megatron.core.optimizer.optimizer torch.cuda.FloatTensor": Check(fp32_in_bf16_model),
    "Namespace megatron.core.optimizer.optimizer": Check(empty_chain),
    "Constant megatron.core.optimizer.clip_grads cuda": Check(gradient_norm),
    "Constant megatron.core.optimizer.clip_grads torch.cuda.FloatTensor": Check(clipping),
    "Constant megatron.core.optimizer.distrib_optimizer torch.cuda.BFloat16Tensor": Check(
        partial(half_shards, precision="bf16"), SHARDED
    ),
    "Constant megatron.core.optimizer.distrib_optimizer torch.cuda.HalfTensor": Check(
        partial(half_shards, precision="fp16"), SHARDED
    ),
    "Constant megatron.core.optimizer.distrib_optimizer torch.cuda.FloatTensor": Check(fp32_shards, SHARDED),
    "Namespace megatron.core.optimizer.distrib_optimizer": Check(fresh_shard_states, SHARDED),
    "Namespace megatron.core.dist_checkpointing.strategies.filesystem_async": Check(preloading),
    "Constant megatron.core.dist_checkpointing.strategies.state_dict_saver cuda": Check(plan_reuse, TP2),
    "Namespace megatron.core.dist_checkpointing.strategies.state_dict_saver": Check(failed_write, TP2),
    "Namespace megatron.core.dist_checkpointing.strategies.async_utils": Check(finished_write, TP2),
}
