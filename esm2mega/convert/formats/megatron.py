"""Reads checkpoints of Megatron-LM's BERT as ProteinLM wrote them, in one file per rank.

The files are ``iter_0000010/mp_rank_00/model_optim_rng.pt`` and the like, of any tensor and pipeline size;
none are written. The layout is that of THUDM/ProteinLM, ``pretrain/megatron/checkpointing.py``; the order of
the rows of the fused projection depends on the version of the checkpoint.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from esm2mega.convert.files import pickles
from esm2mega.convert.files.iupac import PROTEINLM_VOCABULARY
from esm2mega.convert.files.ranks import RankStore, megatron_rows
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.lazy_weights import (
    Description,
    Weights,
    epsilon_from,
    flag_from,
    number_from,
    shape_from,
)
from esm2mega.convert.name_table import POSITIONS, NameTable, TableRow
from esm2mega.convert.reading import from_store
from esm2mega.errors import UserError

IS_DIRECTORY = True
_LATEST, _FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")

NAMES = NameTable(
    rows=(
        TableRow(POSITIONS, "language_model.embedding.position_embeddings.weight"),
        *megatron_rows(PROTEINLM_VOCABULARY),
    ),
    tied={"word_embeddings_for_head.weight": False},
)


def matches(source: SourceFiles) -> bool:
    """Tell whether this is a directory of Megatron-LM, or one iteration of it."""
    path = source.path
    return path.is_dir() and ((path / _LATEST).is_file() or any(path.glob(f"mp_rank_*/{_FILE}")))


def read(source: SourceFiles, drop: Sequence[str] = (), partial: bool = False) -> Weights:
    """Read the latest iteration of a directory, or the iteration that `path` is."""
    description, store = open_checkpoint(source.path)
    return from_store(store, NAMES, description, drop=drop, partial=partial)


def open_checkpoint(path: Path) -> tuple[Description, RankStore]:
    """Open a checkpoint: its description and whole tensors, rows of fused projections ordered by head.

    Raises:
        UserError: Ranks are missing, or a file does not say which model it holds.
    """
    folder = _iteration(path)
    files: dict[tuple[int, int], Path] = {}
    for file in folder.glob(f"mp_rank_*/{_FILE}"):
        if match := _RANK.fullmatch(file.parent.name):
            files[int(match[2] or 0), int(match[1])] = file
    num_stages = 1 + max((stage for stage, _ in files), default=-1)
    width = 1 + max((rank for _, rank in files), default=-1)
    if not files or len(files) != num_stages * width:
        raise UserError(
            f"{folder}: holds {len(files)} rank files, not a complete set of ranks; copy all again"
        )
    first = _load(files[0, 0])
    description = _describe(files[0, 0], first)
    heads = description.shape.num_attention_heads
    if heads % width:
        raise UserError(f"{folder}: {heads} heads do not divide between {width} tensor-parallel ranks")
    stages = [
        [_tensors(files[stage, rank], heads // width) for rank in range(width)] for stage in range(num_stages)
    ]
    return description, RankStore(folder, stages)


def _iteration(path: Path) -> Path:
    latest = path / _LATEST
    if not latest.is_file():
        return path
    text = latest.read_text(errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise UserError(f"{latest}: says {text[:40]!r}, neither a number nor 'release'")
    return path / (text if text == "release" else f"iter_{int(text):07d}")


def _load(file: Path) -> dict[str, Any]:
    content = pickles.load_pickle(file, [Namespace, *pickles.numpy_states()])
    if not isinstance(content, dict) or not isinstance(content.get("model"), Mapping):
        raise UserError(f"{file}: not a checkpoint of Megatron-LM: it has no 'model'")
    if not isinstance(content.get("args"), Namespace):
        raise UserError(
            f"{file}: has no 'args', which say what the model is and how rows are ordered; merged files lack "
            "them: convert the checkpoint that was merged"
        )
    return content


def _describe(file: Path, content: dict[str, Any]) -> Description:
    arguments = vars(content["args"])
    hidden_size = arguments.get("hidden_size")
    values = {**arguments, "ffn": 4 * hidden_size if isinstance(hidden_size, int) else None}
    shape = shape_from(file, values, "num_layers", "hidden_size", "ffn", "num_attention_heads")
    positions = arguments.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        raise UserError(f"{file}: max_position_embeddings is {positions!r}, not a positive number")
    # With --no-bias-gelu-fusion the exact form is used; the fused kernel is the tanh approximation.
    tanh = flag_from(file, arguments, "bias_gelu_fusion", True)
    return Description(
        shape,
        epsilon_from(file, arguments, "layernorm_epsilon", 1e-5),
        "gelu_tanh" if tanh else "gelu",
        family="proteinbert_preln",
        max_positions=positions,
    )


def _tensors(file: Path, num_heads: int) -> dict[str, Tensor]:
    """Return one rank's tensors under NeMo's later names, rows of the fused projection ordered by head."""
    content = _load(file)
    version = number_from(file, content, "checkpoint_version", 0.0)
    tensors = {}
    for name, value in _flat(content["model"]):
        name = name.replace("language_model.transformer.", "language_model.encoder.")
        name = re.sub(r"(\.layers\.\d+\.)attention\.", r"\1self_attention.", name)
        if ".query_key_value." in name:
            value = by_head(value, num_heads, version)
        tensors[name] = value
    return tensors


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value


def by_head(value: Tensor, num_heads: int, version: float) -> Tensor:
    """Reorder the rows of one rank's fused projection, ``n`` heads of width ``d``, to ``[n, 3, d]``.

    Args:
        value: ``[3nd, *]`` as stored: ``[3, n, d]`` in version 0, ``[n, d, 3]`` in 1, ``[n, 3, d]`` later.
        num_heads: Number of heads of this rank, ``n``.
        version: Version of the checkpoint.
    """
    rest = value.shape[1:]
    if version >= 2.0:
        return value
    if version >= 1.0:
        return value.reshape(num_heads, -1, 3, *rest).transpose(1, 2).reshape(value.shape)
    return value.reshape(3, num_heads, -1, *rest).transpose(0, 1).reshape(value.shape)
