"""Reads and writes the configuration in a checkpoint of NeMo 2, whose objects fiddle has serialised as JSON.

``context/io.json`` is a graph of objects, and ``<root>.model.config`` the path of the model's configuration
in it. Every object has ``items``, pairs of ``Attr(name='KEY')`` and a value, which is ``{"type": "leaf",
"value": …}`` for plain values. Nothing is imported or constructed: names of classes are text here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from esm2mega.errors import UserError
from esm2mega.files import parse_json

CONTEXT = "context"
"""Names the directory of the configuration in a checkpoint."""

IO_FILE = "io.json"

CONFIG_CLASS = "bionemo.esm2.model.model.ESM2Config"
"""Names the configuration of ESM-2 in BioNeMo 2."""

_MODULE_CLASS = "bionemo.llm.lightning.BionemoLightningModule"
_CONTEXT_CLASS = "nemo.lightning.io.pl.TrainerContext"


def read_model_config(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Return plain values of the one object that has a number of layers and of heads.

    Args:
        file: The file ``io.json``.
        keys: Names of the values that are returned, as far as the object has them; the first four are the
            dimensions of the model.

    Raises:
        UserError: The file cannot be read, or does not hold the configuration of one model.
    """
    try:
        objects = [dict(_leaves(node, keys)) for node in _nodes(parse_json(file.read_text()))]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    found = [o for o in objects if isinstance(o.get("num_layers"), int) and "num_attention_heads" in o]
    distinct = {json.dumps([o.get(key) for key in keys[:4]], sort_keys=True) for o in found}
    if len(distinct) != 1:
        raise UserError(f"{file}: holds {len(distinct)} configurations of a model, expected one")
    return found[0]


def write_model_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Make the directory `folder`: ``io.json``, which NeMo 2 reads, and ``model.yaml``, a copy for people.

    NeMo's `load_context` finds `config` under ``model.config``. There is no trainer and no optimizer in it.
    """
    folder.mkdir()
    model, module = "<root>.model.config", "<root>.model"
    leaves = {
        key: {"type": "leaf", "value": value, "paths": [f"{model}.{key}"]} for key, value in config.items()
    }
    objects = {
        "esm2_config_1": _buildable(CONFIG_CLASS, leaves, model),
        "bionemo_lightning_module_1": _buildable(_MODULE_CLASS, {"config": _ref("esm2_config_1")}, module),
        "trainer_context_1": _buildable(
            _CONTEXT_CLASS, {"model": _ref("bionemo_lightning_module_1")}, "<root>"
        ),
    }
    graph = {
        "root": _ref("trainer_context_1"),
        "objects": objects,
        "refcounts": dict.fromkeys(objects, 1),
        "version": "0.0.1",
    }
    (folder / IO_FILE).write_text(json.dumps(graph) + "\n")
    text = {"_target_": _MODULE_CLASS, "config": {"_target_": CONFIG_CLASS, **config}}
    (folder / "model.yaml").write_text(yaml.safe_dump(text, sort_keys=False))


def _buildable(name: str, arguments: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return a call of the class `name` as fiddle's `Config` of it; its object has the path `path`."""
    metadata = "fiddle._src.config.BuildableTraverserMetadata"
    # The tags of the arguments and their history are empty.
    empty = {"type": _pyref("builtins.dict"), "items": [], "metadata": _tuple(())}
    return {
        "type": _pyref("fiddle._src.config.Config"),
        "items": _attributes(arguments),
        "metadata": {
            "type": _pyref(metadata),
            "items": _attributes(
                {
                    "fn_or_cls": _pyref(name),
                    "argument_names": _tuple(arguments),
                    "argument_tags": empty,
                    "argument_history": empty,
                }
            ),
            "metadata": _pyref(metadata),
        },
        "paths": [path],
    }


def _attributes(values: Mapping[str, Any]) -> list[list[Any]]:
    return [[f"Attr(name='{name}')", value] for name, value in values.items()]


def _tuple(values: Iterable[str]) -> dict[str, Any]:
    items = [[f"Index(index={number})", value] for number, value in enumerate(values)]
    return {"type": _pyref("builtins.tuple"), "items": items, "metadata": None}


def _pyref(name: str) -> dict[str, str]:
    module, _, attribute = name.rpartition(".")
    return {"type": "pyref", "module": module, "name": attribute}


def _ref(key: str) -> dict[str, str]:
    return {"type": "ref", "key": key}


def _nodes(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _nodes(inner)


def _leaves(node: dict[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield those of the keys that one object has, and their plain values."""
    items = node.get("items")
    pairs = [p for p in items if isinstance(p, list) and len(p) == 2] if isinstance(items, list) else []
    for label, value in [*pairs, *node.items()]:
        key = str(label).removeprefix("Attr(name='").removesuffix("')")
        if key in keys:
            is_leaf = isinstance(value, dict) and value.get("type") == "leaf"
            yield key, value["value"] if is_leaf and "value" in value else value
