"""`predict` runs a fine-tuned model on proteins without labels, with any number of processes and starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from esm2mega.checkpoint.finite import not_finite
from esm2mega.config.head_form import head_form
from esm2mega.config.load import values_of
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from esm2mega.files import check_out
from esm2mega.finetune.checkpoint import load_task, open_task, without_dropping
from esm2mega.finetune.evaluate import Collecting
from esm2mega.finetune.losses import loss_of_task
from esm2mega.finetune.prediction_files import PredictionContents, PredictionTarget, check_format
from esm2mega.finetune.run import batch_spec
from esm2mega.finetune.user_code import GivenCode
from esm2mega.infer.contents import Write
from esm2mega.infer.job import Compute, Job, refuse_long, run_job
from esm2mega.infer.source import source_of
from esm2mega.infer.target import Mode
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
    checkpoint: str | Path,
    input: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    mode: Mode = "new",
    code: GivenCode | None = None,
) -> list[str]:
    """Predict every protein of a file; all ranks call this together.

    Args:
        checkpoint: As for `esm2mega.finetune.checkpoint.open_task`.
        input: FASTA, CSV, Parquet and others, also compressed; or a token store.
        out: CSV, Parquet or HDF5, by the ending of the name.
        overrides: ``key=value`` over the configuration of the checkpoint.
        mode: What to do about an output that exists already.
        code: The user's own head, if it was trained with such; its loss only if that turns outputs into
            predictions.

    Returns:
        A report for the reader.

    Raises:
        UserError: The input or the settings are not valid, or the output exists already.
    """
    return run_job(PredictJob(checkpoint, str(input), Path(out), overrides, mode, code))


class PredictJob(Job):
    """Computes the outputs of a head, pack by pack."""

    name = "predict"
    unit = "pack"
    allow_unknown = True

    def __init__(
        self,
        checkpoint: str | Path,
        input: str,
        out: Path,
        overrides: Sequence[str],
        mode: Mode,
        code: GivenCode | None,
    ) -> None:
        """Open the checkpoint; the arguments are those of `predict`."""
        check_format(out)
        check_out(out)
        self._task = open_task(checkpoint, _in_terms_of_training(overrides), code)
        run = self._task.run
        without_dropping(run.data)
        self._spec = batch_spec(run.data, run.train, run.seed)
        super().__init__(input, mode, run, PredictionTarget.of(out, self._task.info))

    def check(self, store: TokenStore) -> None:
        data = self.run.data
        if data.too_long == "error":
            refuse_long(store, data.max_seq_length - 2, self.input, "set --too-long crop")

    def checksum(self) -> str:
        return source_of(self._task.start).checksum()

    def settings(self) -> dict[str, Any]:
        run, shape = self.run, self._spec.pack_shape()
        head = self._task.head
        own = [] if head.is_configured or head.code is None else [head.code.as_dict()]
        meaning = json.dumps([self._task.info.to_dict(), head_form(run.task), *own])
        return {
            "task_hash": hashlib.sha256(meaning.encode()).hexdigest(),
            "precision": run.model.precision,
            "tensor_model_parallel_size": run.parallel.tensor_model_parallel_size,
            "too_long": run.data.too_long,
            "crop": run.data.crop,
            "max_seq_length": run.data.max_seq_length,
            "micro_batch_tokens": run.train.micro_batch_tokens,
            "packing": shape.packing,
            "pack_window": shape.window,
            "seed": run.seed,
        }

    def contents(self, store: TokenStore, attributes: dict[str, Any]) -> PredictionContents:
        return PredictionContents(store, attributes, self._task.info, self._spec)

    def load(self, contents: PredictionContents, ranks: Ranks) -> Compute:
        task = self._task
        chunks = load_task(task, ranks)
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

    def report(self, contents: PredictionContents, made: Sequence[Path]) -> list[str]:
        lines = [f"{len(contents)} proteins of {self.input}: {self._task.info.kind} in {self.target.out}"]
        if cropped := int(contents.truncated.sum()):
            data = self.run.data
            lines.append(
                f"{cropped} of {len(contents)} proteins of {self.input} have more than "
                f"{data.max_seq_length - 2} residues and are cropped ({data.crop})"
            )
        return lines


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
