"""Says what a path is that no format reads: another model, or a checkpoint of which a part is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esm2mega.convert.files import foreign
from esm2mega.convert.files.source import OF_PYTORCH, OF_TRANSFORMERS, SourceFiles
from esm2mega.convert.formats.hf import open_tensors
from esm2mega.convert.formats.registry import read_weights
from esm2mega.errors import UserError
from esm2mega.report.fold_dirs import refusal_of_folds

_OTHER_ARCHIVES = (".nemo", ".mdl")


def explanation(source: SourceFiles) -> str | None:
    """Return the message that refuses a path for what it is; None if that is not known.

    Raises:
        UserError: A file of the path is damaged.
    """
    path = source.path
    if (error := refusal_of_folds(path)) is not None:
        return str(error)
    if (path / "adapter_config.json").is_file():
        return (
            f"{path}: holds adapters of PEFT, not a whole model; read them with `esm2mega lora import {path} "
            "--base BASE --out DIR`"
        )
    if source.has_config and (name := foreign.named_by_config(source.config)) is not None:
        return foreign.refusal(path, name)
    found = list(_files_of_transformers(path))
    if found:
        infos = open_tensors(path).infos
        if (name := foreign.named_by_tensors({name: info.shape for name, info in infos.items()})) is not None:
            return foreign.refusal(path, name)
        missing = "no model_type in its config.json" if source.has_config else "no config.json"
        return (
            f"{path}: holds {found[0]} and {missing}, which says what the model is and how many heads it "
            "has; copy config.json there from where the weights come from"
        )
    inside = sorted(file for file in path.glob("*") if file.suffix in (*OF_PYTORCH, *_OTHER_ARCHIVES))
    if inside:
        return f"{path}: is a directory of no known format; did you mean {' or '.join(map(str, inside[:3]))}?"
    return None


def _files_of_transformers(path: Path) -> Iterator[str]:
    """Yield the names of files of tensors, as transformers names them, that a path is or holds."""
    if path.is_file() and path.suffix in OF_TRANSFORMERS:
        yield path.name
    for stem, ending in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        for name in (f"{stem}{ending}", f"{stem}{ending}.index.json"):
            if (path / name).is_file():
                yield name


def refuse_foreign(path: Path, known: str | None) -> None:
    """Refuse a path whose format a command does not read that reads checkpoints of this package alone.

    Args:
        path: File or directory that is no such checkpoint.
        known: The format that it seems to be in; None if it is in none.

    Raises:
        UserError: It can be converted, or it is known what else it is.
    """
    if known is not None:
        read_weights(SourceFiles(path), known)  # raises the error for what conversion could not read either
        raise UserError(
            f"{path}: is a checkpoint in the format {known}, and this command reads those of esm2mega; make "
            f"one with `esm2mega convert {path} DIR --to esm2mega`"
        )
    if (text := explanation(SourceFiles(path))) is not None:
        raise UserError(text)
