"""Converts a checkpoint from one format to another, completely or not at all, and reports what changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from esm2mega.convert.checksum import foreign_sha256, weights_sha256
from esm2mega.convert.finite import cast_and_counted, note_not_finite
from esm2mega.convert.formats.esm2mega import default_dtype
from esm2mega.convert.formats.registry import WITH_OTHER_HEADS, load_format, read_weights
from esm2mega.convert.heads import tape_heads
from esm2mega.convert.heads.cerebras_classifier import parameters_of
from esm2mega.convert.heads.contact_head import is_contact_head, with_published_head
from esm2mega.convert.heads.hf_classifiers import architecture_of, find_equal, with_unit_scale
from esm2mega.convert.heads.plain_head import CONFIG_FILE, HEAD_FILE, is_plain, write_plain
from esm2mega.convert.history import TRAINING, as_record, benchmark_scores, history_of
from esm2mega.convert.lazy_weights import Description, HeadDescription, Notes, Weights, dtype_name
from esm2mega.convert.model_card import Card, check_license, write_card
from esm2mega.convert.start_point import OWN, find_source
from esm2mega.errors import UserError
from esm2mega.files import appearing, refuse_existing

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Conversion:
    """Holds the result of a conversion, with everything that is reported about it.

    Attributes:
        description: Describes the target, except that its head keeps the scale of the labels of the source.
        num_tensors: Number of tensors, counted by our names.
        drop: Shell patterns of the tensors that were left out.
    """

    source: Path
    source_format: str
    target: Path
    target_format: str
    description: Description
    num_tensors: int
    notes: Notes
    drop: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the lines of a report that names everything but tensors that moved unchanged."""
        shape = self.description.shape
        return [
            f"{self.source_format} {self.source} -> {self.target_format} {self.target}",
            f"{shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_attention_heads} heads, "
            f"FFN {shape.ffn_hidden_size}, {dtype_name(self.description.dtype)}, "
            f"LayerNorm epsilon {self.description.layernorm_epsilon:g}, {self.description.activation}; "
            f"{self.num_tensors} tensors",
            *self.notes.lines(),
        ]


def convert(
    source: Path,
    target: Path,
    to: str,
    source_format: str | None = None,
    dtype: str | None = None,
    drop: Sequence[str] = (),
    drop_head: bool = False,
    license: str | None = None,
    results: Path | None = None,
) -> Conversion:
    """Convert a checkpoint from any readable format to a writable one.

    Args:
        source: File or directory in any readable format; or a run, which means one of its checkpoints.
        target: File or directory to make; it must not exist, and gets its name when it is complete.
        to: Format to write.
        source_format: Format of the source; None to detect it.
        dtype: One of `DTYPES`, or None to keep that of the source.
        drop: Shell patterns of the source's tensors that have no known meaning and are left out.
        drop_head: Whether to leave out the head and convert the encoder alone.
        license: Identifier of the licence on the Hub, for the model card that ``hf`` has.
        results: Folder of a suite of benchmarks that measured the source, for the card.

    Raises:
        UserError: The source cannot be read or does not fit the target, the target exists, or the results are
            those of other weights.
        OSError: The disk is full, or a file cannot be written for another reason. Nothing is left behind.
    """
    check_license(license)
    for option, value in (("--license", license), ("--results", results)):
        if value is not None and to != "hf":
            raise UserError(f"{option} is for the model card of --to hf; leave it out")
    writer = load_format(to)
    for path in (target, *([] if writer.IS_DIRECTORY else writer.beside(target))):
        refuse_existing(path)
    files, source_format = find_source(source, source_format)
    source, weights = files.path, read_weights(files, source_format, drop)
    scores = []
    if results is not None:
        is_own = source_format == OWN
        scores = benchmark_scores(results, weights_sha256(source) if is_own else _foreign(weights))
    if weights.description.family not in writer.FAMILIES:
        raise UserError(
            f"{source}: holds a model of family {weights.description.family}; {to} holds "
            f"{' or '.join(writer.FAMILIES)}, which compute something else"
        )
    if drop_head:
        weights = without_head(weights)
    if weights.description.head != "lm" and to not in WITH_OTHER_HEADS:
        raise UserError(
            f"{source}: holds {_what_instead(weights.description)}; {to} holds masked language models only: "
            f"write {' or '.join(WITH_OTHER_HEADS)}"
        )
    target_dtype = DTYPES[dtype] if dtype is not None else weights.description.dtype
    if to == "esm2mega" and dtype is None:
        target_dtype = default_dtype(target_dtype)
    head, beside, contacts = weights.description.head, None, None
    if isinstance(head, HeadDescription) and to in tape_heads.HEADS:
        tape_heads.equal_head(head, to)
        weights = with_unit_scale(weights, target_dtype)
    elif isinstance(head, HeadDescription) and to != "esm2mega":
        if to == "hf" and is_contact_head(head):
            weights, head, contacts = with_published_head(weights), None, head
        elif to == "hf" and find_equal(head) is None and head.is_configured and is_plain(head.task):
            beside, head = (head, with_unit_scale(weights, target_dtype)), None
            weights = without_head(weights, f"written to {HEAD_FILE} and {CONFIG_FILE} beside the encoder")
        else:
            _CHECK_HEAD[to](head)
            weights = with_unit_scale(weights, target_dtype)
    weights, finite = cast_and_counted(weights, target_dtype)

    history = history_of(source) if source_format == OWN and to in (OWN, "hf") else None
    if to == OWN and history is not None:
        weights.origin[TRAINING] = as_record(history)
    with appearing(target, writer.IS_DIRECTORY) as path:
        writer.write(weights, path)
        if beside is not None:
            write_plain(*beside, target_dtype, path)
        if to == "hf":
            described = replace(weights.description, head=head)
            card = Card(
                target.name,
                described,
                source_format,
                history,
                scores,
                license,
                weights.notes.lines(),
                beside=None if beside is None else beside[0],
                contacts=contacts,
            )
            write_card(card, path)
    note_not_finite(weights, finite)
    return Conversion(
        source,
        source_format,
        target,
        to,
        replace(weights.description, head=head),
        len(weights.infos),
        weights.notes,
        tuple(drop),
    )


_CHECK_HEAD: dict[str, Callable[[HeadDescription], Any]] = {"hf": architecture_of, "cerebras": parameters_of}
"""These refuse the head of a task that a format has no equivalent of."""


def _foreign(weights: Weights) -> str:
    """Return the checksum by which a suite of benchmarks knows weights in another format."""
    return foreign_sha256(weights.cast(default_dtype(weights.description.dtype)))


def without_head(weights: Weights, why: str = "as asked for") -> Weights:
    """Reduce a model to its encoder, and note the tensors that are left out, and why."""
    description = replace(weights.description, head=None)
    kept = {name: info for name, info in weights.infos.items() if name in description.shapes}
    if dropped := [name for name in weights.infos if name not in kept]:
        weights.notes.dropped.append(f"{', '.join(dropped)}: the head, {why}")
    return replace(weights, description=description, infos=kept)


def _what_instead(description: Description) -> str:
    head = description.task
    return "no head" if head is None else f"the head of a task (task.kind={head.task.kind})"
