"""Chooses among the formats of embeddings: ``hdf5``, ``bionemo``, ``npz``, ``parquet`` and ``pt``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm2mega.config.infer import absolute_layers
from esm2mega.config.schema import InferConfig, ModelConfig
from esm2mega.errors import UserError
from esm2mega.infer.target import OutputTarget

if TYPE_CHECKING:
    from esm2mega.infer.arrays import ArrayFile

_ENDINGS = {".h5": "hdf5", ".hdf5": "hdf5", ".npz": "npz", ".parquet": "parquet", ".pq": "parquet", "": "pt"}


@dataclass(frozen=True)
class EmbeddingTarget(OutputTarget):
    """Says where embeddings go, and in which format.

    Attributes:
        outputs: Value of `infer.outputs`.
        compression: Value of `infer.compression`.
    """

    outputs: Sequence[str]
    compression: str = "none"

    @classmethod
    def of(cls, out: str | Path, infer: InferConfig, model: ModelConfig) -> EmbeddingTarget:
        """Choose the format by the ending of the name.

        Raises:
            UserError: The ending is unknown, or the format cannot hold the outputs.
        """
        path = Path(out)
        if path.name in ("", ".."):
            raise UserError(f"--out {out}: is no name of a file or folder to make; give one")
        kind = _ENDINGS.get(path.suffix.lower())
        if kind is None:
            raise UserError(
                f"--out {out}: unknown ending {path.suffix!r}; .h5, .npz and .parquet are files, a "
                "name without ending is a folder of .pt files"
            )
        if infer.layout == "bionemo":
            if kind != "hdf5":
                raise UserError(f"--layout bionemo is a layout of HDF5 files; give --out NAME.h5, not {out}")
            if {"logits", "contacts"} & set(infer.outputs) or len(absolute_layers(infer, model)) != 1:
                raise UserError("--layout bionemo holds residue and pooled of one layer; use --layout ragged")
            if infer.dtype == "bf16":
                raise UserError("--layout bionemo is read by programs without bf16; set --dtype fp32 or fp16")
            kind = "bionemo"
        elif infer.compression != "none":
            raise UserError(
                f"--compression {infer.compression} is for --layout bionemo, {out} has another; leave it out"
            )
        if kind == "parquet":
            from esm2mega.infer.exports import check_parquet

            check_parquet()
            if infer.dtype == "bf16":
                raise UserError("Parquet has no bf16; set --dtype fp32 or fp16")
        return cls(path, kind, infer.outputs, infer.compression)

    @property
    def finals(self) -> Mapping[str, Path]:
        if self.format != "bionemo":
            return super().finals
        from esm2mega.infer.hdf5 import bionemo_paths

        return {kind: path for kind, path in bionemo_paths(self.out).items() if kind in self.outputs}

    def _writer(self, kind: str) -> Callable[[Path, Any, ArrayFile], None]:
        from esm2mega.infer import exports, hdf5

        if self.format == "bionemo":
            return lambda path, contents, arrays: hdf5.write_bionemo(
                path, kind, contents, arrays, self.compression
            )
        return {"npz": exports.write_npz, "parquet": exports.write_parquet, "pt": exports.write_pt}[
            self.format
        ]

    def _reader(self) -> Callable[[Path], dict[str, Any]]:
        from esm2mega.infer import exports, hdf5

        return {
            "hdf5": hdf5.read_attributes,
            "bionemo": hdf5.read_attributes,
            "npz": exports.read_npz_attributes,
            "parquet": exports.read_parquet_attributes,
            "pt": exports.read_pt_attributes,
        }[self.format]
