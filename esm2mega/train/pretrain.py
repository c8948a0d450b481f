"""Pretrains: builds the objects of a run, resumes or starts, and passes them to the loop.

There is no arithmetic here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from esm2mega.checkpoint import layout
from esm2mega.config.best_metric import is_downstream
from esm2mega.config.schema import Run
from esm2mega.convert.start_point import StartPoint
from esm2mega.data.overlap import check_overlap
from esm2mega.data.store.cache import check_heads, open_store
from esm2mega.data.store.limit import limit_notes, limited
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.store.verification import BackgroundVerification, verify
from esm2mega.data.stream.build import BatchSpec, token_counts
from esm2mega.data.stream.loader import EvalPacks, TrainStream
from esm2mega.data.stream.recipe import describe_masks, masks_recipe, proteins_hash
from esm2mega.errors import UserError
from esm2mega.files import json_sha256
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.report.progress import show_bytes
from esm2mega.train.build import build
from esm2mega.train.downstream import Measurement
from esm2mega.train.evaluate import evaluate, evaluation_record, unigram_log_probabilities
from esm2mega.train.loop import Evaluation, LoopState
from esm2mega.train.losses import MLMLossReduction, loss_and_perplexity
from esm2mega.train.session import Session, data_set, resolve_epochs, run_session
from esm2mega.train.start import open_training_start, with_batches


def pretrain(
    run: Run,
    on_gradients: Callable[[list[Any]], None] | None = None,
    begun: float | None = None,
    downstream: Measurement | None = None,
    opened: StartPoint | None = None,
    is_trial: bool = False,
) -> LoopState:
    """Pretrain as configured; every process of the world calls this with the same, validated configuration.

    Args:
        run: The configuration.
        on_gradients: See `esm2mega.train.step.TrainState`.
        begun: See `esm2mega.train.session.run_session`.
        downstream: Measures the model after evaluations, as `run.downstream` says; None for nothing.
        opened: The checkpoint that `init_from` names, if it has been opened for the configuration.
        is_trial: Whether data.test is read, but not evaluated.

    Returns:
        The final state of the loop, the same on every rank.

    Raises:
        UserError: An input is missing or does not fit.
        MachineError: Loss, gradient or weights are not finite, or a checkpoint could not be written.
        StoppedBySignal: A signal came or the time was up, and the state was saved.
    """
    if run.data.train is None:
        raise UserError("data.train is not set: give the token store to train on, as data.train=DIR")
    held_out_paths = [path for path in (run.data.valid, run.data.test) if path is not None]
    check_heads([*run.data.train_paths(), *held_out_paths], run.data)

    def opened_part(path: str, key: str) -> TokenStore:
        return limited(open_store(path, run.data, run.run_dir, key, show_bytes), run.data)

    train_stores = [opened_part(path, "data.train") for path in run.data.train_paths()]
    held_out = {
        split: opened_part(path, f"data.{split}")
        for split, path in (("valid", run.data.valid), ("test", run.data.test))
        if path is not None
    }
    stores = {"data.train": train_stores, **{f"data.{split}": [store] for split, store in held_out.items()}}
    every = [store for sets in stores.values() for store in sets]
    timeout = timedelta(minutes=run.parallel.timeout_minutes)
    on_one_rank(lambda: verify(every, arrays_only=True), timeout)
    if is_trial and "valid" in held_out:
        run = _reaching_a_mask(run, held_out["valid"])
    if "valid" in held_out:
        _check_predictable(run, held_out["valid"])
    start = open_training_start(run, opened)
    run = with_batches(run, start)
    run = resolve_epochs(run, lambda: TrainStream(train_stores, BatchSpec.of_training(run)))
    overlap = _overlap(run, stores, start)
    if is_trial:
        held_out.pop("test", None)
    with process_groups(run.parallel, run.seed) as ranks:

        def make(start: StartPoint | None) -> Session:
            return _session(run, ranks, train_stores, held_out, overlap, start, on_gradients, downstream)

        return run_session(run, ranks, make, start, begun)


def _overlap(run: Run, stores: dict[str, list[TokenStore]], start: StartPoint | None) -> dict[str, Any]:
    """Compare the splits on rank 0, or take the result from the checkpoint that the run resumes.

    The comparison reads the whole of the largest stores, which a job that is queued again need not repeat.

    Returns:
        What was compared, ``of``, and a line for each two splits that share proteins, ``notes``.
    """
    compared = {key: [store.fingerprint for store in sets] for key, sets in stores.items()}
    known = start.state.get("overlap") if start is not None and start.is_resumed else None
    if known is not None and known["of"] == compared and (run.data.allow_overlap or not known["notes"]):
        return dict(known)
    notes = on_one_rank(
        lambda: check_overlap(stores, run.data.allow_overlap), timedelta(minutes=run.parallel.timeout_minutes)
    )
    return {"of": compared, "notes": notes}


def _reaching_a_mask(run: Run, store: TokenStore) -> Run:
    """Let the few packs that a trial evaluates go on to the first one in which a residue is masked."""
    packs = enumerate(EvalPacks(store, BatchSpec.of_training(run), run.eval), start=1)
    found = next((number for number, batch in packs if len(batch.labels)), None)
    limit = 0 if found is None else max(found, run.train.eval_batches)
    return replace(run, train=replace(run.train, eval_batches=limit))


def _check_predictable(run: Run, store: TokenStore) -> None:
    """Refuse validation data whose masks select no residue: they have no loss that could be best or stop."""
    packs = EvalPacks(store, BatchSpec.of_training(run), run.eval, run.train.eval_batches)
    if not any(len(batch.labels) for batch in packs):
        part = f" in train.eval_batches={run.train.eval_batches} packs" if run.train.eval_batches else ""
        raise UserError(
            f"data.valid={run.data.valid}: the masks of evaluation select no residue of its {len(store)} "
            f"proteins{part}, so there is nothing to predict; give more proteins, or set data.valid=null and "
            "train.eval_every=0"
        )


def _session(
    run: Run,
    ranks: Ranks,
    train_stores: list[TokenStore],
    held_out: dict[str, TokenStore],
    overlap: dict[str, Any],
    start: StartPoint | None,
    on_gradients: Callable[[list[Any]], None] | None,
    downstream: Measurement | None,
) -> Session:
    built = build(run, ranks, start, MLMLossReduction(), on_gradients)
    spec = BatchSpec.of_training(run)
    stream = TrainStream(train_stores, spec, ranks.dp_rank, ranks.dp_size)
    counts = token_counts(stream.samples)
    recipe = masks_recipe(run.eval, run.data.max_seq_length)

    def evaluation(split: str, limit: int) -> Evaluation | None:
        if split not in held_out:
            return None

        def measure(abandon: Callable[[], bool]) -> dict[str, Any] | None:
            packs = EvalPacks(held_out[split], spec, run.eval, limit, ranks.dp_rank, ranks.dp_size)
            unigram = unigram_log_probabilities(counts, ranks.device)
            metrics = evaluate(built.state.model, MLMLossReduction(unigram), packs, ranks, abandon=abandon)
            return None if metrics is None else evaluation_record(metrics, recipe, split)

        return measure

    stores = {"data.train": train_stores, **{f"data.{split}": [store] for split, store in held_out.items()}}
    lines = [*stream.samples.describe(), *limit_notes(stores, run.data), *overlap["notes"]]
    banner = [f"data     {line}" for line in lines]
    if held_out:
        banner.append(f"eval     recipe {recipe}: {describe_masks(run.eval, run.data.max_seq_length)}")
    # Rank 0 reads for all: on a shared file system every rank would read the same bytes.
    verification = BackgroundVerification([*train_stores, *held_out.values()] if ranks.is_main else [])
    if verification.num_bytes:
        size = f"{verification.num_bytes / 1e9:.2f} GB"
        banner.append(f"data     {size} are verified in the background, before the first checkpoint is saved")
    valid = held_out.get("valid")
    evaluated = None if valid is None else proteins_hash(valid.fingerprint, run.train.eval_batches)
    if downstream is not None:
        banner += downstream.banner
        if evaluated is not None and is_downstream(run.checkpoint.best_metric):
            evaluated = json_sha256({"valid": evaluated, "downstream": downstream.fingerprint})
    return Session(
        name="pretrain",
        built=built,
        stream=stream,
        evaluation=evaluation,
        eval_recipe=recipe,
        eval_proteins=evaluated,
        extra_state={
            "token_counts": counts.tolist(),
            "overlap": overlap,
            layout.DATA_SETS: _data_sets(run, train_stores, held_out),
        },
        banner=banner,
        result=_result,
        training_values=loss_and_perplexity,
        verification=verification,
        downstream=downstream,
    )


def _data_sets(
    run: Run, train_stores: Sequence[TokenStore], held_out: Mapping[str, TokenStore]
) -> list[dict[str, Any]]:
    used = [("train", path, store) for path, store in zip(run.data.train_paths(), train_stores, strict=True)]
    used += [(split, getattr(run.data, split), store) for split, store in held_out.items()]
    return [data_set(split, path, store.lengths, store.manifest["sources"]) for split, path, store in used]


def _result(record: dict[str, Any], split: str) -> str:
    if record[f"{split}_loss"] is None:
        return "loss none: nothing to predict"
    return (
        f"loss {record[f'{split}_loss']:.4f}, perplexity {record[f'{split}_perplexity']:.2f} "
        f"(residue frequencies: {record['unigram_loss']:.4f})"
    )
