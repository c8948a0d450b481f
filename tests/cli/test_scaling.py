"""The tables of docs/performance.md are what benchmarks/scaling.py prints."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"


@pytest.fixture(scope="module")
def scaling():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("scaling")


def on_the_page():
    """The text between the comments that enclose what the script prints."""
    _, _, rest = PAGE.read_text().partition("<!-- benchmarks/scaling.py -->\n")
    text, end, _ = rest.partition("<!-- end of benchmarks/scaling.py -->")
    assert end
    return text.strip()


def test_a_line_of_the_page_is_what_the_script_prints(scaling, capsys):
    """The first line of 650M; all of them are for the slow test."""
    scaling.main(["--sizes", "650M", "--gpus", "8"])
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed == on_the_page().splitlines()[: len(printed)]
    assert printed[-1].startswith("| 8 | 8 | 16,384 | ")


@pytest.mark.slow
def test_all_lines_of_the_page_are_what_the_script_prints(scaling, capsys):
    scaling.main([])
    assert capsys.readouterr().out.strip() == on_the_page()
