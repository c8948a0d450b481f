"""`predict` runs a fine-tuned model on proteins without labels, with any number of processes and starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.checkpoint.finite import not_finite
from esm2mega.config.batches import sizes_that_round
from esm2mega.config.head_form import head_form
from esm2mega.config.load import values_of
from esm2mega.data.labels.splits import num_in_table, training_table
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from esm2mega.files import check_out, real_path
from esm2mega.finetune.checkpoint import labelled, load_task, without_dropping
from esm2mega.finetune.draws import AT_ONCE, Draws, Uncertainty, check_uncertainty, open_members
from esm2mega.finetune.evaluate import Collecting
from esm2mega.finetune.kept_columns import KeptColumns
from esm2mega.finetune.losses import loss_of_task
from esm2mega.finetune.metrics import check_packages
from esm2mega.finetune.output import RankOne
from esm2mega.finetune.prediction_files import PredictionContents, PredictionTarget, check_format
from esm2mega.finetune.run import batch_spec
from esm2mega.finetune.uncertainty import extra_widths
from esm2mega.finetune.user_code import GivenCode
from esm2mega.infer.contents import Write
from esm2mega.infer.job import Compute, Job, refuse_long, run_job
from esm2mega.infer.source import source_of
from esm2mega.infer.target import Mode
from esm2mega.model.arithmetic import describe_computing
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks
from esm2mega.train.evaluate import run_groups

_AS_IN_TRAINING = {
    "infer.precision": "model.precision",
    "infer.too_long": "data.too_long",
    "infer.max_seq_length": "data.max_seq_length",
    "infer.micro_batch_tokens": "train.micro_batch_tokens",
}
"""Maps keys of inference to the keys of fine-tuning whose values they replace."""

_TOO_LONG = ("error", "crop")
"""Of the values of `infer.too_long`: windows of a protein have no common prediction."""


def predict(
    checkpoint: str | Path | Sequence[str | Path],
    input: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    mode: Mode = "new",
    code: GivenCode | None = None,
    uncertainty: Uncertainty | None = None,
    ranks: RankOne | None = None,
    keep: Sequence[str] = (),
) -> list[str]:
    """Predict every protein of a file; all ranks call this together.

    Args:
        checkpoint: As for `esm2mega.finetune.checkpoint.open_task`; several for an ensemble.
        input: FASTA, CSV, Parquet and others, also compressed; or a token store.
        out: CSV, Parquet or HDF5, by the ending of the name.
        overrides: ``key=value`` over the configuration of the checkpoint.
        mode: What to do about an output that exists already.
        code: The user's own head, if it was trained with such; its loss only if that turns outputs into
            predictions.
        uncertainty: How uncertain the predictions are, and by what; None for predictions alone.
        ranks: Which number has rank 1 in a table; None for a table without ranks.
        keep: Columns of the input that a table takes over, or ``all`` alone.

    Returns:
        A report for the reader.

    Raises:
        UserError: The input or the settings are not valid, or the output exists already.
    """
    names = [checkpoint] if isinstance(checkpoint, (str, Path)) else checkpoint
    return run_job(PredictJob(names, str(input), Path(out), overrides, mode, code, uncertainty, ranks, keep))


class PredictJob(Job):
    """Computes the outputs of a head, pack by pack."""

    name = "predict"
    unit = "pack"
    allow_unknown = True

    def __init__(
        self,
        checkpoints: Sequence[str | Path],
        input: str,
        out: Path,
        overrides: Sequence[str],
        mode: Mode,
        code: GivenCode | None,
        uncertainty: Uncertainty | None,
        ranks: RankOne | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        """Open the checkpoints; the arguments are those of `predict`."""
        check_format(out)
        check_out(out)
        self._members = open_members(checkpoints, _in_terms_of_training(overrides), code)
        self._task = self._members[0]
        run = self._task.run
        without_dropping(run.data)
        self._spec = batch_spec(run)
        self._uncertainty = uncertainty
        self._labelled = None
        self._factors: list[float] = []
        extras: dict[str, int] = {}
        if uncertainty is not None:
            check_packages()
            check_uncertainty(self._members, uncertainty)
            extras = extra_widths(self._task.info)
            if uncertainty.calibrate is not None:
                self._labelled = labelled(self._task, uncertainty.calibrate, "--calibrate")
                on_one_rank(self._refuse_training_proteins)
        self._extras = extras
        self._ranks, self._kept = ranks, None
        if keep:
            if out.suffix == ".h5":
                raise UserError(
                    f"--keep-columns: columns are kept in tables; give --out {out.with_suffix('.csv')}"
                )
            self._kept = on_one_rank(lambda: KeptColumns(input, run.data, list(keep)))
        super().__init__(input, mode, run, PredictionTarget.of(out, self._task.info, extras, ranks))

    def _refuse_training_proteins(self) -> None:
        """Refuse to calibrate on proteins that a member was trained on, on which its errors are too small."""
        assert self._labelled is not None
        for member in self._members:
            # RUN/checkpoints/step_N
            table = training_table(real_path(member.start.path).parent.parent)
            if table is not None and (count := num_in_table(self._labelled, table)):
                raise UserError(
                    f"--calibrate {self._labelled.path}: {count} of its {len(self._labelled)} proteins are "
                    f"in {table}, on which the model was trained, so intervals would be too narrow; give "
                    "others"
                )

    def check(self, store: TokenStore) -> None:
        data = self.run.data
        if data.too_long == "error":
            refuse_long(store, data.max_seq_length - 2, self.input, "set --too-long crop")

    def checksum(self) -> str:
        sums = [source_of(member.start).checksum() for member in self._members]
        return sums[0] if len(sums) == 1 else hashlib.sha256(" ".join(sums).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        run, shape = self.run, self._spec.pack_shape()
        head = self._task.head
        own = [] if head.is_configured or head.code is None else [head.code.as_dict()]
        meaning = json.dumps([self._task.info.to_dict(), head_form(run.task), *own])
        return {
            "task_hash": hashlib.sha256(meaning.encode()).hexdigest(),
            "precision": run.model.precision,
            **sizes_that_round(run.parallel),
            "too_long": run.data.too_long,
            "crop": run.data.crop,
            "max_seq_length": run.data.max_seq_length,
            "micro_batch_tokens": run.train.micro_batch_tokens,
            "packing": shape.packing,
            "pack_window": shape.window,
            "seed": run.seed,
            # As earlier versions note it.
            **({"ranks": self._ranks == "highest" or self._ranks} if self._ranks else {}),
            **({} if self._kept is None else {"kept_columns": self._kept.names}),
            **self._how(),
        }

    def _how(self) -> dict[str, Any]:
        """Return the settings of the uncertainty, if there is one."""
        how = self._uncertainty
        if how is None:
            return {}
        table = None if self._labelled is None else self._labelled.fingerprint
        draws = how.samples or len(self._members)
        return {"uncertainty": how.kind, "num_draws": draws, "calibrated_on": table}

    def contents(self, store: TokenStore, attributes: dict[str, Any]) -> PredictionContents:
        return PredictionContents(
            *(store, attributes, self._task.info, self._spec, self._extras, self._ranks, self._kept)
        )

    def load(self, contents: PredictionContents, ranks: Ranks) -> Compute:
        if self._uncertainty is not None:
            return self._load_draws(self._uncertainty, contents, ranks)
        task = self._task
        chunks = load_task(task, ranks)
        self._note_computing(chunks, ranks)
        for chunk in chunks:
            chunk.eval()
        collecting = Collecting(loss_of_task(task.run.task, task.info), task.predict, task.info)

        def compute(piece: int) -> Iterator[tuple[int, Iterable[Write]]]:
            batches = map(contents.packs.batch, contents.pack_numbers(piece))
            for count, _ in run_groups(chunks, collecting, batches, ranks):
                if collecting.not_finite is not None:
                    name = contents.store.id(collecting.not_finite)
                    raise not_finite(name, "its prediction", task.start.path)
                found, collecting.seen = collecting.seen, []
                yield count, (write for each in found for write in contents.stored(each))

        return compute

    def _note_computing(self, chunks: Sequence[Any], ranks: Ranks) -> None:
        trained = self._task.start.run.model.precision
        self.computing = describe_computing(chunks[0].config, ranks.device, trained)

    def _load_draws(self, how: Uncertainty, contents: PredictionContents, ranks: Ranks) -> Compute:
        """Load what predicts several times, and calibrate its intervals where that is asked for."""
        draws = Draws(self._members, how, ranks)
        self._note_computing(draws.models[0], ranks)
        if self._labelled is not None:
            draws.calibrate(self._labelled, str(how.calibrate))
        self._factors = draws.factor
        factor = np.array(draws.factor)

        def compute(piece: int) -> Iterator[tuple[int, Iterable[Write]]]:
            numbers = iter(contents.pack_numbers(piece))
            while group := list(islice(numbers, AT_ONCE)):
                batches = [contents.packs.batch(number) for number in group]
                found = draws.predict(batches, contents.store.id)
                yield (
                    len(group),
                    (
                        write
                        for each in found
                        for name, values in each.summary.arrays(factor).items()
                        for write in contents.stored({**each.kept, "values": values}, name)
                    ),
                )

        return compute

    def report(self, contents: PredictionContents, made: Sequence[Path]) -> list[str]:
        lines = [f"{len(contents)} proteins of {self.input}: {self._task.info.kind} in {self.target.out}"]
        lines += self._uncertainty_lines()
        if cropped := int(contents.truncated.sum()):
            data = self.run.data
            lines.append(
                f"{cropped} of {len(contents)} proteins of {self.input} have more than "
                f"{data.max_seq_length - 2} residues and are cropped ({data.crop})"
            )
        return lines

    def _uncertainty_lines(self) -> list[str]:
        how, info = self._uncertainty, self._task.info
        if how is None:
            return []
        by = (
            f"{len(self._members)} checkpoints"
            if how.kind == "ensemble"
            else f"{how.samples} samples of dropout"
        )
        if "sd" not in self._extras:
            return [f"mean over {by}, with entropy and mutual information in nats"]
        factors = ", ".join(
            f"{x:.4g}" for x in (self._factors[:1] if how.calibrate is None else self._factors)
        )
        if self._labelled is None:
            return [
                f"mean and sd over {by}; 95 % intervals (mean ± {factors} sd) are for the prediction of one "
                "more such model; measurement noise is not included"
            ]
        names = f" of {', '.join(info.names)}" if len(info.names) > 1 else ""
        return [
            f"mean and sd over {by}; intervals (mean ± {factors} sd{names}), calibrated on "
            f"{len(self._labelled)} proteins of {how.calibrate}, are expected to contain 95 % of the labels "
            "of similar proteins"
        ]


def _in_terms_of_training(overrides: Sequence[str]) -> list[str]:
    """Repeat under the keys of fine-tuning what `overrides` say under keys of inference.

    Raises:
        UserError: `infer.too_long` is what only other commands can do.
    """
    found = dict(zip(_AS_IN_TRAINING, values_of([*_AS_IN_TRAINING], None, overrides), strict=True))
    too_long = found["infer.too_long"]
    if too_long not in (None, *_TOO_LONG):
        raise UserError(
            f"infer.too_long={too_long} (--too-long) is not one of {', '.join(_TOO_LONG)}, which "
            "`predict` takes"
        )
    said = [f"{_AS_IN_TRAINING[key]}=${{{key}}}" for key, value in found.items() if value is not None]
    return [*overrides, *said]
