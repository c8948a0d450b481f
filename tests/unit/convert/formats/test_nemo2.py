"""A BioNeMo 2 directory is what megatron-core and fiddle, with which NeMo 2 reads it, make of it."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from esm2mega.config.schema import ParallelConfig
from esm2mega.convert.convert import convert
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.verify.verify import verify
from esm2mega.errors import UserError
from esm2mega.parallel.initialize import process_groups
from tests import foreign

pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")


@pytest.fixture(scope="module")
def truth() -> foreign.Truth:
    return foreign.truth(torch.float32, "formula")


@pytest.fixture(scope="module")
def written(truth: foreign.Truth, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemo2")
    conversion = convert(foreign.write_hf(truth, folder), folder / "written", "nemo2")
    assert conversion.notes.filled == [
        "95 rows of vocabulary padding: zeros, and -10000 in the bias, so that they have no probability"
    ]
    assert "bias_activation_fusion=False" in conversion.notes.changed[0]
    assert "logits differ by" in verify(conversion)[1]
    return folder / "written"


def test_megatron_core_loads_it_into_its_own_bert(written: Path, truth: foreign.Truth) -> None:
    """As BioNeMo 2 does: the model's sharded state under the prefix, and ``dist_checkpointing.load``. No name
    is missing or left over.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import StrictHandling
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    with process_groups(ParallelConfig(), seed=1):
        config = TransformerConfig(
            num_layers=foreign.L,
            hidden_size=foreign.H,
            ffn_hidden_size=foreign.F,
            num_attention_heads=foreign.A,
            use_cpu_initialization=True,
        )
        model = BertModel(
            *(config, 0, bert_layer_local_spec, 128, 64),
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            add_binary_head=False,
        )
        state = {
            name: entry for name, entry in model.sharded_state_dict().items() if "_extra_state" not in name
        }
        for entry in state.values():
            entry.key = f"module.{entry.key}"
        loaded = dist_checkpointing.load(state, str(written / "weights"), strict=StrictHandling.RAISE_ALL)
        unused = model.load_state_dict(loaded, strict=False).unexpected_keys
    assert not unused
    expected = foreign.nemo2_state(truth)
    expected["output_layer.bias"][33:] = -10000.0
    found = {name: value.data for name, value in model.named_parameters()}
    for name, value in expected.items():
        if not name.startswith("encoder.layers."):
            assert torch.equal(found.pop(name), value), name
            continue
        inner = name.removeprefix("encoder.layers.")
        # The plain spec keeps the LayerNorms beside the linears that they belong to.
        inner = inner.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        inner = inner.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        for layer in range(foreign.L):
            assert torch.equal(found.pop(f"encoder.layers.{layer}.{inner}"), value[layer]), name
    assert not found
    softmax = expected["output_layer.bias"].softmax(0)
    assert softmax[33:].sum() == 0.0 and softmax[:33].sum() == pytest.approx(1.0)


@dataclass
class ESM2Config:
    """Stands in for the class of BioNeMo 2, which is on no package index."""

    num_layers: int = 33
    hidden_size: int = 1280
    ffn_hidden_size: int = 5120
    num_attention_heads: int = 20
    layernorm_epsilon: float = 1e-5
    bias_activation_fusion: bool = True
    make_vocab_size_divisible_by: int = 64


@pytest.fixture
def _bionemo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules under the names of NeMo 2 and BioNeMo 2, with classes that keep their arguments."""

    def module(config: ESM2Config) -> types.SimpleNamespace:
        return types.SimpleNamespace(config=config)

    def context(model: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(model=model)

    for name, attribute, value in (
        ("bionemo.esm2.model.model", "ESM2Config", ESM2Config),
        ("bionemo.llm.lightning", "BionemoLightningModule", module),
        ("nemo.lightning.io.pl", "TrainerContext", context),
    ):
        stand_in = types.ModuleType(name)
        setattr(stand_in, attribute, value)
        monkeypatch.setitem(sys.modules, name, stand_in)


@pytest.mark.usefixtures("_bionemo")
def test_fiddle_builds_the_configuration(written: Path) -> None:
    """By the path under which NeMo 2 looks for it, and as part of the whole."""
    fiddle = pytest.importorskip("fiddle", reason="fiddle is not installed: pip install esm2mega[dev]")
    from fiddle.experimental.serialization import load_json

    graph = json.loads((written / "context" / "io.json").read_text())
    whole = fiddle.build(load_json(json.dumps(graph)))
    (key,) = (key for key, node in graph["objects"].items() if "<root>.model.config" in node["paths"])
    graph["root"]["key"] = key
    config = fiddle.build(load_json(json.dumps(graph)))
    expected = ESM2Config(foreign.L, foreign.H, foreign.F, foreign.A, foreign.EPSILON, False, 128)
    assert config == whole.model.config == expected
    shown: dict[str, Any] = yaml.safe_load((written / "context" / "model.yaml").read_text())["config"]
    assert shown.pop("_target_") == "bionemo.esm2.model.model.ESM2Config"
    assert ESM2Config(**shown) == expected


def test_both_forms_of_gelu_come_back(written: Path, tmp_path: Path) -> None:
    """What BioNeMo trained keeps its tanh, without a word; what has erf keeps erf."""
    theirs = foreign.write_nemo2(foreign.truth(torch.float32, "formula", tanh=True), tmp_path)
    again = convert(theirs, tmp_path / "again", "nemo2")
    assert not again.notes.changed
    assert open_weights(theirs).description == open_weights(tmp_path / "again").description
    assert open_weights(tmp_path / "again").description.activation == "gelu_tanh"
    assert open_weights(written).description.activation == "gelu"


def test_a_dimension_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    theirs = foreign.write_nemo2(foreign.truth(torch.float32, "formula"), tmp_path)
    file = theirs / "context" / "io.json"
    graph = json.loads(file.read_text())
    items = dict(graph["objects"]["esm2_config_1"]["items"])
    items["Attr(name='ffn_hidden_size')"]["type"] = "no leaf"
    file.write_text(json.dumps(graph))
    with pytest.raises(UserError, match="io.json: ffn_hidden_size is {.*}, not a positive number"):
        open_weights(theirs)
