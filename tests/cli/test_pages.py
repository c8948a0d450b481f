"""README and docs: the tree is the real one, links, keys, paths and tables say what is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from esm2mega.config.keys import known_keys
from esm2mega.config.load import load_run
from esm2mega.config.schema import EarlyStoppingConfig, Run
from esm2mega.config.validate import validate
from esm2mega.data.stream.build import StreamState
from tests.cli.pages import DOCS, PAGES, README, ROOT, TEXT, TUTORIALS, blocks, name_of, spans


def printed_tree() -> Iterator[tuple[str, str]]:
    """(folder, clause) of each line of the README's tree of the package."""
    tree = next(block for block in blocks(TEXT[README], "") if block.startswith("esm2mega/\n"))
    parents: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, clause = line.strip().partition(" ")
        parents[depth:] = [name]
        yield "".join(parents), clause.strip()


def test_tree_is_that_of_the_package() -> None:
    printed = [folder for folder, _ in printed_tree()]
    real = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / "esm2mega").rglob("*.py")}
    assert sorted(printed) == sorted(real)


def test_every_folder_of_the_tree_has_a_clause() -> None:
    assert [folder for folder, clause in printed_tree() if folder != "esm2mega/" and not clause] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name_of(page)} links to {target}"


SECTIONS = {key.partition(".")[0] for key in known_keys() if "." in key}
KEYS = {*known_keys(), "train.early_stopping"}


def mentioned_keys(page: Path) -> Iterator[str]:
    """Whatever looks like a configuration key in backticks: section.name, or name=value on its own."""
    dotted = re.compile(rf"(?<![\w./-])(?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z_]+)+(?![\w(/])")
    for span in spans(page):
        yield from dotted.findall(span)
        for word in span.split():
            if found := re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)*)=[^=\"'\s]+", word):
                yield found.group(1)


@pytest.mark.parametrize("page", [README, *DOCS, *TUTORIALS], ids=name_of)
def test_configuration_keys_exist(page: Path) -> None:
    # `key=value` is the form itself; is_host is torchrun's.
    assert [key for key in mentioned_keys(page) if key not in KEYS | {"key", "is_host"}] == []


def test_keys_are_found_in_the_text() -> None:
    found = {key for page in (README, *DOCS) for key in mentioned_keys(page)}
    assert {"train.micro_batch_tokens", "checkpoint.resume", "init_from", "optim.lr"} <= found
    assert {field.name for field in fields(Run)} >= SECTIONS
    assert {f"train.early_stopping.{field.name}" for field in fields(EarlyStoppingConfig)} <= KEYS


@pytest.mark.parametrize("page", [README, *DOCS, *TUTORIALS], ids=name_of)
def test_paths_exist(page: Path) -> None:
    tops = "esm2mega|tests|conf|examples|benchmarks|docs|tools"
    for span in spans(page):
        for word in span.split():
            if re.fullmatch(rf"(?:{tops})/[\w./*-]*", word):
                assert list(ROOT.glob(word.rstrip("/"))), f"{name_of(page)}: {word}"
            elif re.fullmatch(r"[a-z0-9_]+\.py", word):
                assert any(ROOT.glob(f"*/**/{word}")), f"{name_of(page)}: {word}"


@pytest.mark.parametrize("page", [README, *DOCS, *TUTORIALS], ids=name_of)
def test_yaml_blocks_are_valid_configurations(page: Path, tmp_path: Path) -> None:
    for text in blocks(TEXT[page], "yaml"):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        validate(load_run(str(file)), 1)


def test_extras_are_those_of_setup_py() -> None:
    table = TEXT[README].partition("| extra |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    extras = (ROOT / "setup.py").read_text().partition("extras_require")[2]
    shipped = re.findall(r'^        "(\w+)": ', extras, re.MULTILINE)
    assert sorted(listed) == sorted(shipped)


def test_what_a_checkpoint_refuses_is_what_the_docs_say() -> None:
    """The keys of the stream's identity are those in the table of refused changes, the store aside."""
    from esm2mega.config.schema import DataConfig
    from esm2mega.data.stream.build import BatchSpec
    from esm2mega.data.stream.loader import TrainStream

    class Store:
        lengths = np.array([5], dtype=np.int32)
        fingerprint = "x"
        clusters = None

        def __len__(self) -> int:
            return 1

    specs = (BatchSpec(DataConfig(), 2048, 1), BatchSpec(DataConfig(), 2048, 1, global_batch_size=8))
    streams = [TrainStream([Store()], spec) for spec in specs]  # type: ignore[list-item]
    assert all(stream.state == StreamState() for stream in streams)
    identity = {key for stream in streams for key in stream.state_dict()["identity"] if key in KEYS}
    (row,) = re.findall(
        r"^\| content of the store, (.*?) \| refused", TEXT[ROOT / "docs/checkpoints.md"], re.M
    )
    assert set(re.findall(r"`([^`]+)`", row)) == identity
