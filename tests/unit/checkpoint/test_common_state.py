"""A checkpoint as Megatron-Core 0.19 writes it is read by a version that has a file for plain values.

`tests/distributed/test_versions.py` does so with the real one, where both are installed.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.store import load_training_state
from esm2mega.errors import UserError
from tests.unit.conftest import TinyRun
from tests.unit.runs import tiny_run, train_state

STORED = "common_state/shard_0_1"


class _Touches:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def _as_later_version(source: Path, checkpoint: Path, values: Any = None) -> None:
    """Copy a checkpoint with the content of ``common.pt``, or `values`, between the tensors of rank 0."""
    shutil.copytree(source, checkpoint)
    folder = checkpoint / "model"
    if not (folder / "common.pt").exists():
        pytest.skip("megatron-core from 0.19 on writes no common.pt")
    content = io.BytesIO()
    torch.save([torch.load(folder / "common.pt", weights_only=True) if values is None else values], content)
    (folder / "common.pt").unlink()
    data = folder / "__0_0.distcp"
    place = _StorageInfo(data.name, data.stat().st_size, len(content.getvalue()))
    with data.open("ab") as file:
        file.write(content.getvalue())
    # This is the file of the test itself.
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata[STORED] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(STORED)] = place
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )


def _loaded(checkpoint: Path) -> tuple[dict[str, torch.Tensor], Any]:
    state = train_state(tiny_run())
    load_training_state(checkpoint, state.model, state.optimizer)
    weights = {name: p.detach().clone() for chunk in state.model for name, p in chunk.named_parameters()}
    return weights, state.optimizer.state_dict()


@pytest.mark.usefixtures("world")
def test_values_between_the_tensors_are_those_of_the_file(finished: TinyRun, tmp_path: Path) -> None:
    source = layout.step_dir(finished.run_dir, 4)
    _as_later_version(source, tmp_path / "step_00000004")
    (expected, of_file), (weights, found) = _loaded(source), _loaded(tmp_path / "step_00000004")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert str(found) == str(of_file) and "exp_avg" in str(found)


@pytest.mark.usefixtures("world")
def test_values_that_would_run_code_are_refused(finished: TinyRun, tmp_path: Path) -> None:
    checkpoint, made = tmp_path / "step_00000004", tmp_path / "made"
    _as_later_version(layout.step_dir(finished.run_dir, 4), checkpoint, _Touches(made))
    with pytest.raises(UserError, match="holds more than tensors and plain values") as error:
        _loaded(checkpoint)
    assert str(checkpoint) in str(error.value) and "\n" not in str(error.value) and not made.exists()
