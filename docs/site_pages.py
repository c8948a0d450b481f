"""Makes the pages of the site that nobody writes: all configuration keys, all commands, and the Python API.

`docs/conf.py` calls `write_pages` when `make site` builds the site. The pages are not kept: their sources are
`conf/base.yaml` with `config/schema.py`, the options of the commands, and the docstrings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "docs" / "generated"
"""Where the pages are written; git ignores it."""

LAYOUT_LETTERS = (
    "Lengths and batches are counted in tokens, with the `<cls>` and `<eos>` of each protein. Steps are "
    "optimizer steps. T stands for `train.micro_batch_tokens`, TP, PP and CP for the tensor, pipeline and "
    "context parallel sizes, and DP = processes / (TP x PP x CP). `null` means that a key is not set."
)
API = {
    "esm2mega.infer.api": "Embeddings, contacts and scores",
    "esm2mega.finetune.api": "Fine-tuning, evaluation and prediction",
    "esm2mega.finetune.classes": "Fine-tuning by classes of your own",
    "esm2mega.model.heads.task_heads": "Heads",
    "esm2mega.finetune.losses": "Losses",
    "esm2mega.model.pooling": "From residues to one vector",
    "esm2mega.data.store.token_store": "Token stores",
    "esm2mega.checkpoint.tensors": "Tensors of a checkpoint",
    "esm2mega.errors": "Errors",
}
"""The modules for programs that use the package, with the headings under which they are documented."""


@dataclass(frozen=True)
class Key:
    """A configuration key as the reference shows it.

    Attributes:
        name: Its dotted name.
        default: Its default, as a YAML file writes it.
        text: What `conf/base.yaml` says of it: meaning, unit and valid values.
    """

    name: str
    default: str
    text: str


def read_keys(yaml: str) -> Iterator[Key | str]:
    """Read the keys of `conf/base.yaml`, in order; what is said of a section comes as `# section: text`."""
    path: list[str] = []
    comment: list[str] = []
    text = ""
    for line in yaml.splitlines():
        words = line.strip()
        if words.startswith("#"):
            comment.append(words.lstrip("# "))
        elif not words:
            comment, text = [], ""
        else:
            depth = (len(line) - len(line.lstrip())) // 2
            name, _, default = words.partition(":")
            path[depth:] = [name]
            text, comment = " ".join(comment) or text, []
            if default.strip():
                yield Key(".".join(path), default.strip(), text)
            else:
                yield f"# {'.'.join(path)}: {text}"
                text = ""


def keys_page() -> str:
    """Return the reference of all configuration keys as Markdown."""
    from esm2mega.config.keys import known_keys
    from esm2mega.config.schema import Run, choices

    types, closed = known_keys(), choices(Run())
    lines = ["# Configuration keys", "", LAYOUT_LETTERS, ""]
    section = None
    for entry in read_keys((ROOT / "conf" / "base.yaml").read_text()):
        if isinstance(entry, str):
            name, _, text = entry.removeprefix("# ").partition(": ")
            lines += [
                f"{'##' if '.' not in name else '###'} `{name}`",
                "",
                *([_escaped(text), ""] if text else []),
            ]
            section = name.partition(".")[0]
            continue
        if section is None:
            lines += ["## The run", ""]
            section = ""
        values = (
            f"; one of {', '.join(f'`{value}`' for value in closed[entry.name])}"
            if entry.name in closed
            else ""
        )
        kind = _kind(entry.name, types[entry.name])
        lines += [
            f"### `{entry.name}`",
            "",
            f"*{kind}{values}. Default:* `{entry.default}`",
            "",
            _escaped(entry.text),
            "",
        ]
    return "\n".join(lines)


def commands_page() -> str:
    """Return the help of all commands as Markdown."""
    from esm2mega.cli.app import cli

    lines = ["# Commands", "", "What `esm2mega COMMAND --help` prints, in the order of the work.", ""]
    for name, command in _commands(cli, "esm2mega"):
        with click.Context(command, info_name=name, max_content_width=100, terminal_width=100) as context:
            lines += [f"## `{name}`", "", "```text", command.get_help(context), "```", ""]
    return "\n".join(lines)


def api_page() -> str:
    """Return the reference of the Python modules as Markdown for Sphinx, which reads the docstrings."""
    lines = [
        "# Python",
        "",
        "`load`, `Model`, `train_model`, `infer_model` and `evaluate_model` are in `esm2mega` itself; "
        "importing it loads neither torch nor numpy. Everything else is imported from its module.",
        "",
    ]
    for module, title in API.items():
        lines += [f"## {title}", "", "```{eval-rst}", f".. automodule:: {module}", "   :members:", "```", ""]
    return "\n".join(lines)


PAGES = {"keys.md": keys_page, "commands.md": commands_page, "api.md": api_page}


def write_pages() -> None:
    """Write the pages, and leave those alone that have not changed, so that a build can go on."""
    GENERATED.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        path, text = GENERATED / name, page()
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def linked_pages(index: str) -> dict[str, list[str]]:
    """Return the pages that the index lists, below the heading of each list."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        found[title] = re.findall(r"^- \[[^\]]+\]\(([^)#]+\.md)\)", section, re.MULTILINE)
    return found


def _kind(name: str, annotation: Any) -> str:
    """Return the type of a key in words."""
    if annotation is Any:
        return {"data.train": "path or list of paths", "task.mask_column": "text or list of text"}[
            name
        ] + " or null"
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "None": "null"}
    words["typing.Any"] = "value"
    text = str(annotation) if hasattr(annotation, "__args__") else annotation.__name__
    parts = [_words(part.strip(), words) for part in text.split(" | ")]
    return " or ".join(parts)


def _words(part: str, words: dict[str, str]) -> str:
    if part in words:
        return words[part]
    inner = re.fullmatch(r"(?:typing\.)?(list|dict)\[(.+)\]", part, re.IGNORECASE)
    assert inner is not None, f"docs/site_pages.py has no words for the type {part}"
    names = [words[name.strip()] for name in inner[2].split(",")]
    return (
        f"list of {names[0]}s"
        if inner[1] == "list" and names[0] != "text"
        else f"{inner[1]} of {' to '.join(names)}"
    )


def _commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from _commands(child, f"{name} {child.name}")


def _escaped(text: str) -> str:
    """Return a comment as Markdown: outside of backticks nothing is markup."""
    parts = text.split("`")
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"([<*_\[\]{}$~])", r"\\\1", parts[number])
    return "`".join(parts)
