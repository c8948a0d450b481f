"""Decides how large a batch is, in tokens or in proteins, and how it is divided over the processes.

With DP = world size / (TP x PP x CP), an optimizer step takes one of

- `train.global_batch_tokens` = T x DP x micro-batches per rank, in packs of T = `train.micro_batch_tokens`;
- `train.global_batch_size` proteins, by default `train.micro_batch_size` x DP x
  `train.accumulate_grad_batches`, in as many packs of T = `train.micro_batch_size` x `data.max_seq_length` as
  they fill.

A configuration counts in one of the two ways. Where it counts proteins, the token counts are derived.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from esm2mega.config.scalars import Unset
from esm2mega.config.schema import DataConfig, ParallelConfig, TrainConfig
from esm2mega.errors import UserError

PROTEIN_KEYS = ("train.micro_batch_size", "train.global_batch_size", "train.accumulate_grad_batches")
TOKEN_KEYS = ("train.micro_batch_tokens", "train.global_batch_tokens")

_WAYS: dict[str, Literal["proteins", "tokens"]] = {
    **dict.fromkeys(PROTEIN_KEYS, "proteins"),
    **dict.fromkeys(TOKEN_KEYS, "tokens"),
}


def way_of_counting(settings: Iterable[tuple[str, Any, str]]) -> Literal["proteins", "tokens"] | None:
    """Return how settings count batches: as the last source does that says anything of them.

    A file replaces what the files in its `defaults` say, and the command line what a file says.

    Args:
        settings: Key, value as it was read, and place of each, as file:line, in the order in which they hold.

    Returns:
        The way; None if no setting decides it.

    Raises:
        UserError: One source counts in both ways.
    """
    key_of: dict[Literal["proteins", "tokens"], str] = {}
    latest: str | None = None
    for key, value, where in settings:
        if key not in _WAYS or isinstance(value, Unset):
            continue
        source = where.rpartition(":")[0]
        if latest != source:
            key_of, latest = {}, source
        key_of.setdefault(_WAYS[key], key)
        if len(key_of) > 1:
            raise UserError(
                f"{where}: {key_of['proteins']} counts proteins and {key_of['tokens']} tokens, but a batch "
                f"is counted in one of them; leave out {' and '.join(TOKEN_KEYS)}, or "
                f"{', '.join(PROTEIN_KEYS)}"
            )
    return next(iter(key_of), None)


def fill_batches(train: TrainConfig, data: DataConfig) -> None:
    """Set the token counts that counts of proteins stand for; T is exact, a step has at most so many tokens.

    Raises:
        UserError: The counts of proteins do not say how large a batch is, or say it twice.
    """
    size, total, accumulated = train.micro_batch_size, train.global_batch_size, train.accumulate_grad_batches
    if total is not None and accumulated is not None:
        raise UserError(
            f"train.global_batch_size={total} and train.accumulate_grad_batches={accumulated} both say how "
            "many proteins a step takes; set one of them to null"
        )
    if accumulated is not None and size is None:
        raise UserError(
            f"train.accumulate_grad_batches={accumulated} counts micro-batches, whose size is not set; set "
            "train.micro_batch_size, or in place of both train.global_batch_size"
        )
    if size is None and total is None:
        return
    train.micro_batch_size = size = 1 if size is None else size
    train.micro_batch_tokens = size * data.max_seq_length
    train.global_batch_tokens = data.max_seq_length * (size * (accumulated or 1) if total is None else total)


def resolve_batches(
    train: TrainConfig, data: DataConfig, parallel: ParallelConfig, world_size: int, saved: int | None = None
) -> TrainConfig:
    """Return the settings with the number of proteins of a step, where batches are counted in proteins.

    Args:
        train: Settings, see `fill_batches`.
        data: Lengths of proteins.
        parallel: Layout.
        world_size: Number of processes.
        saved: `train.global_batch_size` of the checkpoint that the run resumes, which it keeps unless the
            configuration names the number itself; None for a new run.

    Raises:
        UserError: The number cannot be divided over the processes.
    """
    if train.micro_batch_size is None:
        return train
    total = train.global_batch_size
    if total is None:
        total = saved if saved is not None else formula(train, parallel, world_size)
    resolved = replace(train, global_batch_size=total, accumulate_grad_batches=None)
    fill_batches(resolved, data)
    num_micro_batches(resolved, parallel, world_size)
    return resolved


def formula(train: TrainConfig, parallel: ParallelConfig, world_size: int) -> int:
    """Return `train.micro_batch_size` x DP x `train.accumulate_grad_batches`."""
    assert train.micro_batch_size is not None
    accumulated = train.accumulate_grad_batches
    dp_size = data_parallel_size(parallel, world_size)
    return train.micro_batch_size * dp_size * (1 if accumulated is None else accumulated)


def derived_keys(train: TrainConfig) -> tuple[str, ...]:
    """Return the keys whose values follow from others, and so are left out of a file of the configuration."""
    return () if train.micro_batch_size is None else TOKEN_KEYS


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return the number of model replicas: world size / (TP x PP x CP)."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, each = parallel.context_parallel_size, processes_of_a_replica(parallel)
    if world_size < 1 or world_size % each:
        context = f" x parallel.context_parallel_size={cp}" if cp > 1 else ""
        raise UserError(
            f"world size {world_size} is not a multiple of parallel.tensor_model_parallel_size={tp} x "
            f"parallel.pipeline_model_parallel_size={pp}{context} = {each}; "
            f"start a multiple of {each} processes or change these sizes"
        )
    return world_size // each


def processes_of_a_replica(parallel: ParallelConfig) -> int:
    """Return how many processes share one pack: TP x PP x CP."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return tp * pp * parallel.context_parallel_size


def sizes_that_round(parallel: ParallelConfig) -> dict[str, int]:
    """Return the sizes of a layout that decide in which order sums are taken, for what records of outputs."""
    sizes = {"tensor_model_parallel_size": parallel.tensor_model_parallel_size}
    # Only where there is some: outputs of earlier versions are found to be the same.
    if parallel.context_parallel_size > 1:
        sizes["context_parallel_size"] = parallel.context_parallel_size
    return sizes


def num_micro_batches(train: TrainConfig, parallel: ParallelConfig, world_size: int) -> int:
    """Return how many micro-batches (packs of T tokens) each rank takes per optimizer step.

    Where batches are counted in proteins, their number varies with the lengths of the proteins, and this is
    what it is a multiple of.

    Raises:
        UserError: The batch cannot be divided over the processes.
    """
    dp_size = data_parallel_size(parallel, world_size)
    if train.micro_batch_size is not None:
        _check_proteins(train.global_batch_size, dp_size)
        is_interleaved = parallel.virtual_pipeline_model_parallel_size is not None
        return parallel.pipeline_model_parallel_size if is_interleaved else 1
    micro, total = train.micro_batch_tokens, train.global_batch_tokens
    step = micro * dp_size
    if total % step:
        raise UserError(
            f"train.global_batch_tokens={total} is not a multiple of train.micro_batch_tokens={micro} x "
            f"data-parallel size {dp_size} = {step}; set train.global_batch_tokens={_nearest(total, step)}"
        )
    return total // step


def _check_proteins(total: int | None, dp_size: int) -> None:
    """Check that the proteins of a step are a multiple of DP; None is for a number that follows from DP."""
    if total is not None and total % dp_size:
        sizes = [str(n) for n in range(1, min(total, 2 * dp_size) + 1) if total % n == 0]
        raise UserError(
            f"train.global_batch_size={total} proteins are not a multiple of data-parallel size {dp_size}; "
            f"start processes for a data-parallel size of {' or '.join(sizes)}, or set "
            f"train.global_batch_size={_nearest(total, dp_size)} in a new run"
        )


def _nearest(total: int, step: int) -> str:
    """Return the multiples of a number beside another; the smaller is no cure when it is zero."""
    return " or ".join(str(n) for n in (total // step * step, (total // step + 1) * step) if n)


def check_batches(train: TrainConfig, data: DataConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Check that packs hold the longest sequence, and that the batch can be divided over the processes."""
    if train.micro_batch_tokens < data.max_seq_length:
        raise UserError(
            f"train.micro_batch_tokens={train.micro_batch_tokens} is smaller than data.max_seq_length="
            f"{data.max_seq_length}, so a long protein would not fit into a pack; "
            "raise train.micro_batch_tokens or lower data.max_seq_length"
        )
    if train.micro_batch_size is not None and data.pack_window is not None:
        raise UserError(
            f"data.pack_window={data.pack_window} does not go with batches counted in proteins, where those "
            "of a step are packed together; set data.pack_window=null"
        )
    count = num_micro_batches(train, parallel, world_size)
    pp = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size is not None and count % pp:
        raise UserError(
            f"{count} micro-batches per step (train.global_batch_tokens={train.global_batch_tokens}) are not "
            f"divisible by parallel.pipeline_model_parallel_size={pp}, which a virtual pipeline needs; "
            "change train.global_batch_tokens, or set parallel.virtual_pipeline_model_parallel_size=null"
        )


def shares_of_a_pack(parallel: ParallelConfig) -> int:
    """Return how many processes share the tokens of a pack: CP, and times TP under sequence parallelism."""
    tp = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return parallel.context_parallel_size * tp


def check_shares(train: TrainConfig, parallel: ParallelConfig) -> None:
    """Check that the tokens of a pack can be divided over the processes that share them."""
    shares = shares_of_a_pack(parallel)
    tokens, size = train.micro_batch_tokens, train.micro_batch_size
    if tokens % shares == 0:
        return
    if size is None:
        what, cure = f"train.micro_batch_tokens={tokens}", "train.micro_batch_tokens"
        value = -(-tokens // shares) * shares
    else:
        what = f"train.micro_batch_size={size} x data.max_seq_length={tokens // size} = {tokens}"
        cure, value = "train.micro_batch_size", -(-size // shares) * shares
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    sizes = [f"parallel.context_parallel_size={cp}"] * (cp > 1)
    sizes += [f"parallel.tensor_model_parallel_size={tp}"] * parallel.sequence_parallel
    product = f" = {shares}" if len(sizes) > 1 else ""
    needed = ", which parallel.sequence_parallel=true needs" if parallel.sequence_parallel else ""
    raise UserError(f"{what} is not divisible by {' x '.join(sizes)}{product}{needed}; set {cure}={value}")
