"""Models that are not ESM-2 are named by what their files say of them."""

from __future__ import annotations

from typing import Any

import pytest

from esm2mega.convert.files.foreign import named_by_arguments, named_by_config, named_by_tensors
from tests import foreign


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "esm", "vocab_size": 33, "position_embedding_type": "absolute"}, "ESM-1b or ESM-1v"),
        ({"model_type": "esm", "vocab_size": 446, "position_embedding_type": "rotary"}, "SaProt"),
        ({"model_type": "esm", "vocab_size": 4105, "position_embedding_type": "absolute"}, "Nucleotide"),
        ({"model_type": "esm", "vocab_size": 33, "is_folding_model": True}, "ESMFold"),
        ({"model_type": "t5", "vocab_size": 128}, "ProtT5 (model_type 't5')"),
        ({"model_type": "t5", "vocab_size": 144}, "Ankh"),
        ({"model_type": "t5", "vocab_size": 32128}, "a T5"),
        ({"model_type": "bert", "vocab_size": 30}, "ProtBert"),
        ({"model_type": "bert", "vocab_size": 30522}, "a BERT"),
        ({"model_type": "ESMplusplus"}, "ESM-C (ESM++) (model_type 'ESMplusplus')"),
        ({"model_type": "mamba"}, "another model (model_type 'mamba')"),
    ],
)
def test_by_the_configuration(config: dict[str, Any], name: str) -> None:
    assert name in (named_by_config(config) or "")


@pytest.mark.parametrize("config", [{}, {"model_type": 3}, foreign.HF_CONFIG])
def test_esm2_and_what_says_nothing_have_no_other_name(config: dict[str, Any]) -> None:
    assert named_by_config(config) is None


@pytest.mark.parametrize(
    ("tensor", "shape", "name"),
    [
        ("encoder.sentence_encoder.embed_positions.weight", (1026, 8), "ESM-1b or ESM-1v"),
        ("decoder.layers.0.self_attn.bias_k", (1, 1, 8), "ESM-1"),
        ("encoder.layers.0.row_self_attention.layer.q_proj.weight", (8, 8), "the MSA Transformer"),
        ("transformer.blocks.0.attn.layernorm_qkv.1.weight", (24, 8), "ESM-C"),
        ("encoder.structure_tokens_embed.weight", (4101, 8), "ESM3"),
        ("trunk.structure_module.ipa.linear_q.weight", (8, 8), "ESMFold"),
        ("encoder.embed_graph.embed_node.weight", (8, 8), "ESM-IF1"),
        ("shared.weight", (128, 8), "ProtT5"),
        ("shared.weight", (144, 8), "Ankh"),
        ("shared.weight", (), "a T5"),
        ("esm.embeddings.word_embeddings.weight", (446, 8), "SaProt"),
        ("module.bert.embeddings.word_embeddings.weight", (30, 8), "ProtBert"),
        (
            "base_model.model.esm.encoder.layer.0.attention.self.query.lora_A.weight",
            (2, 8),
            "adapters of PEFT",
        ),
    ],
)
def test_by_tensors(tensor: str, shape: tuple[int, ...], name: str) -> None:
    """Also behind the prefix of a wrapper, and by names alone where a file may not be loaded."""
    found = named_by_tensors({"other": (1,), f"module.{tensor}": shape})
    assert found is not None and found.startswith(name)


@pytest.mark.parametrize("table", ["embed_tokens.weight", "esm.embeddings.word_embeddings.weight"])
def test_tensors_of_esm2_have_no_other_name(table: str) -> None:
    assert named_by_tensors({table: (33, 8), "layers.0.self_attn.q_proj.weight": (8, 8)}) is None


def test_by_the_arguments_of_fair_esm() -> None:
    assert named_by_arguments({"arch": "roberta_large"}) == "ESM-1b or ESM-1v (args.arch 'roberta_large')"
    assert named_by_arguments({"arch": "msa_transformer"}).startswith("the MSA Transformer")
    assert "before ESM-2" in named_by_arguments({})
