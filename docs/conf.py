"""Builds the documentation as a site: `make site`.

The source directory of Sphinx is the repository, so that links between README, docs and files of the package
are the same in the repository and on the site.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import site_pages  # noqa: E402

from esm2mega.version import __version__  # noqa: E402

project = "esm2mega"
author = "the authors of esm2mega"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "docs/index"
# The other folders hold no page; an environment among them takes longer to search than the pages to read.
exclude_patterns = [
    each.name for each in ROOT.iterdir() if each.is_dir() and each.name not in ("docs", "tools")
]
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**.md", "tools/README.md"]

# Links are checked as on the pages of a repository, to headings by their text.
myst_heading_anchors = 4
# Docstrings write names in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes have one description, that of the class.
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"esm2mega {__version__}"
html_copy_source = False
html_show_sphinx = False


def add_navigation(app: Any, docname: str, source: list[str]) -> None:
    """Make the navigation from the lists of the index, and add the pages that are made with the site."""
    if docname != root_doc:
        return
    sections = site_pages.linked_pages(source[0])
    for title, pages in sections.items():
        if title == "Reference":
            pages[:0] = [f"generated/{name}" for name in site_pages.PAGES]
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```\n"


def add_entrance(app: Any, exception: Exception | None) -> None:
    """Lead from the folder of the site to its first page."""
    if exception is None and app.builder.name == "html":
        target = f"{root_doc}.html"
        Path(app.outdir, "index.html").write_text(
            f'<!doctype html><title>esm2mega</title><meta http-equiv="refresh" content="0; url={target}">'
            f'<a href="{target}">esm2mega</a>\n'
        )


def setup(app: Any) -> None:
    """Register the hooks of the site."""
    site_pages.write_pages()
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_entrance)
