"""The padded form of a model against Hugging Face's, with all parts and with padding."""

from __future__ import annotations

import pytest
import torch

from esm2mega.convert.start_point import read_start
from esm2mega.export.command import OUTPUTS, padded_model
from esm2mega.infer.source import source_of
from esm2mega.vocabulary import PAD
from tests.infer_models import LETTERS, Reference, ids_of, make_reference
from tests.parity import references

BOUND = 1e-4
"""Absolute, as of the command; the values are up to 10."""


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """With several layers."""
    pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    return make_reference(tmp_path_factory.mktemp("deeper"))


def test_everything_equals_hugging_face(deeper: Reference) -> None:
    """Proteins of 3 to 300 tokens in one batch, with masks, rare letters, and one with neither."""
    start = read_start(deeper.checkpoint)
    model = padded_model(start, source_of(start), OUTPUTS)
    batch = references.batch()
    input_ids, mask = batch.input_ids[:4, :300], batch.attention_mask[:4, :300]
    with torch.no_grad():
        ours = model(input_ids, mask)
        theirs = deeper.run_ids(input_ids)
        contacts = deeper.model.esm.predict_contacts(input_ids, mask)
    kept = mask.bool()
    for name, expected in (
        ("last_hidden_state", theirs.hidden_states[-1]),
        ("logits", theirs.logits),
    ):
        assert ours[name].shape == expected.shape
        assert (ours[name] - expected)[kept].abs().max() < BOUND
        assert not ours[name][~kept].any(), "padding is 0"
    for row, length in enumerate(kept.sum(dim=1).tolist()):
        residues, theirs_begin = slice(1, length - 1), slice(length - 2)
        # Theirs leave the place of <cls> out.
        difference = ours["contacts"][row, residues, residues] - contacts[row, theirs_begin, theirs_begin]
        assert difference.abs().max() < BOUND
        others = ours["contacts"][row].clone()
        others[residues, residues] = 0.0
        assert not others.any(), "padding, <cls> and <eos> are 0"


def test_padding_changes_nothing(reference: Reference) -> None:
    start = read_start(reference.checkpoint)
    model = padded_model(start, source_of(start), OUTPUTS)
    alone = ids_of(LETTERS)
    padded = torch.nn.functional.pad(alone, (0, 40), value=PAD)
    with torch.no_grad():
        first, second = (model(ids, (ids != PAD).long()) for ids in (alone, padded))
    for name, value in first.items():
        own = second[name][tuple(map(slice, value.shape))]
        assert (own - value).abs().max() < 1e-5, name
