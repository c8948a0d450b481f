"""The model's own bookkeeping: vocabulary padding, names, logits. tests/parity compares the numbers."""

from __future__ import annotations

import pytest
import torch

from esm2mega.model.esm2 import ESM2Model, padded_vocab_size, stage_flags
from esm2mega.model.packed import PackedSequences

IDS = torch.tensor([0, 5, 32, 2, 0, 6, 2])
PACKED = PackedSequences.from_lengths([4, 3])


@pytest.mark.parametrize("tp_size", [1, 2, 4, 5, 8, 10, 20, 40])
def test_table_has_the_same_rows_for_every_published_layout(tp_size: int) -> None:
    assert padded_vocab_size(tp_size) == 40


@pytest.mark.parametrize(("tp_size", "rows"), [(3, 48), (6, 48), (16, 48), (64, 64)])
def test_table_splits_evenly_at_other_sizes(tp_size: int, rows: int) -> None:
    assert padded_vocab_size(tp_size) == rows
    assert rows % tp_size == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("output_layer.weight", "embedding.word_embeddings.weight"),
        ("output_layer.bias", "output_layer.bias"),
        ("encoder.final_layernorm.bias", "encoder.final_layernorm.bias"),
        ("encoder.layers.0.mlp.linear_fc1.weight", "encoder.layers.6.mlp.linear_fc1.weight"),
        ("encoder.layers.1.input_layernorm.bias", "encoder.layers.7.input_layernorm.bias"),
        ("lm_head.dense.weight", "lm_head.dense.weight"),
    ],
)
def test_names_count_layers_from_the_first_stage(model: ESM2Model, name: str, expected: str) -> None:
    for number, layer in enumerate(model.encoder.layers):
        layer.layer_number = 7 + number  # as on a later stage; Megatron-Core counts from 1
    assert model.global_parameter_name(name) == expected


def test_one_process_is_first_and_last_stage(world: None) -> None:
    assert stage_flags() == (True, True)


def test_logits_have_no_padding(model: ESM2Model) -> None:
    assert model(IDS, PACKED).shape == (7, 33)


def test_logits_at_positions_are_those_of_all(model: ESM2Model) -> None:
    positions = torch.tensor([1, 2, 5])
    assert torch.allclose(model(IDS, PACKED, positions), model(IDS, PACKED)[positions], rtol=1e-13)


def test_no_positions_give_no_logits_and_no_gradient(model: ESM2Model) -> None:
    logits = model(IDS, PACKED, torch.empty(0, dtype=torch.int64))
    assert logits.shape == (0, 33)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_table_is_tied_to_the_decoder(model: ESM2Model) -> None:
    assert "output_layer.weight" not in dict(model.named_parameters())
    before = model(IDS, PACKED)
    with torch.no_grad():
        # Token 20 is not in the input, so the change can only come through the decoder.
        model.embedding.word_embeddings.weight[20] *= 2.0
    after = model(IDS, PACKED)
    assert not torch.allclose(after[:, 20], before[:, 20])
    assert torch.equal(after[:, :20], before[:, :20])


def test_decoder_bias_is_per_token(model: ESM2Model) -> None:
    before = model(IDS, PACKED)
    with torch.no_grad():
        model.output_layer.bias[7] += 2.0
    change = model(IDS, PACKED) - before
    assert torch.allclose(change[:, 7], torch.full((7,), 2.0, dtype=torch.float64))
    assert change.abs().sum(dim=0).nonzero().flatten().tolist() == [7]
