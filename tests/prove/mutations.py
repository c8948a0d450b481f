"""Errors that distributed training is known for, planted one at a time into the processes of the proof.

Each must make its trial differ; a proof that lets one through proves nothing.
``python -m tests.prove.mutations`` prints how each was found.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state

from esm2mega.data.stream import build as batch
from esm2mega.data.stream.loader import TrainStream
from esm2mega.lora import dropout as lora_dropout
from esm2mega.lora import inject
from esm2mega.lora import layers as lora_layers
from esm2mega.model import attention, build
from esm2mega.prove import prover
from esm2mega.prove.layouts import Layout
from esm2mega.prove.prover import Prover, Verdict
from esm2mega.prove.training import MID_WINDOW
from esm2mega.prove.trials import DROPOUT, Trial, with_head, with_lora
from esm2mega.prove.workers import Job, serve_with, train
from esm2mega.train import build as training
from esm2mega.train import evaluate
from esm2mega.train.losses import LossReduction
from tests.prove import plants
from tests.prove.short import to_first_checkpoint

_MEGATRON = "megatron.core"
# A key that nothing reads while Weights & Biases is off: it carries the name into the processes.
_KEY = "logging.wandb_run_name"


@dataclass(frozen=True)
class Mutation:
    """One error.

    Attributes:
        what: The error in words.
        plant: Makes it for the duration of a training, in every process.
        layouts: Of the trial that must find it.
        seen_in: A kind of number that must differ, see `esm2mega.prove.compare.KINDS`.
        lora: Whether adapters are trained.
        head: The head that is trained, by its name in `esm2mega prove`; empty for the language model.
        alone: Whether it is made in the reference too, since it is the same wherever there is one process.
        settings: Overrides of the training, which the reference has too.
    """

    what: str
    plant: Callable[[], AbstractContextManager[Any]]
    layouts: tuple[Layout, ...]
    seen_in: str
    lora: bool = False
    head: str = ""
    alone: bool = False
    settings: tuple[str, ...] = ()


def _nothing(target: str) -> AbstractContextManager[Any]:
    return patch(target, lambda *arguments, **keywords: None)


def layernorm_gradients_not_reduced() -> AbstractContextManager[Any]:
    return _nothing(
        f"{_MEGATRON}.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads"
    )


def mean_of_means() -> AbstractContextManager[Any]:
    original = LossReduction._schedule_loss

    def per_micro_batch(self: LossReduction, batch: Any, output: torch.Tensor) -> Any:
        loss_sum, count, report = original(self, batch, output)
        return loss_sum / count.clamp(min=1), torch.ones_like(count), report

    return patch.object(LossReduction, "_schedule_loss", per_micro_batch)


def tied_embedding_not_synchronised() -> AbstractContextManager[Any]:
    return _nothing(f"{_MEGATRON}.distributed.finalize_model_grads._allreduce_word_embedding_grads")


def wrong_qkv_interleave() -> AbstractContextManager[Any]:
    original = attention.split_and_rotate

    def q_then_k_then_v(qkv: torch.Tensor, tables: torch.Tensor) -> Any:
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            tokens, heads, three, channels = qkv.shape
            qkv = qkv.reshape(tokens, three, heads, channels).transpose(1, 2)
        return original(qkv, tables)

    return patch.object(attention, "split_and_rotate", q_then_k_then_v)


def bias_dropped_on_one_rank() -> AbstractContextManager[Any]:
    original = training.build_model

    def without_bias(*arguments: Any, **keywords: Any) -> Any:
        chunks = original(*arguments, **keywords)
        if parallel_state.get_tensor_model_parallel_rank() == 1:
            for chunk in chunks:
                chunk.encoder.layers[1].mlp.linear_fc1.register_forward_hook(
                    lambda module, inputs, output: (output[0] - module.bias, output[1])
                )
        return chunks

    return patch.object(training, "build_model", without_bias)


def pipeline_messages_swapped() -> AbstractContextManager[Any]:
    """The batched exchange: in an interleaved schedule of two, next and previous rank are the same."""
    original = build.transformer_config

    def batched(*arguments: Any) -> Any:
        config = original(*arguments)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    return patch.object(build, "transformer_config", batched)


def mask_seeded_by_rank() -> AbstractContextManager[Any]:
    original = batch.mask_tokens

    def by_rank(tokens: Any, samples: Any, lengths: Any, seed: int, *rest: Any) -> Any:
        return original(tokens, samples, lengths, seed + int(os.environ["RANK"]), *rest)

    return patch.object(batch, "mask_tokens", by_rank)


def clip_norm_of_one_rank() -> AbstractContextManager[Any]:
    def alone(optimizer: Any) -> torch.Tensor:
        (part,) = optimizer.chained_optimizers
        norms = [gradient.norm() for gradient in part.get_main_grads_for_grad_norm()]
        return torch.stack(norms).square().sum().reshape(1)

    return patch("esm2mega.parallel.kernels.squared_norm", alone)


def replicated_parameters_counted_twice() -> AbstractContextManager[Any]:
    return patch(
        f"{_MEGATRON}.tensor_parallel.param_is_not_tensor_parallel_duplicate",
        lambda parameter, *arguments, **keywords: True,
    )


def data_shifted_after_resume() -> AbstractContextManager[Any]:
    original = TrainStream.load_state_dict

    def one_pack_on(self: TrainStream, state: Any) -> None:
        original(self, state)
        cursor = batch.train_plan(self.samples, self._spec).take(self._state.cursor, 1)[1]
        self._state = replace(self._state, cursor=cursor)

    return patch.object(TrainStream, "load_state_dict", one_pack_on)


def place_in_window_lost() -> AbstractContextManager[Any]:
    original = TrainStream.load_state_dict

    def from_its_start(self: TrainStream, state: Any) -> None:
        original(self, state)
        self._state = replace(self._state, cursor=replace(self._state.cursor, offset=0))

    return patch.object(TrainStream, "load_state_dict", from_its_start)


def last_evaluation_packs_dropped() -> AbstractContextManager[Any]:
    """As a loader with `drop_last` does: the packs that not every rank has are left out."""
    original = evaluate.run_schedule

    def full_groups(model: Any, loss: Any, group: Any, *rest: Any, **keywords: Any) -> Any:
        padding = any(batch.num_sequences == 0 for batch in group) if keywords.get("forward_only") else False
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, padding)
        reports = original(model, loss, group, *rest, **keywords)
        return reports[:-1] if any(gathered) else reports

    return patch.object(evaluate, "run_schedule", full_groups)


def optimizer_saved_with_padding() -> AbstractContextManager[Any]:
    """What Megatron-Core 0.16.1 and 0.19.2 do by themselves, see `esm2mega.checkpoint.optimizer_state`."""
    return patch("esm2mega.checkpoint.saver.places_without_padding", lambda optimizer: nullcontext())


def adapter_gradients_not_reduced() -> AbstractContextManager[Any]:
    original = lora_layers.Adapter.__init__

    def unmarked(self: Any, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        for parameter in self.parameters():
            parameter.sequence_parallel = False

    return patch.object(lora_layers.Adapter, "__init__", unmarked)


def adapter_input_gradient_of_one_rank() -> AbstractContextManager[Any]:
    return patch.object(lora_layers, "copy_to_tensor_model_parallel_region", lambda hidden, group: hidden)


def adapter_channels_numbered_on_each_rank() -> AbstractContextManager[Any]:
    original = lora_dropout.InputDropout.__init__

    def without_group(self: Any, p: float, place: int, group: Any = None) -> None:
        original(self, p, place)

    return patch.object(lora_dropout.InputDropout, "__init__", without_group)


def adapter_keys_of_the_latest_micro_batch() -> AbstractContextManager[Any]:
    """As if the model handed the keys out: a layer that is computed again then has those of a later one."""
    original = inject.hand_keys_to_layer

    def before_recomputation(layer: Any, dropouts: Any) -> None:
        original(layer, dropouts)
        hooks = layer._forward_pre_hooks
        number, hand_keys = next(reversed(hooks.items()))

        def first_time(*arguments: Any) -> None:
            if not torch.is_grad_enabled():
                hand_keys(*arguments)

        hooks[number] = first_time

    return patch.object(inject, "hand_keys_to_layer", before_recomputation)


_ONE = Layout(packed=4)
_TP2 = Layout(tp=2, packed=4)
_DP2 = Layout(dp=2, packed=3)
_CP2 = Layout(cp=2, packed=4)
_CP2_NEEDED = Layout(cp=2, packed=3, exchange="needed")

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "LayerNorm gradients not all-reduced under SP",
        layernorm_gradients_not_reduced,
        (Layout(tp=2, sp=True, packed=4),),
        "gradient",
    ),
    Mutation(
        "mean of the means of micro-batches", mean_of_means, (Layout(packed=12),), "gradient", alone=True
    ),
    Mutation(
        "tied embedding not synchronised",
        tied_embedding_not_synchronised,
        (Layout(pp=2, packed=4),),
        "gradient",
    ),
    Mutation("wrong QKV interleave under TP", wrong_qkv_interleave, (_TP2,), "loss"),
    Mutation("bias dropped on one rank", bias_dropped_on_one_rank, (_TP2,), "loss"),
    Mutation(
        "pipeline messages swapped",
        pipeline_messages_swapped,
        (Layout(pp=2, vpp=2, packed=3, layers=4),),
        "loss",
    ),
    Mutation("mask seeded by rank", mask_seeded_by_rank, (_DP2,), "loss"),
    Mutation("clip norm over one rank only", clip_norm_of_one_rank, (_TP2,), "gradient norm"),
    Mutation(
        "replicated parameters counted twice", replicated_parameters_counted_twice, (_TP2,), "gradient norm"
    ),
    Mutation("data shifted after resume", data_shifted_after_resume, (_ONE, _TP2), "loss"),
    Mutation("place in the window lost by resuming", place_in_window_lost, (_ONE, _TP2), "loss"),
    Mutation(
        "last evaluation packs dropped",
        last_evaluation_packs_dropped,
        (Layout(dp=2, packed=2),),
        "loss",
    ),
    Mutation(
        "gradients of one data-parallel rank",
        plants.gradients_of_one_data_rank,
        (_DP2,),
        "gradient",
    ),
    Mutation(
        "gradients averaged over ranks and tokens",
        plants.gradients_averaged_over_ranks_too,
        (_DP2,),
        "gradient norm",
    ),
    Mutation("row-parallel output not all-reduced", plants.row_parallel_output_not_reduced, (_TP2,), "loss"),
    Mutation(
        "parts of the sequence swapped",
        plants.parts_of_the_sequence_swapped,
        (Layout(tp=2, sp=True, packed=4),),
        "loss",
    ),
    Mutation(
        "attention across the proteins of a pack",
        plants.attention_across_proteins,
        (Layout(packed=12),),
        "loss",
    ),
    Mutation(
        "weights of other ranks not gathered",
        plants.weights_of_other_ranks_stay_old,
        (Layout(dp=2, packed=3, distributed_optimizer=True),),
        "weight",
    ),
    Mutation("weights drawn by each rank", plants.weights_drawn_by_each_rank, (_TP2,), "loss"),
    Mutation(
        "evaluation of one data-parallel rank",
        plants.evaluation_of_one_data_rank,
        (Layout(dp=2, packed=2),),
        "loss",
    ),
    Mutation("learning rate begins again after resume", plants.schedule_begins_again, (_ONE, _ONE), "state"),
    Mutation("moments of Adam lost by resuming", plants.moments_lost_by_resuming, (_ONE, _ONE), "weight"),
    Mutation(
        "optimizer state saved with padding",
        optimizer_saved_with_padding,
        (Layout(pp=2, dp=2, packed=3, distributed_optimizer=True),),
        "checkpoint",
    ),
    Mutation(
        "labels counted by one context-parallel rank",
        plants.labels_counted_by_one_context_rank,
        (_CP2,),
        "gradient norm",
    ),
    Mutation("keys of a neighbour protein", plants.keys_of_a_neighbour, (_CP2_NEEDED,), "loss"),
    Mutation(
        "positions begin anew in each part of a pack",
        plants.positions_begin_anew_in_each_part,
        (_CP2,),
        "loss",
    ),
    Mutation(
        "gradients of fetched keys not given back",
        plants.gradients_of_fetched_keys_lost,
        (_CP2_NEEDED,),
        "gradient",
    ),
    Mutation(
        "gradient of what all context-parallel ranks compute counted once",
        plants.gradient_of_what_all_compute_counted_once,
        (_CP2,),
        "gradient",
    ),
    Mutation(
        "gradient of a head that all context-parallel ranks compute counted once",
        plants.gradient_of_gathered_states_counted_once,
        (_CP2,),
        "gradient",
        head="mlp",
    ),
    Mutation(
        "dropout of every part of a pack as in the first",
        plants.dropout_of_the_first_part,
        (_CP2,),
        "loss",
        settings=DROPOUT[:1],
    ),
    Mutation("dropout keyed by rank", plants.dropout_keyed_by_rank, (_DP2,), "loss", settings=DROPOUT),
    Mutation(
        "dropout of heads by their number on the rank",
        plants.heads_numbered_on_each_rank,
        (_TP2,),
        "loss",
        settings=DROPOUT,
    ),
    Mutation(
        "whole factors of adapters not reduced under SP",
        adapter_gradients_not_reduced,
        (Layout(tp=2, sp=True, packed=4),),
        "gradient",
        lora=True,
    ),
    Mutation(
        "factor A of one rank's outputs alone",
        adapter_input_gradient_of_one_rank,
        (_TP2,),
        "gradient",
        lora=True,
    ),
    Mutation(
        "dropout of adapters by the number of a channel on the rank",
        adapter_channels_numbered_on_each_rank,
        (_TP2,),
        "gradient",
        lora=True,
    ),
    Mutation(
        "dropout of adapters by keys of another micro-batch",
        adapter_keys_of_the_latest_micro_batch,
        (Layout(pp=2, packed=3, recompute="full"),),
        "gradient",
        lora=True,
    ),
)


_ONLY_IN_TRIALS = {f"{_KEY}={mutation.plant.__name__}" for mutation in MUTATIONS if not mutation.alone}


def serve_mutated(connection: Connection, log: Path) -> None:
    """`esm2mega.prove.workers.serve` with the mutation that a job names, if any."""
    serve_with(connection, log, _train_mutated)


def _train_mutated(job: Job, rank: int) -> None:
    named = [text.removeprefix(f"{_KEY}=") for text in job.overrides if text.startswith(_KEY)]
    planted = [mutation.plant for mutation in MUTATIONS if mutation.plant.__name__ in named]
    with planted[0]() if planted else nullcontext():
        train(job, rank)


def trial(mutation: Mutation, planted: bool = True) -> Trial:
    """The trial of a mutation, with it or without."""
    inside = MID_WINDOW if len(mutation.layouts) > 1 else ()
    plain = Trial(mutation.layouts, settings=(*mutation.settings, *inside))
    whole = with_lora(plain) if mutation.lora else plain
    whole = with_head(whole, mutation.head) if mutation.head else whole
    key = (f"{_KEY}={mutation.plant.__name__}",) if planted else ()
    return replace(whole, settings=(*whole.settings, *key))


def found(mutation: Mutation, verdict: Verdict) -> bool:
    """Whether the trial differed where it must; one that could not be run to its end has shown nothing."""
    return any(d.kind == mutation.seen_in and d.value > verdict.bound for d in verdict.worst)


def judge(trials: Sequence[Trial]) -> dict[Trial, Verdict]:
    """Verdicts on trials, of processes that can be mutated; most are compared with the right training."""
    references = prover._references

    def unplanted(trial: Trial) -> list[prover.Leg]:
        kept = tuple(text for text in trial.settings if text not in _ONLY_IN_TRIALS)
        return references(replace(trial, settings=kept))

    with (
        patch.object(prover, "_references", unplanted),
        # Each shows in all steps.
        to_first_checkpoint(),
        Prover(4, seed=1234, serve=serve_mutated) as judging,
    ):
        return {verdict.trial: verdict for verdict in judging.judge(trials)}


def main() -> int:
    """Print a line for each mutation; 1 if one was not found."""
    verdicts = judge([trial(mutation) for mutation in MUTATIONS])
    missed = 0
    for mutation in MUTATIONS:
        verdict = verdicts[trial(mutation)]
        seen = {difference.kind: difference for difference in verdict.worst}.get(mutation.seen_in)
        missed += not found(mutation, verdict)
        how = verdict.error or f"{seen.value:.1e} in {seen}" if seen else verdict.error
        print(f"{'found' if found(mutation, verdict) else 'MISSED':7} {mutation.what:46} {how}")
    return int(missed > 0)


if __name__ == "__main__":
    # Under the name that the other processes know.
    from tests.prove import mutations

    sys.exit(mutations.main())
