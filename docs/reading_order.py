"""Writes docs/reading-order.md: every file of the package, in the order in which they are best read.

    python docs/reading_order.py            write the page
    python docs/reading_order.py --check    end with 1 if the page is not what would be written

Sections and order are below; what is said of a file is the first sentence of its docstring.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reading-order.md"
PACKAGE = "esm2mega"
WIDTH = 130
"""Columns of the page's paragraphs."""

INTRODUCTION = (
    "The way of a protein through the code, from a command to trained weights and what is made of them. "
    "Each file has one purpose, said here by the first sentence of its docstring; each folder says its own "
    "in `__init__.py`. Imports go one way, from the later layers to the earlier ones: the table is in "
    "`pyproject.toml` under `tool.importlinter`, and `make lint` fails for a wrong import.",
    "Files of models, losses and batches open with a legend of the letters they use for sizes: T tokens of "
    "a pack, h hidden size, n heads (or sequences), d head dimension, t tensor-parallel size.",
    "This page is written from the docstrings by `make reading-order`; a test compares.",
)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        text: What the reader should know before reading its files.
        folders: Folders below the package, each with the files that come first; the others of the folder
            follow by name. Of the package itself, "", only the named files follow; those that no section
            names stand in the first section.
    """

    title: str
    text: str
    folders: dict[str, str]


SECTIONS = (
    Section(
        "From a command to a run",
        "A command reads its options, imports what it needs, and calls one function of the package. The "
        "configuration is checked as a whole before torch is imported.",
        {
            "": "__main__ errors version",
            "cli": "app group train",
            "config": "schema presets load validate",
            "config/foreign": "rules values systems reading translate answers",
        },
    ),
    Section(
        "From a file of sequences to a token store",
        "Every reader gives records in blocks, so that many processes can parse one file. Residues are "
        "stored as one byte each, without `<cls>` and `<eos>`, in the indexed format of Megatron-Core; ids, "
        "counts and checksums lie beside them.",
        {
            "": "vocabulary",
            "data": "",
            "data/readers": "base settings text fasta columns tables",
            "data/variants": "variant notation sequences",
            "data/store": "token_store manifest store_files shards parts prepare",
            "data/uniref": "build inputs mapping",
        },
    ),
    Section(
        "From a token store to a micro-batch",
        "Sample k is a pure function of the seed and k: which protein it is, where it is cropped, what is "
        "masked. Nothing depends on the number of processes, and there is no random state that a checkpoint "
        "would have to keep.",
        {"": "batch", "data/stream": "samples packing masking build prefetch loader"},
    ),
    Section(
        "From a micro-batch to logits",
        "`initialize.py` makes the process groups; the rest of `parallel/` is needed to run, not to "
        "understand. Then read `esm2.py`: the whole model on two screens, of which the other files are the "
        "parts.",
        {
            "parallel": "initialize errors",
            "model": "esm2 packed embedding rotary layer_spec attention linear layer layernorm lm_head build",
            "model/kernels": "native native_attention native_rotary triton_rotary int8",
        },
    ),
    Section(
        "From logits to updated weights",
        "A loss is a sum and a count, added over micro-batches and processes and divided once, so no layout "
        "changes it. Pretraining and fine-tuning share one step and one loop.",
        {"train": "losses step optimizer loop evaluate signals throughput pretrain", "report": "log watch"},
    ),
    Section(
        "From weights to checkpoints, and back",
        "Tensors are stored whole, whatever layout wrote them, so any layout reads them. A directory "
        "without `COMPLETE` is no checkpoint.",
        {"checkpoint": "layout store tensors safe_index"},
    ),
    Section(
        "From and to other formats",
        "Read one format first, such as `hf.py`: a name table and how it is used. Every format becomes the "
        "`Weights` of `lazy_weights.py`, whose tensors are read one at a time. `verify/` repeats on purpose "
        "how the formats arrange their weights: it is a second, independent witness.",
        {
            "convert": "convert lazy_weights name_table reading writing tensors",
            "convert/formats": "registry hf",
            "convert/files": "stores safetensors_writer",
            "convert/heads": "",
            "convert/verify": "verify",
        },
    ),
    Section(
        "Adapters",
        "Adapters stand beside the linears of Megatron-Core and are split as these are; the weights under "
        "them are frozen.",
        {"lora": "layers inject base checkpoint merge"},
    ),
    Section(
        "From weights to embeddings and scores",
        "All lengths are known before anything is computed: every row of an output has its place from the "
        "start, any process writes its own, and a killed run goes on.",
        {"infer": "job embed source windows proteins engine work target contents"},
    ),
    Section(
        "From labels to a fine-tuned model",
        "A table of proteins with labels takes the place of the token store, and the head of a task that of "
        "the language model; packs, loop and checkpoints are the same.",
        {
            "": "pairs",
            "data/labels": "rows cells readers schema degenerate dataset stream",
            "data/benchmarks": "names tables flip",
            "data/leakage": "command inputs leaks mmseqs kmers",
            "model/heads": "task task_heads tape_heads sample_dropout",
            "finetune": (
                "run user_code losses param_groups evaluate metrics bootstrap checkpoint predict output api"
            ),
            "finetune/classes": "loss model config data flow",
        },
    ),
    Section(
        "Comparison, proof, first steps, and looking around",
        "`autoeval/` takes models through benchmarks, and compares them. `prove/` trains the same "
        "small model at many layouts and compares every number with those of one process; `drill/` kills the "
        "processes of a user's own training. `export/` writes models as programs for other places.",
        {
            "autoeval": (
                "tasks suite task_data units recipe prediction_table results compare sides models difference"
            ),
            "autoeval/probe": "run embeddings labels fit targets heads convolution",
            "autoeval/baselines": "fit features substitutions",
            "autoeval/downstream": "measure tables embedding",
            "report/results": "page charts predictions",
            "export": "command padded padded_heads programs",
            "prove": "command trials layouts training workers",
            "plan": "command layouts estimate stage counting kernel fake_ranks hardware report",
            "drill": "command ranks compare",
            "benchmark": "command sections contenders turns proteins batches ours peers products breakdown",
            "quickstart": "run",
            "doctor": "run finding packages devices kernels collectives directory limits hosts",
            "": "inspect",
        },
    ),
)

TESTS = (
    "`tests/unit/` has the folders of the package: `test_NAME.py` tests `NAME.py` of the same folder, and "
    "the few that test something else are listed in `tests/cli/test_tree.py`. `tests/parity/` compares with "
    "Hugging Face, fair-esm and other implementations, `tests/distributed/` and `tests/prove/` start several "
    "processes, `tests/kills/` kills them at random moments, `tests/fuzz/` changes the files that they read, "
    "and `tests/cli/` runs commands, examples and the README, `tests/tutorials/` the tutorials."
)


def purpose(path: Path) -> str:
    """Return the first sentence of the docstring of a module.

    Raises:
        SystemExit: There is none that ends in a full stop.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.match(r".*?\.(?=\s|$)", " ".join(text.partition("\n\n")[0].split()))
    if sentence is None:
        raise SystemExit(f"{path}: its docstring opens with no sentence that ends in a full stop")
    return sentence.group()


def modules(folder: str) -> dict[str, Path]:
    """Return the modules of a folder below the package, by name, without `__init__`."""
    paths = sorted((ROOT / PACKAGE / folder).glob("*.py"))
    return {path.stem: path for path in paths if path.stem != "__init__"}


def files_of(section: Section, folder: str) -> list[Path]:
    """Return the files of a folder in the order of the page.

    Raises:
        SystemExit: The section names one that is not there.
    """
    found, first = modules(folder), section.folders[folder].split()
    if absent := [name for name in first if name not in found]:
        raise SystemExit(
            f"the section {section.title!r} names absent files of {folder!r}: {' '.join(absent)}"
        )
    rest = [name for name in found if name not in first]
    if not folder:
        named = " ".join(other.folders.get("", "") for other in SECTIONS).split()
        rest = [name for name in rest if section is SECTIONS[0] and name not in named]
    return [found[name] for name in (*first, *rest)]


def page() -> str:
    """Return the page.

    Raises:
        SystemExit: A folder of the package has no place in it, or is named and absent.
    """
    parts = ["# Reading order", *map(paragraph, INTRODUCTION)]
    listed: set[Path] = set()
    for section in SECTIONS:
        parts += [f"## {section.title}", paragraph(section.text)]
        for folder in section.folders:
            files = files_of(section, folder)
            parts.append(
                f"**`{PACKAGE}/{folder}/`** {purpose(ROOT / PACKAGE / folder / '__init__.py')}"
                if folder
                else ""
            )
            parts.append(
                "\n".join(f"- `{path.relative_to(ROOT).as_posix()}`: {purpose(path)}" for path in files)
            )
            listed |= {ROOT / PACKAGE / folder / "__init__.py", *files}
    if left := sorted(set((ROOT / PACKAGE).rglob("*.py")) - listed):
        names = ", ".join(path.relative_to(ROOT).as_posix() for path in left)
        raise SystemExit(f"no section of docs/reading_order.py has a place for {names}")
    return "\n\n".join(filter(None, [*parts, "## Tests", paragraph(TESTS)])) + "\n"


def paragraph(text: str) -> str:
    """Return one paragraph, wrapped."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def main(arguments: Sequence[str]) -> int | str:
    """Write the page, or compare it; return the exit status."""
    if list(arguments) == ["--check"]:
        same = PAGE.read_text(encoding="utf-8") == page()
        return 0 if same else f"{PAGE.name} is not what the docstrings say; run make reading-order"
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
