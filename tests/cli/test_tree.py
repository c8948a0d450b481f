"""The documents that describe the tree say what is there: the reading order, and the folders of the tests."""

from __future__ import annotations

import ast
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "esm2mega"
UNIT = ROOT / "tests" / "unit"
GENERATOR = ROOT / "docs" / "reading_order.py"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Files of tests/unit that test no single module, and what they test.
OTHER_SUBJECTS = {
    "checkpoint/test_bit_flips.py": "changed files of a checkpoint, through every command that reads one",
    "checkpoint/test_written_before.py": "files that an earlier version wrote",
    "config/test_conf_files.py": "the configurations in conf/",
    "cli/test_checkpoint_places.py": "the places that a checkpoint names, through every command",
    "cli/test_cures.py": "the messages of all commands, for cures that the commands do not have",
    "cli/test_damaged_stores.py": "damaged token stores, through the commands that read them",
    "cli/test_inputs.py": "streams and compressed tables, in every command",
    "convert/test_partial.py": "models of which a part is missing, through the reader of every format",
    "train/test_fp16.py": "fp16: the loss scale in steps, logs and checkpoints",
    "convert/test_traps.py": "the table of traps in docs/converters.md",
    "convert/test_untrusted.py": "crafted files, through every reader of files",
    "data/labels/test_random_tables.py": "labels of all kinds, through every format of files",
    "finetune/test_finite.py": "predictions that are not finite, through every command and function",
    "data/readers/test_limits.py": "sizes that files claim, through every reader",
    "finetune/test_label_layouts.py": "layouts of labels, from published files to a trained model",
    "finetune/test_best.py": "the best and the last weights of a run, through every command",
    "finetune/test_one_table.py": "one table of variants, from a workbook to predictions",
    "finetune/test_targets.py": "several target columns, from table to prediction",
    "infer/test_finite.py": "outputs that are not finite, through every command and function",
    "infer/test_long_proteins.py": "long proteins, from a FASTA to files and arrays",
    "train/test_long_proteins.py": "long proteins in training and evaluation",
    "infer/test_flipped_bits.py": "flipped bits in outputs and in unfinished ones",
    "lora/test_exchange.py": "merging and the exchange with PEFT, against each other",
    "lora/test_finetuned.py": "adapters with a head, from training to prediction",
    "lora/test_training.py": "adapters in training, resuming and starting",
}


def test_reading_order_is_what_the_docstrings_say() -> None:
    generator = runpy.run_path(str(GENERATOR))
    assert generator["PAGE"].read_text() == generator["page"](), "run make reading-order"


def test_reading_order_lists_every_module_once() -> None:
    text = (ROOT / "docs" / "reading-order.md").read_text()
    for path in MODULES:
        where = path.relative_to(ROOT).as_posix()
        if path.name == "__init__.py" and path.parent == PACKAGE:
            continue  # the page is about what is in it
        folder = where.removesuffix("__init__.py")
        line = f"\n**`{folder}`** " if folder != where else f"\n- `{where}`: "
        assert text.count(line) == 1, where


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_first_line_of_a_module_ends_in_a_full_stop(path: Path) -> None:
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    assert first.endswith("."), "the sentence goes on behind the first line, or has no full stop"


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("esm2mega/new.py", '"""A new module."""\n', None),
        ("esm2mega/prove/new.py", '"""A new module."""\n', None),
        ("esm2mega/prove/new.py", '"""A riddle"""\n', "no sentence that ends in a full stop"),
        ("esm2mega/attic/__init__.py", '"""A new folder."""\n', "has a place for esm2mega/attic/__init__.py"),
    ],
)
def test_reading_order_notices_what_is_new(
    path: str, content: str, message: str | None, tmp_path: Path
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "esm2mega", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    shutil.copy(GENERATOR, tmp_path / "docs")
    shutil.copy(ROOT / "docs" / "reading-order.md", tmp_path / "docs")
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(content)
    command = [sys.executable, str(tmp_path / "docs" / GENERATOR.name)]
    checked = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert checked.returncode == 1
    assert (message or "run make reading-order") in checked.stderr
    if message is None:
        subprocess.run(command, check=True)
        assert f"- `{path}`: A new module.\n" in (tmp_path / "docs" / "reading-order.md").read_text()


def test_tests_are_in_the_folders_of_what_they_test() -> None:
    others = set()
    for path in sorted(UNIT.rglob("test_*.py")):
        where = path.relative_to(UNIT)
        name = where.name.removeprefix("test_")
        module = PACKAGE / where.parent / ("__init__.py" if where.as_posix() == "test_init.py" else name)
        if not module.exists():
            assert module.parent.is_dir(), f"{where}: the package has no folder {where.parent}"
            others.add(where.as_posix())
    assert others == set(OTHER_SUBJECTS)
