"""Predicts the same proteins several times, by the members of an ensemble or by samples of dropout.

Legend: ``k`` outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from esm2mega.batch import LabelledBatch
from esm2mega.checkpoint.finite import not_finite
from esm2mega.data.counter_rng import Purpose, stream_starts
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.errors import UserError
from esm2mega.finetune.checkpoint import TaskCheckpoint, load_task, open_task
from esm2mega.finetune.evaluate import Collecting, packs_of
from esm2mega.finetune.losses import loss_of_task
from esm2mega.finetune.run import batch_spec
from esm2mega.finetune.uncertainty import Summary, conformal_factor, spread_factor
from esm2mega.finetune.user_code import GivenCode
from esm2mega.model.dropout import KeyedDropout
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks
from esm2mega.train.evaluate import gathered, run_groups

Array = npt.NDArray[Any]

AT_ONCE = 16
"""Sets how many packs are predicted by one draw before the next one sees them."""

_SAME = ("data.max_seq_length", "data.too_long", "data.crop")


@dataclass(frozen=True)
class Uncertainty:
    """Says how the uncertainty of predictions is measured.

    Attributes:
        kind: By what: the members of an ``ensemble``, or ``dropout``.
        samples: Number of samples of dropout; 0 for an ensemble.
        calibrate: Table with labels that intervals are calibrated on; None for none.
    """

    kind: str
    samples: int = 0
    calibrate: str | None = None


def open_members(
    names: Sequence[str | Path], overrides: Sequence[str], code: GivenCode | None
) -> list[TaskCheckpoint]:
    """Open the checkpoints of an ensemble, or a single one; all ranks call this together.

    Raises:
        UserError: One cannot be opened, or they do not predict the same of the same residues.
    """
    members = [open_task(name, overrides, code) for name in names]
    first = members[0]
    paths = [member.start.path for member in members]
    if repeated := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(
            f"{repeated}: is named twice; name each member once, since their spread is the uncertainty"
        )
    for member in members[1:]:
        both = f"{first.start.path} and {member.start.path}"
        mine, others = ((task.info.kind, task.info.output_names) for task in (first, member))
        if mine != others:
            raise UserError(
                f"{both} predict different things ({mine[0]} of {', '.join(mine[1])}; {others[0]} of "
                f"{', '.join(others[1])}); an ensemble has one task"
            )
        for key in _SAME:
            name = key.removeprefix("data.")
            one, other = (getattr(task.run.data, name) for task in (first, member))
            if one != other:
                raise UserError(f"{both} have {key}={one} and {other}; give {key}={one}, which holds for all")
        if first.run.parallel != member.run.parallel:
            raise UserError(
                f"{both} have other layouts; give parallel.tensor_model_parallel_size=N "
                "parallel.pipeline_model_parallel_size=N parallel.context_parallel_size=N "
                "parallel.context_parallel_exchange=auto, which hold for all"
            )
    return members


def check_uncertainty(members: Sequence[TaskCheckpoint], how: Uncertainty) -> None:
    """Refuse what gives no uncertainty.

    Raises:
        UserError: There is one member, nothing drops, or the task has none.
    """
    first = members[0]
    run, path = first.run, first.start.path
    if first.info.per_pair:
        raise UserError(
            f"{path}: predicts contacts, of which no uncertainty is computed; leave --uncertainty out"
        )
    if (
        how.calibrate is not None
        and not first.info.mean
        and first.info.kind not in ("regression", "token_regression")
    ):
        raise UserError(
            f"--calibrate {how.calibrate}: {path} predicts classes, intervals are of numbers; leave it out"
        )
    if how.kind == "ensemble" and len(members) < 2:
        raise UserError(
            f"--uncertainty ensemble: {path} is one checkpoint; join several by commas, as in RUN,RUN, or "
            "give --uncertainty dropout"
        )
    if how.kind == "dropout" and len(members) > 1:
        raise UserError("--uncertainty dropout samples one checkpoint; name one, or leave the option out")
    drops = run.drops_in_encoder or run.task.dropout > 0
    if how.kind == "dropout" and first.head.is_configured and not drops:
        raise no_dropout(path)


def no_dropout(path: Path) -> UserError:
    """Return the error for a model that drops nothing."""
    return UserError(
        f"{path}: was trained without dropout (task.dropout=0, model.hidden_dropout=0, "
        "model.attention_dropout=0, lora.dropout=0), so its samples would be equal; join several runs by "
        "commas instead"
    )


@dataclass(frozen=True)
class Found:
    """Holds what the draws made of a pack.

    Attributes:
        kept: ``rows`` and ``numbers`` of the predictions, as in `Predictions`.
        summary: Mean and spread over the draws.
    """

    kept: dict[str, Any]
    summary: Summary


class Draws:
    """Predicts packs by all draws; all weights are in memory at once."""

    def __init__(self, members: Sequence[TaskCheckpoint], how: Uncertainty, ranks: Ranks) -> None:
        """Load the members; all ranks call this together.

        Raises:
            UserError: A head of the user's own drops nothing.
        """
        self._members, self._how, self._ranks = members, how, ranks
        self.models = [load_task(member, ranks) for member in members]
        for chunk in (chunk for chunks in self.models for chunk in chunks):
            chunk.eval()
            if how.kind == "dropout":
                self._let_drop(chunk)
        if how.kind == "dropout" and not members[0].head.is_configured:
            self._check_own()
        self.factor: list[float] = [spread_factor(self.num_draws)] * members[0].info.num_outputs
        """Half of an interval's width in standard deviations, for each output."""

    @property
    def num_draws(self) -> int:
        return self._how.samples or len(self._members)

    def _let_drop(self, chunk: Any) -> None:
        """Turn dropout on."""
        chunk.train()
        first = self._members[0]
        # Where the head alone drops, all samples share the features of a protein.
        chunk.frozen = not first.run.drops_in_encoder and first.head.is_configured

    def _check_own(self) -> None:
        """Raise `UserError` if nothing drops in any stage; the ranks gather over the world."""
        drops = self._members[0].run.drops_in_encoder or any(
            isinstance(module, KeyedDropout) and module.p > 0
            for chunk in self.models[0]
            for module in chunk.modules()
        )
        every = [False] * self._ranks.world_size
        dist.all_gather_object(every, drops)
        if not any(every):
            raise no_dropout(self._members[0].start.path)

    def predict(self, batches: Sequence[LabelledBatch], id_of: Any) -> list[Found]:
        """Predict packs by every draw; all ranks of a model call this together.

        Args:
            batches: At most `AT_ONCE` packs.
            id_of: Names the protein of a row, for messages.

        Returns:
            What was found for each pack, on the last stage; nothing on the others.
        """
        found: list[Found] = []
        for number in range(self.num_draws):
            for place, kept in enumerate(self._draw(number, batches, id_of)):
                if not number:
                    found.append(Found(kept, Summary(self._members[0].info)))
                found[place].summary.add(kept["values"])
        if self._how.kind == "dropout":
            for chunk in self.models[0]:
                chunk.forget_features()
        return found

    def _draw(self, number: int, batches: Sequence[LabelledBatch], id_of: Any) -> list[dict[str, Any]]:
        """Return the predictions of one draw, an entry for each pack."""
        member, chunks, seed = self._members[0], self.models[0], None
        batches = [replace(batch, labels=None) for batch in batches]
        if self._how.kind == "dropout":
            seed = sample_seed(member.run.seed, number)
            batches = [with_keys(batch, seed) for batch in batches]
        else:
            member, chunks = self._members[number], self.models[number]
        collecting = Collecting(loss_of_task(member.run.task, member.info), member.predict, member.info)
        for _ in run_groups(chunks, collecting, batches, self._ranks, seed):
            if collecting.not_finite is not None:
                raise not_finite(id_of(collecting.not_finite), "its prediction", member.start.path)
        return collecting.seen

    def calibrate(self, proteins: LabelledProteins, table: str) -> None:
        """Set `factor` so that intervals cover labels; all ranks call this together.

        Args:
            proteins: Proteins with labels that no training has seen.
            table: Their table, for messages.
        """
        member = self._members[0]
        parts = list(self._measured(proteins, member))
        mine = [np.concatenate(each) for each in zip(*parts, strict=True)] if parts else None
        everything = gathered(mine, self._ranks)

        def factors() -> list[float]:
            assert everything is not None
            mean, sd, labels = (np.concatenate(each) for each in zip(*everything, strict=True))
            return conformal_factor(mean, sd, labels, table, member.info.names)

        self.factor = on_one_rank(factors)

    def _measured(
        self, proteins: LabelledProteins, member: TaskCheckpoint
    ) -> Iterator[tuple[Array, Array, Array]]:
        """Yield mean, standard deviation and labels of this rank's packs, ``[r, k]`` each."""
        batches: list[LabelledBatch] = []
        packs = packs_of(proteins, batch_spec(member.run), self._ranks)
        for number, batch in enumerate(packs, start=1):
            batches.append(batch)
            if len(batches) < AT_ONCE and number < len(packs):
                continue
            # The schedule may append packs of padding.
            for each, found in zip(batches, self.predict(batches, proteins.id), strict=False):
                assert each.labels is not None
                yield found.summary.mean, found.summary.sd, each.labels.numpy()
            batches = []


def sample_seed(seed: int, number: int) -> int:
    """Return the seed of all masks of a sample of dropout, from that of the run and its number."""
    return int(stream_starts(seed, Purpose.DROPOUT_SAMPLE, number)[0])


def with_keys(batch: LabelledBatch, seed: int) -> LabelledBatch:
    """Return the batch with the keys of dropout that follow from `seed` and the numbers of its proteins."""
    numbers = np.array([number for number, _ in batch.samples], dtype=np.int64)
    keys = torch.from_numpy(stream_starts(seed, Purpose.DROPOUT, numbers).astype(np.int64))
    return replace(batch, head_inputs=replace(batch.head_inputs, keys=keys))
