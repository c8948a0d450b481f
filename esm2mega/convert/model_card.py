"""Writes the model card, ``README.md``, of a directory that is made to be shared, from what is known."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from esm2mega.config.head_form import head_form
from esm2mega.config.hub import shared_name
from esm2mega.convert.card_recipe import recipe
from esm2mega.convert.heads.hf_classifiers import TOKEN, architecture_of
from esm2mega.convert.heads.plain_head import CONFIG_FILE, HEAD_FILE, READER
from esm2mega.convert.history import NOT_WRITTEN, History, Score, file_checksums, malformed
from esm2mega.convert.lazy_weights import Description, HeadDescription, dtype_name
from esm2mega.convert.markdown import count, plain, table
from esm2mega.convert.name_table import CONTACT_HEAD, FREQUENCIES
from esm2mega.errors import UserError
from esm2mega.report.decimals import four_decimals
from esm2mega.version import __version__

CARD = "README.md"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_TAGS = ["biology", "protein", "esm", "esm2", "esm2mega"]
_MOST_OUTPUTS = 50
_EXAMPLE = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


@dataclass(frozen=True)
class Card:
    """Holds what a model card is made of.

    Attributes:
        name: Name of the model, which is that of its directory.
        description: The model; for adapters, the model that they make of their base.
        source: Format of what was converted; None where adapters were exported.
        history: What is known of the training, if there was one here.
        scores: What benchmarks measured.
        license: Identifier of the licence on the Hub; None if it was not given.
        notes: What the conversion changed.
        base: For a directory of adapters, the name of their base; None for a whole model.
        beside: The head that lies in files of its own beside the encoder, if one does.
        contacts: The head that became the contact head of transformers, if one did.
    """

    name: str
    description: Description
    source: str | None = None
    history: History | None = None
    scores: Sequence[Score] = ()
    license: str | None = None
    notes: Sequence[str] = ()
    base: str | None = None
    beside: HeadDescription | None = None
    contacts: HeadDescription | None = None

    @property
    def task(self) -> HeadDescription | None:
        """The head of a task, wherever it lies; None for a model without one."""
        return self.description.task or self.beside or self.contacts

    @property
    def has_lost_head(self) -> bool:
        """Whether the training had a task whose head was left out, with which its metrics go."""
        return self.task is None and self.history is not None and self.history.run.task.kind is not None


def check_license(identifier: str | None) -> None:
    """Raise `UserError` unless a licence is written as the Hub writes its identifiers."""
    if identifier is not None and not _LICENCE.fullmatch(identifier):
        raise UserError(
            f"--license {identifier!r} is no identifier of the Hub; write it as apache-2.0, mit, cc-by-4.0, "
            "or other"
        )


def write_card(card: Card, folder: Path) -> None:
    """Write the card beside the finished files of a directory, whose checksums it lists.

    Raises:
        UserError: What the checkpoint holds of its training is not what this package writes.
    """
    try:
        text = card_text(card, file_checksums(folder))
    except NOT_WRITTEN as error:
        raise UserError(f"{card.name}: {malformed(error)}") from error
    (folder / CARD).write_text(text, encoding="utf-8")


def card_text(card: Card, checksums: Mapping[str, str]) -> str:
    """Return the card: front matter as the Hub reads it, then sections in Markdown."""
    front = yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", f"# {plain(card.name)}", _introduction(card)]
    parts += ["## How to use it", *_usage(card)]
    if card.task is not None:
        parts += ["## What it predicts", *_outputs(card.task)]
    if card.history is not None:
        parts += ["## Training data", *_data(card.history)]
        parts += ["## Training", table(("setting", "value"), recipe(card.history))]
    if measured := list(_measured(card)):
        parts += ["## Evaluation", *measured]
    if card.notes:
        parts += ["## Conversion", "\n".join(f"- {plain(note)}" for note in card.notes)]
    licence = f"`{card.license}`" if card.license else "No licence was stated when this card was written."
    parts += ["## Licence", licence, "## Checksums"]
    parts += [table(("file", "SHA-256"), ((f"`{name}`", f"`{value}`") for name, value in checksums.items()))]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> dict[str, Any]:
    front: dict[str, Any] = {"license": card.license} if card.license else {}
    front["library_name"] = "transformers" if card.base is None else "peft"
    origin = None if card.history is None else card.history.run.init_from
    # The Hub links a model to the one that it was made from.
    if origin is not None and "/" in (name := shared_name(origin)):
        front["base_model"] = name
    front["pipeline_tag"] = _pipeline(card)
    kinds = [] if card.task is None else [str(card.task.task.kind).replace("_", "-")]
    front["tags"] = [*_TAGS, *kinds, *(["lora"] if card.history and card.history.adapters else [])]
    return front


def _pipeline(card: Card) -> str:
    task = card.description.task
    if task is not None:
        return "token-classification" if architecture_of(task) == TOKEN else "text-classification"
    return "fill-mask" if card.description.head == "lm" else "feature-extraction"


def _architecture(card: Card) -> str:
    task = card.description.task
    if task is not None:
        return architecture_of(task)
    return "EsmForMaskedLM" if card.description.head == "lm" else "EsmModel"


def _introduction(card: Card) -> str:
    shape, history = card.description.shape, card.history
    parameters = sum(
        math.prod(size)
        for name, size in card.description.shapes.items()
        if name != FREQUENCIES and not name.startswith(CONTACT_HEAD)
    )
    kind = "protein language model" if card.description.head == "lm" else "protein encoder"
    if card.task is not None:
        task = str(card.task.task.kind).replace("_", " ")
        kind = f"model for {'contact prediction' if task == 'contact' else task} of proteins"
    layout = (
        f"{shape.num_layers} layers, hidden size {shape.hidden_size:,}, {shape.num_attention_heads} heads, "
        f"feed-forward width {shape.ffn_hidden_size:,}, {parameters:,} parameters, "
        f"{dtype_name(card.description.dtype)}"
    )
    what = f"An ESM-2 {kind}" if card.base is None else f"LoRA adapters of an ESM-2 {kind}"
    made = (
        f"{_training(history)} with esm2mega {history.version} on Megatron-Core"
        if history is not None
        else f"converted from {_ORIGINS.get(card.source or '', card.source)} by esm2mega {__version__}; "
        "nothing is recorded of its training"
    )
    return f"{what}, {made}.\n\nShape: {layout}."


def _training(history: History) -> str:
    if history.run.init_from is None:
        return "trained"
    return "further pretrained" if history.run.task.kind is None else "fine-tuned"


_ORIGINS = {
    "esm2mega": "a checkpoint of esm2mega",
    "hf": "a directory of Hugging Face",
    "fair-esm": "a file of fair-esm",
    "te": "a directory of NVIDIA's Transformer Engine ESM-2",
    "cerebras": "a file of Cerebras Model Zoo",
    "nemo1": "a checkpoint of BioNeMo 1 or NeMo 1",
    "nemo2": "a checkpoint of BioNeMo 2 or NeMo 2",
}


def _usage(card: Card) -> Iterator[str]:
    architecture = _architecture(card)
    yield "`NAME` is this folder, or the `owner/name` under which it lies on a hub."
    lines = [
        f"from transformers import AutoTokenizer, {architecture}",
        "",
    ]
    # Other implementations of attention give no maps, of which contacts are made.
    eager = "" if card.contacts is None else ', attn_implementation="eager"'
    if card.base is None:
        lines += [
            'tokenizer = AutoTokenizer.from_pretrained("NAME")',
            f'model = {architecture}.from_pretrained("NAME"{eager}).eval()',
        ]
    else:
        lines[0] = f"from peft import PeftModel\n{lines[0]}"
        lines += [
            'tokenizer = AutoTokenizer.from_pretrained("BASE")',
            f'base = {architecture}.from_pretrained("BASE"{_num_labels(card)})',
            'model = PeftModel.from_pretrained(base, "NAME").eval()',
        ]
        yield f"`BASE` is the model that the adapters belong to, {plain(card.base)}."
    lines.append(f'inputs = tokenizer(["{_EXAMPLE}"], return_tensors="pt", padding=True)')
    if card.contacts is not None:
        lines.append('outputs = model.predict_contacts(inputs["input_ids"], inputs["attention_mask"])')
    else:
        result = "last_hidden_state" if architecture == "EsmModel" else "logits"
        lines.append(f"outputs = model(**inputs).{result}")
    yield "```python\n" + "\n".join(lines) + "\n```"
    if card.beside is not None:
        yield (
            f"That is the encoder. Its head lies in `{HEAD_FILE}` and `{CONFIG_FILE}`. Here `NAME` is the "
            "folder; `hf download owner/name --local-dir NAME` fetches it from a hub."
        )
        yield f"```python\n{READER}\n```"
    yield "With esm2mega:"
    yield "```bash\n" + "\n".join(_commands(card)) + "\n```"


def _num_labels(card: Card) -> str:
    task = card.description.task
    return "" if task is None else f", num_labels={task.info.num_outputs}"


def _commands(card: Card) -> list[str]:
    if card.base is not None:
        first = "esm2mega lora import NAME --base BASE --out adapted"
        if card.description.task is not None:
            return [first, "esm2mega predict adapted proteins.fasta --out predictions.csv"]
        return [first, "esm2mega embed adapted proteins.fasta --out proteins.h5"]
    if card.description.task is not None:
        return [
            "esm2mega convert NAME model --to esm2mega",
            "esm2mega predict model proteins.fasta --out predictions.csv",
        ]
    wanted = "" if card.contacts is None else " --include contacts"
    return [f"esm2mega embed NAME proteins.fasta --out proteins.h5{wanted}"]


def _outputs(head: HeadDescription) -> Iterator[str]:
    """Describe a head; of many outputs the first ones are listed."""
    info = head.info
    yield f"Task: {str(info.kind).replace('_', ' ')}. Head: {' '.join(head_form(head.task))}."
    columns = ["output", "name"]
    if info.counts:
        columns.append("training labels")
    if info.std:
        columns += ["mean of the labels", "standard deviation"]
    rows = []
    for number, name in enumerate(info.output_names[:_MOST_OUTPUTS]):
        row = [str(number), plain(name)]
        if info.counts:
            row.append(f"{info.counts[number]:,}")
        if info.std:
            row += [f"{info.mean[number]:.6g}", f"{info.std[number]:.6g}"]
        rows.append(row)
    yield table(columns, rows)
    if (more := info.num_outputs - len(rows)) > 0:
        yield f"And {more:,} more, which `config.json` or `head.json` names."
    if info.std:
        yield "Predictions are in the units of the labels."


def _data(history: History) -> Iterator[str]:
    uses = {"train": "training", "valid": "validation", "test": "test"}
    yield table(
        ("used for", "name", "proteins", "residues"),
        (
            (uses[each.use], plain(each.name), count(each.proteins), count(each.residues))
            for each in history.data
        ),
    )
    if sources := [source for each in history.data for source in each.sources]:
        yield "Made from these files:"
        yield table(("file", "SHA-256"), ((plain(name), f"`{plain(value)}`") for name, value in sources))
    yield (
        f"Seen in training: {history.samples:,} samples, {history.tokens:,} tokens with `<cls>` and `<eos>`."
    )


def _measured(card: Card) -> Iterator[str]:
    if card.has_lost_head:
        yield "The head of the task is not in this model, so its metrics are not shown."
    for split, words in (("valid", "validation"), ("test", "test")):
        if card.history is not None and not card.has_lost_head and (found := card.history.metrics.get(split)):
            yield f"On the {words} data:"
            yield table(
                ("metric", "value"), ((plain(name), four_decimals(value)) for name, value in found.items())
            )
    if card.scores:
        yield "On benchmarks, by `esm2mega autoeval`, with 95 % intervals over the test proteins:"
        yield table(
            ("task", "mode", "metric", "value", "interval", "test proteins"),
            (
                (
                    *(plain(x) for x in (score.task, score.mode, score.metric)),
                    four_decimals(score.value),
                    ""
                    if score.low is None or score.high is None
                    else f"{four_decimals(score.low)} to {four_decimals(score.high)}",
                    count(score.proteins),
                )
                for score in card.scores
            ),
        )
