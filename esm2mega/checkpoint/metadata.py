"""Refuse checkpoint metadata that would run code when it is read.

``torch.distributed.checkpoint`` stores its index, ``.metadata``, as a pickle and reads it without an allow-list. The file
is therefore opened here first, under a list of the few classes that an honest index is made of.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from esm2mega.errors import UserError

# Exact names: a whole module would let a pickle call any function in it.
_ALLOWED = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.serialization", "_get_layout"),
}
_DTYPES = ("bfloat16", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def check_metadata(model_dir: Path) -> None:
    """Raise `UserError` unless ``.metadata`` of `model_dir` is an honest index of tensors."""
    path = model_dir / ".metadata"
    try:
        with path.open("rb") as file:
            _AllowList(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the checkpoint is damaged, use an earlier one") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: it would load {error}; only tensor indices are allowed in it") from error
    except (EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(f"{path}: not an index of tensors ({error}); the checkpoint is damaged, use an earlier one") from error
