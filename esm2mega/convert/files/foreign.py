"""Names models that are not ESM-2 by their configuration, tensors and files, for messages that refuse them.

Only names are recognised, nothing is read with this knowledge. A model that is not listed is described by the
``model_type`` of its configuration or by the first of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""This holds shapes of tensors by stored name; the shape is empty where only names are known."""

_TYPES = {
    "esmc": "ESM-C",
    "esmplusplus": "ESM-C (ESM++)",
    "esm3": "ESM3",
    "fast_esm": "FastESM",
    "amplify": "AMPLIFY",
    "prosst": "ProSST",
    "progen": "ProGen",
    "bert": "a BERT",
    "albert": "an ALBERT",
    "electra": "an ELECTRA",
    "xlnet": "an XLNet",
    "t5": "a T5",
    "gpt2": "a GPT-2",
}
"""These are values of ``model_type`` in ``config.json``, in lower case."""

_BY_VOCABULARY = {
    ("esm", 446): "SaProt",
    ("esm", 4105): "the Nucleotide Transformer",
    ("esm", 4107): "the Nucleotide Transformer",
    ("bert", 30): "ProtBert",
    ("albert", 34): "ProtAlbert",
    ("electra", 30): "ProtElectra",
    ("xlnet", 37): "ProtXLNet",
    ("t5", 128): "ProtT5",
    ("t5", 144): "Ankh",
    ("t5", 150): "ProstT5",
}
"""These models share a ``model_type`` with others, and only the size of their vocabulary tells them apart."""

_ARCHITECTURES = {
    "protein_bert_base": "ESM-1",
    "roberta_large": "ESM-1b or ESM-1v",
    "msa_transformer": "the MSA Transformer",
    "invariant_gvp": "ESM-IF1",
}
"""These are values of ``args.arch`` in files of fair-esm."""

_LEARNED_POSITIONS = "ESM-1b or ESM-1v"

_TENSORS = (
    (r"\.lora_(A|B|embedding_A)\.", "adapters of PEFT without the weights under them"),
    (r"(^|\.)trunk\.(structure_module|blocks)\.", "ESMFold"),
    (r"(^|\.)geom_attn\.|(^|\.)structure_tokens_embed\.|(^|\.)output_heads\.sequence_head\.", "ESM3"),
    (r"(^|\.)attn\.layernorm_qkv\.", "ESM-C"),
    (r"\.row_self_attention\.|(^|\.)msa_position_embedding", "the MSA Transformer"),
    (r"(^|\.)encoder\.embed_graph\.|\.embed_ingraham_features\.", "ESM-IF1"),
    (r"\.self_attn\.bias_[kv]$", "ESM-1"),
    (r"(^|\.)embed_positions\.weight$", _LEARNED_POSITIONS),
)
"""These patterns are searched for in names of tensors; the first that occurs says what the model is."""

_TABLES = (
    (r"(^|\.)shared\.weight$", "t5", "a T5"),
    (r"(^|\.)(esm\.embeddings\.word_embeddings|embed_tokens)\.weight$", "esm", None),
    (r"(^|\.)bert\.embeddings\.word_embeddings\.weight$", "bert", "a BERT"),
)
"""These are tables of tokens, whose number of rows tells models apart, and what the model is in any case."""


def named_by_config(config: Mapping[str, Any]) -> str | None:
    """Name the model of a ``config.json`` of transformers; None for ESM-2, or if nothing says what it is."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    vocabulary = config.get("vocab_size")
    known = _BY_VOCABULARY.get((kind.lower(), vocabulary)) if isinstance(vocabulary, int) else None
    if kind == "esm":
        if config.get("is_folding_model") is True or config.get("esmfold_config"):
            return "ESMFold"
        if known is None and config.get("position_embedding_type") == "absolute":
            return _LEARNED_POSITIONS
        return known
    name = known or _TYPES.get(kind.lower(), "another model")
    return f"{name} (model_type {kind!r})"


def named_by_arguments(arguments: Mapping[str, Any]) -> str:
    """Name the model of a file of fair-esm that has ``args``, which no ESM-2 has."""
    architecture = arguments.get("arch")
    name = _ARCHITECTURES.get(str(architecture), "a model of fair-esm before ESM-2")
    return f"{name} (args.arch {architecture!r})"


def named_by_tensors(shapes: Shapes) -> str | None:
    """Name the model that tensors of these names and shapes belong to; None for ESM-2 and unknown ones."""
    for pattern, name in _TENSORS:
        if any(re.search(pattern, stored) for stored in shapes):
            return name
    for pattern, kind, otherwise in _TABLES:
        for stored, shape in shapes.items():
            if re.search(pattern, stored):
                return _BY_VOCABULARY.get((kind, shape[0] if shape else -1), otherwise)
    return None


def refusal(location: object, name: str) -> str:
    """Return the message that refuses a model by its name."""
    return f"{location}: is {name}, not ESM-2, and no command reads it; give a checkpoint of ESM-2"
