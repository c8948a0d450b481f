"""Reads ``.nemo`` of BioNeMo 1 and NeMo 1, packed or not: ``model_config.yaml``, one weights file per rank.

Layout and names are those of BioNeMo framework 1.10, ``bionemo/model/protein/esm1nv``, and NeMo 1.23. The
activation is the erf form of GELU unless ``bias_gelu_fusion`` is on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from esm2mega.convert.files import pickles
from esm2mega.convert.files.archives import TarFile, UnpackedArchive
from esm2mega.convert.files.ranks import RankStore, megatron_rows
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.lazy_weights import Description, Weights, epsilon_from, flag_from, shape_from
from esm2mega.convert.name_table import FREQUENCIES, VOCABULARY, NameTable, TableRow
from esm2mega.convert.reading import from_store
from esm2mega.errors import UserError

IS_DIRECTORY = False
_CONFIG = "model_config.yaml"
# For one rank, several tensor-parallel ranks, several pipeline stages. The first number is the tensor rank.
_MEMBERS = (
    re.compile(r"model_weights\.ckpt"),
    re.compile(r"mp_rank_(\d+)/model_weights\.ckpt"),
    re.compile(r"tp_rank_(\d+)_pp_rank_(\d+)/model_weights\.ckpt"),
)

NAMES = NameTable(
    rows=(
        *megatron_rows(VOCABULARY),
        TableRow(FREQUENCIES, "language_model.rotary_pos_emb.inv_freq", optional=True),
    ),
    tied={"language_model.output_layer.weight": False, "word_embeddings.weight": False},
)


def matches(source: SourceFiles) -> bool:
    """Tell whether this is a ``.nemo`` file, or a directory with the members of one."""
    is_packed = source.path.is_file() and source.path.suffix == ".nemo"
    return is_packed or (source.path / _CONFIG).is_file()


def read(source: SourceFiles, drop: Sequence[str] = ()) -> Weights:
    """Read an archive or a directory; packed weights are copied to a temporary directory and mapped there."""
    description, store = open_archive(source.path)
    return from_store(store, NAMES, description, drop=drop)


def open_archive(path: Path) -> tuple[Description, RankStore]:
    """Open an archive or directory: description and whole tensors, under names without ``model.``."""
    archive = UnpackedArchive(path) if path.is_dir() else TarFile(path)
    location, config = path / _CONFIG, _config(path, archive)
    shape = shape_from(
        location, config, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"
    )
    for key, required in (
        ("position_embedding_type", "rope"),
        ("embedding_token_dropout", True),
        ("megatron_legacy", False),
    ):
        if config.get(key, required) != required:
            raise UserError(f"{location}: {key} is {config[key]!r}; this version reads {required!r} only")
    tanh = flag_from(location, config, "bias_gelu_fusion", False)
    epsilon = epsilon_from(location, config, "layernorm_epsilon", 1e-5)
    description = Description(shape, epsilon, "gelu_tanh" if tanh else "gelu")
    return description, RankStore(path, _stages(path, archive))


def _config(path: Path, archive: TarFile | UnpackedArchive) -> dict[str, Any]:
    try:
        config = yaml.safe_load(archive.read_text(_CONFIG))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path / _CONFIG}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path / _CONFIG}: holds no configuration")
    return config


def _stages(path: Path, archive: TarFile | UnpackedArchive) -> list[list[dict[str, Tensor]]]:
    """Return the tensors of each pipeline stage and tensor-parallel rank, under names without ``model.``."""
    ranks: dict[tuple[int, int], str] = {}
    for name in archive.members:
        for pattern in _MEMBERS:
            if match := pattern.fullmatch(name):
                tensor_rank, stage = (*map(int, match.groups()), 0, 0)[:2]
                ranks[stage, tensor_rank] = name
    num_stages = 1 + max((stage for stage, _ in ranks), default=-1)
    width = 1 + max((rank for _, rank in ranks), default=-1)
    if len(ranks) != num_stages * width or not ranks:
        raise UserError(
            f"{path}: holds {len(ranks)} weights files, not a complete set of ranks; copy the archive again"
        )
    return [[_tensors(archive, ranks[stage, rank]) for rank in range(width)] for stage in range(num_stages)]


def _tensors(archive: TarFile | UnpackedArchive, member: str) -> dict[str, Tensor]:
    with archive.file(member) as file:
        tensors = pickles.flat_tensors(file, pickles.load_pickle(file))
    return {re.sub(r"^model\.(module\.)?", "", name): value for name, value in tensors.items()}
