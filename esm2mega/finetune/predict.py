"""`esm2mega predict`: a fine-tuned head on proteins without labels, in input order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esm2mega.data.labels.dataset import apply_length_policy, read_unlabelled
from esm2mega.errors import UserError
from esm2mega.files import check_out
from esm2mega.finetune.checkpoint import open_task, run_task, without_dropping
from esm2mega.finetune.output import check_format, check_kind, write_predictions


def predict(
    checkpoint: str | Path,
    input: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
) -> list[str]:
    """Predict every protein of a file.

    Args:
        checkpoint: As for `esm2mega.finetune.checkpoint.open_task`.
        input: FASTA, CSV, Parquet and others, also compressed.
        out: CSV, Parquet or HDF5, by the ending of the name.
        overrides: ``key=value`` over the configuration of the checkpoint.
        overwrite: Replace what is there.

    Returns:
        What there is to say about it.
    """
    path = Path(out)
    check_format(path)
    check_out(path)
    if path.exists() and not overwrite:
        raise UserError(f"{out}: exists; replace it with --overwrite, or choose another --out")
    task = open_task(checkpoint, overrides)
    check_kind(path, task.info)
    data = without_dropping(task.run.data)
    proteins = apply_length_policy(read_unlabelled(input, data), data, str(input))
    measured, is_main = run_task(task, proteins, "predict")
    if is_main:
        assert measured.predictions is not None
        write_predictions(path, measured.predictions, task.info, proteins, data.max_seq_length - 2)
    return [f"{len(proteins)} proteins of {input}: {task.info.kind} in {out}", *proteins.notes]
