"""The encoder without training is a run of pretraining before its first step."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import torch

from esm2mega.autoeval.random_encoder import write_random_encoder
from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.formats import esm2mega as own_format
from esm2mega.convert.name_table import FREQUENCIES
from esm2mega.infer.api import load
from esm2mega.model.build import build_model
from tests.infer_models import SHAPE, make_reference


def stored(name: str) -> str:
    """The name in checkpoints, which have a LayerNorm with the linear module behind it."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def test_weights_are_those_of_pretraining_at_step_0(world: None, tmp_path: Path) -> None:
    """They have the shape of a model of Hugging Face, and nothing else of it."""
    like = make_reference(tmp_path)
    for source in (like.hugging_face, like.checkpoint):
        out = write_random_encoder(source, tmp_path / f"random {source.name}", seed=9)
        found = own_format.read(SourceFiles(out))
        shape = ModelConfig(
            num_layers=SHAPE.num_layers,
            hidden_size=SHAPE.hidden_size,
            num_attention_heads=SHAPE.num_attention_heads,
            ffn_hidden_size=SHAPE.ffn_hidden_size,
            layer_spec="local",
        )
        (model,) = build_model(shape, ParallelConfig(), torch.device("cpu"), seed=9)
        parameters = {stored(model.global_parameter_name(name)): p for name, p in model.named_parameters()}
        assert set(found.infos) - {FREQUENCIES} == set(parameters)
        for name, parameter in parameters.items():
            value = found.read(name)
            # Stored tables have no rows of padding.
            assert torch.equal(value, parameter[: len(value)]), name


def test_embeddings_depend_on_the_seed(tmp_path: Path) -> None:
    like = make_reference(tmp_path).checkpoint
    outs = [write_random_encoder(like, tmp_path / f"{number}", seed) for number, seed in enumerate((1, 1, 2))]
    names = [sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) for out in outs]
    assert names[0] == names[1]
    weights = [name for name in names[0] if name.suffix == ".distcp"]
    assert weights
    assert all(filecmp.cmp(outs[0] / name, outs[1] / name, shallow=False) for name in weights)
    vectors = []
    for out in outs:
        with load(out) as model:
            vectors.append(model.embed(["MKTAYIAKQR", "GSHMLEDPVE"], pooling="mean"))
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert np.isfinite(vectors[0]).all()
    # LayerNorm gives every vector of a residue variance 1, so that other weights change values by about 1.
    assert np.abs(vectors[0] - vectors[2]).max() > 0.1
