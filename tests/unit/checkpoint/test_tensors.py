"""Whole tensors by name, without a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.digests import DIGESTS
from esm2mega.checkpoint.store import load_weights
from esm2mega.checkpoint.tensors import TensorInfo, TensorReader
from esm2mega.config.schema import ParallelConfig
from esm2mega.errors import DamagedError, UserError
from esm2mega.model.build import build_model
from tests.unit.checkpoint.test_digests import flip
from tests.unit.conftest import TinyRun
from tests.unit.runs import CPU, tiny_run


@pytest.fixture
def checkpoint(finished: TinyRun) -> Path:
    return layout.step_dir(finished.run_dir, 4)


def test_index_lists_weights_and_optimizer(checkpoint: Path) -> None:
    index = TensorReader(checkpoint).index
    weights = {name for name in index if not name.startswith("optimizer.")}
    assert index["embedding.word_embeddings.weight"] == TensorInfo((40, 24), torch.float64)
    assert index["encoder.layers.mlp.linear_fc1.weight"] == TensorInfo((2, 56, 24), torch.float64)
    assert index["rotary.inv_freq"] == TensorInfo((4,), torch.float64)
    assert "output_layer.weight" not in weights, "tied, so it is stored once"
    # two moments for each weight but the frequencies, which are not trained
    assert len(index) - len(weights) == 2 * (len(weights) - 1)


def test_num_bytes() -> None:
    assert TensorInfo((3, 5), torch.bfloat16).num_bytes == 30
    assert TensorInfo((), torch.float64).num_bytes == 8


def test_tensors_are_those_of_the_model(world: None, checkpoint: Path) -> None:
    (model,) = build_model(tiny_run().model, ParallelConfig(), CPU, seed=99)
    load_weights(checkpoint, [model])
    reader, weights = TensorReader(checkpoint), dict(model.named_parameters())
    for name in ("embedding.word_embeddings.weight", "lm_head.dense.bias", "output_layer.bias"):
        assert torch.equal(reader.read(name), weights[name])
    stacked = [weights[f"encoder.layers.{n}.pre_mlp_layernorm.weight"] for n in (0, 1)]
    assert torch.equal(reader.read("encoder.layers.mlp.linear_fc1.layer_norm_weight"), torch.stack(stacked))
    together = reader.read_many(reader.index)
    assert list(together) == list(reader.index)
    assert all(torch.equal(value, reader.read(name)) for name, value in together.items())


def test_unknown_name_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="no tensor lm_head.nothing; esm2mega inspect lists"):
        TensorReader(checkpoint).read("lm_head.nothing")
    with pytest.raises(UserError, match="no tensor lm_head.nothing; esm2mega inspect lists"):
        TensorReader(checkpoint).read_many(["lm_head.dense.bias", "lm_head.nothing"])


def test_lost_data_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step_00000004"
    shutil.copytree(checkpoint, copy)
    for data in (copy / "model").glob("*.distcp"):
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged: .* cannot be read"):
        TensorReader(copy).read("embedding.word_embeddings.weight")
    for data in (copy / "model").glob("*.distcp"):
        data.unlink()
    with pytest.raises(UserError, match=r"\.distcp: is missing"):
        TensorReader(copy).read_many(["embedding.word_embeddings.weight", "lm_head.dense.bias"])
    with pytest.raises(UserError, match=r"\.distcp: is missing"):
        TensorReader(copy).read("embedding.word_embeddings.weight")


def test_a_changed_number_is_noticed_by_its_crc(checkpoint: Path, tmp_path: Path) -> None:
    """Where there are no digests: in checkpoints of earlier versions, and of NeMo 2."""
    shutil.copytree(checkpoint, tmp_path / "x")
    (tmp_path / "x" / DIGESTS).unlink()
    name, value = "lm_head.dense.weight", TensorReader(checkpoint).read("lm_head.dense.weight")
    for path in sorted((tmp_path / "x" / layout.MODEL).glob("*.distcp")):
        place = path.read_bytes().find(value.numpy().tobytes())
        if place >= 0:
            flip(path, place + 100)
            break
    with pytest.raises(DamagedError, match=f"{path}: is damaged: its entry .* is not what was written"):
        TensorReader(tmp_path / "x").read(name)
    with pytest.raises(DamagedError, match="is not what was written"):
        TensorReader(tmp_path / "x").read_many([name])
    other = "lm_head.dense.bias"
    assert torch.equal(TensorReader(tmp_path / "x").read(other), TensorReader(checkpoint).read(other))
