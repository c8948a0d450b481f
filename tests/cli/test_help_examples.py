"""Every example of every `--help` is a command that exists, and that a test runs as it stands or reduced."""

from __future__ import annotations

import csv
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from esm2mega.cli.app import cli, main
from tests.cli.pages import ROOT, Command
from tests.cli.test_page_commands import check
from tests.unit import conftest
from tests.unit.conftest import TinyRun

finished = conftest.finished

SMALL = ("model.size=null", "model.num_layers=2", "model.hidden_size=24", "model.num_attention_heads=3")
BATCH = ("data.max_seq_length=64", "train.micro_batch_tokens=128", "train.global_batch_tokens=256")
MODEL = (*SMALL, "model.ffn_hidden_size=56", "model.precision=fp32", *BATCH)

HERE = {
    "esm2mega pretrain": (*MODEL, "--fast-dev-run"),
    "esm2mega finetune": (),
    "esm2mega predict": (),
    "esm2mega embed": (),
    "esm2mega score": (),
    "esm2mega compare": (),
}
"""Maps commands to the words that are added to the example, which is run below."""

ELSEWHERE = {
    "esm2mega translate": ("tests/unit/config/foreign/test_translate.py", '"translate"'),
    "esm2mega plan": ("tests/unit/plan/test_command.py", '"plan"'),
    "esm2mega convert": ("tests/parity/test_classifiers.py", '"--verify"'),
    "esm2mega probe": ("tests/unit/autoeval/probe/test_run.py", '"probe"'),
    "esm2mega autoeval": ("tests/cli/test_readme.py", '"autoeval"'),
    "esm2mega export": ("tests/unit/export/test_command.py", '"export"'),
    "esm2mega map": ("tests/unit/autoeval/test_embedding_map.py", '"map"'),
    "esm2mega benchmark": ("tests/unit/benchmark/test_command.py", '"benchmark"'),
    "esm2mega drill": ("tests/distributed/test_drill.py", '"drill"'),
    "esm2mega lora merge": ("tests/cli/test_readme.py", '"lora"'),
    "esm2mega lora export": ("tests/unit/cli/test_lora.py", '"export"'),
    "esm2mega lora import": ("tests/unit/cli/test_lora.py", '"import"'),
    "esm2mega prepare flip": ("tests/cli/test_flip.py", '"prepare"'),
    "esm2mega prepare tape": ("tests/unit/finetune/test_label_layouts.py", '"tape"'),
    "esm2mega prepare deeploc2": ("tests/unit/data/benchmarks/test_features.py", '"deeploc2"'),
    "esm2mega prepare contacts": ("tests/unit/data/benchmarks/test_contacts.py", '"contacts"'),
}
"""Maps the others to a test that runs the command, and how it is seen there."""


def examples(command: click.Command = cli, path: str = "esm2mega") -> Iterator[tuple[str, str]]:
    """(command, example) of a command and of all below it."""
    for found in re.findall(r"^Example: (.*(?:\n\S.*)*)", inspect.cleandoc(command.help or ""), re.MULTILINE):
        yield path, " ".join(found.split())
    for name, below in command.commands.items() if isinstance(command, click.Group) else ():
        yield from examples(below, f"{path} {name}")


EXAMPLES = dict(examples())


def test_every_example_is_run() -> None:
    assert set(EXAMPLES) == {*HERE, *ELSEWHERE}
    for page, text in ELSEWHERE.values():
        assert text in (ROOT / page).read_text(), f"{page} does not run {text}"


@pytest.mark.parametrize("line", EXAMPLES.values(), ids=EXAMPLES)
def test_every_example_exists_with_its_options(line: str) -> None:
    check(Command(line))


def test_examples_run_in_the_order_of_the_work(
    finished: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a small model, and files of the names that the examples have."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
    monkeypatch.chdir(tmp_path)
    for copy in ("runs/mine", *(f"runs/{side}{number}" for side in "ab" for number in (1, 2, 3))):
        shutil.copytree(finished.run_dir, copy)
    shutil.copytree(finished.train.parent, "DIR")
    shutil.copytree(finished.train.parent, "my_store")
    letters = "LAGVSERTIDPKQNFYMHWC"
    sequences = [letters[n:] + letters[: n // 2] for n in range(16)]
    for name, part in (("train", sequences[:12]), ("valid", sequences[12:])):
        with Path(f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("sequence", "fitness"), *((s, len(s)) for s in part)])
    Path("proteins.fasta").write_text("".join(f">p{n}\n{s}\n" for n, s in enumerate(sequences)))
    Path("wild_type.fasta").write_text(f">w\n{letters}\n")
    Path("variants.csv").write_text("mutant\nL1A\nA2G:G3A\n")
    for command, more in HERE.items():
        words = [*Command(EXAMPLES[command]).words[1:], *more]
        assert main(words) == 0, capfd.readouterr().err
    assert "chosen   train.max_epochs=20" in capfd.readouterr().err
    assert len(Path("predictions.csv").read_text().splitlines()) == 17
