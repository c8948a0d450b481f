"""The presets are the published ESM-2 architectures, and explicit dimensions must not contradict them."""

import pytest

from esm2mega.config.presets import PRESETS, ModelShape, fill_shape, shape_of
from esm2mega.config.schema import MODEL_SIZES, ModelConfig
from esm2mega.errors import UserError


def test_every_size_has_a_preset():
    assert tuple(PRESETS) == MODEL_SIZES


@pytest.mark.parametrize(
    ("size", "layers", "hidden", "heads"),
    [
        ("8M", 6, 320, 20),
        ("35M", 12, 480, 20),
        ("150M", 30, 640, 20),
        ("650M", 33, 1280, 20),
        ("3B", 36, 2560, 40),
        ("15B", 48, 5120, 40),
    ],
)
def test_published_shapes(size, layers, hidden, heads):
    assert PRESETS[size] == ModelShape(layers, hidden, 4 * hidden, heads)


def test_size_fills_missing_dimensions_and_accepts_equal_ones():
    model = ModelConfig(size="8M", num_layers=6)
    fill_shape(model)
    assert shape_of(model) == PRESETS["8M"]


def test_contradiction_names_both_values():
    with pytest.raises(UserError, match=r"model\.num_layers=7 contradicts model\.size=8M, which has 6"):
        fill_shape(ModelConfig(size="8M", num_layers=7))


def test_explicit_dimensions_need_no_size():
    model = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2)
    fill_shape(model)
    assert shape_of(model) == ModelShape(2, 8, 16, 2)


def test_missing_dimensions_are_named():
    with pytest.raises(UserError, match=r"model\.ffn_hidden_size, model\.num_attention_heads not set"):
        fill_shape(ModelConfig(num_layers=2, hidden_size=8))
