"""Converts what a trial has trained to another format and back, and compares it with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from esm2mega.checkpoint.layout import step_dir
from esm2mega.checkpoint.tensor_filter import OPTIMIZER
from esm2mega.checkpoint.tensors import TensorReader
from esm2mega.convert.convert import convert
from esm2mega.convert.files.iupac import TAPE_TOKENS, esm_ids
from esm2mega.convert.name_table import OUTPUT_BIAS, TABLE
from esm2mega.convert.verify.verify import difference_of_models
from esm2mega.prove.compare import EXPORT, Difference, Outcome, distance

_NO_WEIGHTS = (OPTIMIZER, "main.")


def export_differences(
    reference: Outcome, trial: Outcome, format_name: str, out: Path
) -> Iterator[Difference]:
    """Compare what comes back from another format with the reference, and what is computed there.

    Args:
        reference: The training of one process.
        trial: The training at another layout, whose last checkpoint is converted.
        format_name: ``tape`` or ``proteinlm``.
        out: Existing directory for the conversions.

    Yields:
        For each tensor, that of the conversion and back from that of the reference, without the tokens that
        the other format does not have; and the difference of the logits that a plain computation finds in
        the other format from those of this package, in fp64.
    """
    conversion = convert(step_dir(trial.run_dir, trial.steps), out / "there", format_name)
    convert(conversion.target, out / "back", "esm2mega")
    reader = TensorReader(out / "back")
    back = reader.read_many(reader.index)
    trained = {
        name: value for name, value in reference.checkpoint.items() if not name.startswith(_NO_WEIGHTS)
    }
    rows = torch.tensor(esm_ids(TAPE_TOKENS))
    for name in trained.keys() | back.keys():
        value = float("inf")
        if name in trained and name in back:
            found, expected = back[name], trained[name]
            if name in (TABLE, OUTPUT_BIAS):
                found, expected = found[rows], expected[rows]
            if found.shape == expected.shape:
                value = distance(found, expected, expected)
        yield Difference(EXPORT, name, f"back from {format_name}", value)
    yield Difference(EXPORT, "logits", f"in {format_name}", difference_of_models(conversion, "fp64"))
