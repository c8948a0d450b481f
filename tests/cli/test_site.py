"""The site of the documentation: complete navigation, complete references, and a build without warnings."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from esm2mega.cli.app import cli
from esm2mega.config.keys import known_keys
from esm2mega.config.schema import Run, choices, flatten
from tests import warm
from tests.cli.pages import PAGES, README, ROOT

INDEX = ROOT / "docs" / "index.md"


@pytest.fixture(scope="module")
def site() -> dict[str, object]:
    """What docs/site_pages.py defines."""
    return runpy.run_path(str(ROOT / "docs" / "site_pages.py"))


def test_every_page_is_in_the_navigation_once(site) -> None:
    listed = [page for pages in site["linked_pages"](INDEX.read_text()).values() for page in pages]
    found = Counter((INDEX.parent / page).resolve() for page in listed)
    assert found == Counter(page for page in PAGES if page != INDEX)


def test_every_key_is_in_the_reference_with_type_default_and_text(site) -> None:
    entries = re.split(r"^### `", site["keys_page"](), flags=re.MULTILINE)[1:]
    page = {name: rest for name, _, rest in (entry.partition("`") for entry in entries)}
    assert set(known_keys()) <= set(page)
    defaults, closed = flatten(Run()), choices(Run())
    for key in known_keys():
        line, _, text = page[key].strip().partition("\n")
        found = re.fullmatch(r"\*(.+?)\. Default:\* `(.+)`", line)
        assert found, f"{key}: {line}"
        assert set(re.findall(r"`([^`]+)`", found[1])) == set(closed.get(key, ())), line
        assert len(text.split()) >= 3, f"{key} has no text"
        if isinstance(defaults.get(key), bool):
            assert (found[1], found[2]) == ("true or false", str(defaults[key]).lower())
        if isinstance(defaults.get(key), int | float) and not isinstance(defaults[key], bool):
            assert found[1].startswith(("whole number", "number")) and float(found[2]) == defaults[key]
        assert ("null" in found[1]) >= (found[2] == "null"), line
    # Text and unit are those of conf/base.yaml; keys that share a comment have the same.
    body = {
        key: rest.partition("\n## ")[0].strip().partition("\n\n")[2].strip() for key, rest in page.items()
    }
    assert body["train.max_steps"] == "Length of the run in steps."
    assert body["model.hidden_dropout"] == body["model.attention_dropout"] != ""


def test_a_key_without_a_comment_is_noticed(site) -> None:
    keys = list(
        site["read_keys"]("# a\none: 1\n\nsection:\n  # b\n  # c\n  two: x\n  three: y\n\n  four: z\n")
    )
    assert [getattr(entry, "text", entry) for entry in keys] == ["a", "# section: ", "b c", "b c", ""]
    assert keys[2].name == "section.two"


def test_every_command_is_in_the_reference(site) -> None:
    page = site["commands_page"]()
    for name, command in cli.commands.items():
        assert f"## `esm2mega {name}`\n" in page
        for parameter in command.params:
            assert all(option in page for option in parameter.opts if option.startswith("-"))
    assert "## `esm2mega prepare fasta`\n" in page


def test_modules_of_the_python_reference_exist(site) -> None:
    assert all(find_spec(module) for module in site["API"])
    homes = runpy.run_path(str(ROOT / "esm2mega" / "__init__.py"))["_HOMES"]
    assert set(homes.values()) <= set(site["API"])


def _build(builder: str, out: Path, doctrees: Path) -> None:
    """Build the site from nothing; a warning is an error."""
    words = ["-m", "sphinx", "-q", "-W", "--keep-going", "-b", builder, "-c", "docs", "-d", str(doctrees)]
    done = warm.run([*words, ".", str(out)], cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.distributed
def test_pages_and_docstrings_are_read_without_warnings(tmp_path: Path) -> None:
    """The site but for its files: the builder that writes none reads all pages and checks all links."""
    pytest.importorskip("sphinx")
    _build("dummy", tmp_path / "site", tmp_path / "doctrees")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_site_builds_without_warnings_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    built = tmp_path / "site"
    _build("html", built, tmp_path / "doctrees")
    loaded = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["'](?:https?:)?//""")
    for page in built.rglob("*.html"):
        assert not loaded.search(page.read_text()), f"{page.name} loads something from elsewhere"
    assert README.stem in (built / "searchindex.js").read_text()
    assert "docs/index.html" in (built / "index.html").read_text()
