"""Writes a head that transformers has no class for beside its encoder: tensors, and what computes with them.

`HEAD_FILE` has the layers, with the scale of the labels in the last one, and `CONFIG_FILE` says what they
read, in which order they are applied, and what the outputs are. A few lines of PyTorch compute with both:
`READER`, which stands in the model card and in docs/converters.md. No code comes with the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from esm2mega.config.head_form import ATTENTION_MAPS, head_form
from esm2mega.config.schema import TaskConfig
from esm2mega.convert.heads.hf_classifiers import has_class, no_equal
from esm2mega.convert.lazy_weights import HeadDescription, Weights

HEAD_FILE, CONFIG_FILE = "head.safetensors", "head.json"

_LAYERS = {"mlp": ["dense", "relu", "output"], "linear": ["output"]}
"""Lists the layers of the first part of a head's form: linears by their names, functions between them."""
_READS = ("mean", "cls", "max")
"""Lists the values of `task.pooling` that a reader computes without weights."""

READER = """import json

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "NAME"
encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
head, weights = json.load(open(f"{folder}/head.json")), load_file(f"{folder}/head.safetensors")
with torch.no_grad():  # one protein at a time, without padding
    inputs = tokenizer("MKTAYIAKQR", return_tensors="pt")
    states = encoder(**inputs).last_hidden_state[0]  # <cls>, residues, <eos>
    x = {"mean": states[1:-1].mean(0), "max": states[1:-1].amax(0), "cls": states[0]}[head["reads"]]
    for layer in head["layers"]:
        x = x.relu() if layer == "relu" else weights[f"{layer}.weight"] @ x + weights[f"{layer}.bias"]
    x = {"classification": x.softmax(0), "multilabel": x.sigmoid()}.get(head["task"], x)
predicted = dict(zip(head["names"], x.tolist()))"""
"""Is a program that predicts with the folder NAME."""

_PREFIX = "head."


def is_plain(task: TaskConfig) -> bool:
    """Tell whether a configured head is written in this way: pooling without weights, then linears."""
    form = head_form(task)
    return form[0] in _LAYERS and form[-1] in _READS


def config_of_plain(head: HeadDescription) -> dict[str, Any]:
    """Return the content of `CONFIG_FILE`."""
    form = head_form(head.task)
    return {
        "task": head.info.kind,
        "names": head.info.names,
        "reads": form[-1],
        "layers": _LAYERS[form[0]],
    }


def export_notes(head: HeadDescription) -> list[str]:
    """Say, before a training, that transformers has no class for its head, and what `convert` does then.

    Args:
        head: The head, of which the shapes are not known yet.
    """
    if has_class(head) or head_form(head.task) == ATTENTION_MAPS:
        return []
    if head.is_configured and is_plain(head.task):
        return [f"head     `convert --to hf` writes it as {HEAD_FILE} and {CONFIG_FILE}, beside the encoder"]
    return [f"head     `convert --to hf` refuses it, --drop-head writes the encoder alone: {no_equal(head)}"]


def write_plain(head: HeadDescription, weights: Weights, dtype: torch.dtype, folder: Path) -> None:
    """Write both files into a folder.

    Args:
        head: The head.
        weights: The model with this head, whose outputs are in units of the labels.
        dtype: Dtype of the file.
        folder: Where the encoder has been written.
    """
    tensors = {name.removeprefix(_PREFIX): weights.read(name).to(dtype).contiguous() for name in head.shapes}
    save_file(tensors, str(folder / HEAD_FILE), metadata={"format": "pt"})
    text = json.dumps(config_of_plain(head), indent=2)
    (folder / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")
