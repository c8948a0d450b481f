"""A random ESM-2 of Hugging Face, and the checkpoint that was made of it, for all tests of exports."""

from __future__ import annotations

import pytest

from tests.infer_models import Reference, make_reference
from tests.parity.references import Shape

SMALL = Shape(num_layers=1, hidden_size=24, num_attention_heads=3, ffn_hidden_size=56)
"""Every operation of a layer costs time when it is traced, so there is one layer; more are a slow test."""


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    return make_reference(tmp_path_factory.mktemp("exported"), SMALL)
