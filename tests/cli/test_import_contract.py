"""The contract of imports in pyproject.toml finds a wrong import and names it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = Path(sys.executable).with_name("lint-imports")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package and its contract, to plant errors in."""
    shutil.copytree(ROOT / "esm2mega", tmp_path / "esm2mega", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINT, "--no-cache", "--no-logo"], cwd=tree, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("module", "statement", "named"),
    [
        # Model and data do not know each other; an import inside a function counts too.
        ("model/pooling.py", "import esm2mega.data.stream.loader", "esm2mega.model.pooling"),
        (
            "data/stream/loader.py",
            "def late():\n    import esm2mega.model.esm2",
            "esm2mega.data.stream.loader",
        ),
        ("vocabulary.py", "import esm2mega.config.schema", "esm2mega.vocabulary"),
        ("train/loop.py", "import esm2mega.cli.app", "esm2mega.train.loop"),
        ("report/log.py", "from esm2mega import __version__", "esm2mega.report.log"),
    ],
)
def test_a_wrong_import_is_named(tree: Path, module: str, statement: str, named: str) -> None:
    with (tree / "esm2mega" / module).open("a") as file:
        file.write(f"\n\n{statement}\n")
    result = lint(tree)
    assert result.returncode == 1, result.stdout
    assert named in result.stdout.partition("Broken contracts")[2]


def test_a_module_without_a_layer_is_named(tree: Path) -> None:
    (tree / "esm2mega" / "helpers.py").write_text('"""A module that no layer has."""\n')
    result = lint(tree)
    assert result.returncode == 1 and "helpers" in result.stdout + result.stderr


def test_heads_load_no_reader() -> None:
    code = (
        "import sys, esm2mega.model.heads; print([m for m in sys.modules if m.startswith('esm2mega.data')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "[]"
