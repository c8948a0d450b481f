"""Classification models of transformers: their head is kept beside the model, and they lack the head of
masked language modelling.

Names and config keys: transformers 4.30 to 5.23, ``EsmForSequenceClassification`` and
``EsmForTokenClassification``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.convert.mapping import (
    CLASSIFIER,
    LM_HEAD,
    OUTPUT_BIAS,
    Classifier,
    NameTable,
    our_shapes,
)
from esm2mega.convert.weights import Weights
from esm2mega.errors import UserError

ARCHITECTURES = {"sequence": "EsmForSequenceClassification", "token": "EsmForTokenClassification"}
_OUTPUTS = {"sequence": f"{CLASSIFIER}out_proj.weight", "token": f"{CLASSIFIER}weight"}
_SETTINGS = ("id2label", "label2id", "problem_type", "classifier_dropout")
"""Keys of ``config.json`` that belong to such a head; the width of its output is the number of labels."""


def find_classifier(
    place: Path, infos: Mapping[str, TensorInfo], config: Mapping[str, Any], drop: Sequence[str]
) -> Classifier | None:
    """The head among these tensors, if there is one that is not to be left out.

    Args:
        place: Named in errors.
        infos: All tensors of a file.
        config: Where its settings are, as far as they are known.
        drop: Shell patterns of tensors to leave out.

    Raises:
        UserError: The configuration names another number of labels than the tensors have.
    """
    for kind, output in _OUTPUTS.items():
        if output not in infos or any(fnmatchcase(output, pattern) for pattern in drop):
            continue
        num_labels = infos[output].shape[0] if infos[output].shape else 0
        settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
        labels = settings.get("id2label")
        if labels is not None and len(labels) != num_labels:
            raise UserError(
                f"{place}: {output} has {num_labels} rows, id2label of config.json {len(labels)} labels"
            )
        return Classifier(kind, num_labels, settings)
    return None


def classifier_table(table: NameTable, classifier: Classifier) -> NameTable:
    """`table`, of a masked language model of transformers, for a model with this head in its place."""
    rows = tuple(row for row in table.rows if not is_lm_head(row.ours))
    return NameTable((*rows, *classifier.rows()), {}, table.dropped)


def is_lm_head(name: str) -> bool:
    """Whether one of our tensors is of the head of masked language modelling (its decoder is the table)."""
    return name.startswith(LM_HEAD) or name == OUTPUT_BIAS


def with_lm_head(weights: Weights) -> Weights:
    """The same with a head of masked language modelling whose logits are all 0: its source has none."""
    description, read = weights.description, weights.read
    shapes = our_shapes(description.shape, description.max_positions, description.classifier)
    filled = {name: TensorInfo(shapes[name], description.dtype) for name in shapes if is_lm_head(name)}
    infos = {**weights.infos, **filled}
    weights.notes.filled.append(
        f"{LM_HEAD}*, {OUTPUT_BIAS}: a masked-language-model head whose logits are 0, the source has none"
    )

    def value(name: str) -> Tensor:
        if name not in filled:
            return read(name)
        make = torch.ones if name == f"{LM_HEAD}layer_norm.weight" else torch.zeros
        return make(shapes[name], dtype=description.dtype)

    return replace(weights, infos={name: infos[name] for name in shapes if name in infos}, read=value)


def without_lm_head(weights: Weights, classifier: Classifier) -> Weights:
    """The same without the head of masked language modelling, for which these models have no place."""
    is_trained = bool(weights.read(f"{LM_HEAD}dense.weight").any())
    why = f"{ARCHITECTURES[classifier.kind]} has none" if is_trained else "all zeros, which stands for none"
    weights.notes.dropped.append(f"{LM_HEAD}*, {OUTPUT_BIAS}: the head of masked language modelling; {why}")
    return replace(weights, infos={n: info for n, info in weights.infos.items() if not is_lm_head(n)})


def config_of_classifier(weights: Weights, classifier: Classifier) -> dict[str, Any]:
    """Keys of ``config.json`` that differ from those of a masked language model."""
    settings = dict(classifier.settings)
    if "id2label" not in settings:
        names = [f"LABEL_{number}" for number in range(classifier.num_labels)]
        settings["id2label"] = {str(number): name for number, name in enumerate(names)}
        settings["label2id"] = {name: number for number, name in enumerate(names)}
        weights.notes.filled.append("names of the labels: LABEL_0 and so on, the source has none")
    return {"architectures": [ARCHITECTURES[classifier.kind]], **settings}
