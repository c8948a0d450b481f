"""Configurations of Hugging Face that mean another model, and the forms of one that mean the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esm2mega.config.load import load_run
from esm2mega.config.presets import shape_of
from esm2mega.convert.convert import convert
from esm2mega.convert.files.vocabulary import check_vocabulary, write_tokenizer
from esm2mega.convert.formats import hf
from esm2mega.convert.formats.registry import open_weights
from esm2mega.errors import UserError
from tests import foreign

CONFIG = foreign.HF_CONFIG


def test_absent_epsilon_is_that_of_the_class() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "layer_norm_eps"}
    assert hf.describe(Path("c"), config).layernorm_epsilon == 1e-12
    assert hf.describe(Path("c"), CONFIG).layernorm_epsilon == 1e-5
    assert hf.config_of(hf.describe(Path("c"), CONFIG))["layer_norm_eps"] == 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": None}, "position_embedding_type is 'absolute'; ESM-2 has 'rotary'"),
        ({"token_dropout": None}, "token_dropout is False; ESM-2 has True"),
        ({"emb_layer_norm_before": True}, "emb_layer_norm_before is True"),
        ({"is_folding_model": True}, "is_folding_model is True"),
        ({"vocab_size": 64}, "vocab_size is 64; ESM-2 has 33"),
        ({"mask_token_id": 4}, "mask_token_id is 4; ESM-2 has 32"),
        ({"rope_theta": 500.0}, "rope_theta is 500.0"),
        ({"num_attention_heads": 7}, "hidden_size=48 does not divide into 7 heads"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4', not a positive number"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps is 'tiny', not a number"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hf.describe(Path("config.json"), {**CONFIG, **change})


def test_a_permuted_vocabulary_is_refused(tmp_path: Path) -> None:
    """Every shape fits; only the words tell."""
    write_tokenizer(tmp_path)
    check_vocabulary(tmp_path)
    words = (tmp_path / "vocab.txt").read_text().split()
    words[4], words[5] = words[5], words[4]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    with pytest.raises(UserError, match="not the vocabulary of ESM-2 .differs from id 4 on."):
        check_vocabulary(tmp_path)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")
    return foreign.write_hf(foreign.truth(torch.float32, "fp16"), tmp_path)


def assert_same(first: Path, second: Path) -> None:
    a, b = open_weights(first), open_weights(second)
    assert a.infos == b.infos
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.infos)


def test_the_architecture_alone_can_be_taken(directory: Path) -> None:
    """As transformers wrote it; what it stands for is what the weights have."""
    model, found = load_run(None, [f"model.from={directory}"]).model, open_weights(directory).description
    assert shape_of(model) == found.shape
    assert model.layernorm_epsilon == found.layernorm_epsilon


def test_pickled_and_sharded_directories(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "SHARD_BYTES", 50_000)
    convert(directory, tmp_path / "sharded", "hf")
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 5
    assert_same(directory, tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    stored = load_file(directory / "model.safetensors")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(x.numel() * 4 for x in stored.values())

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((directory / "config.json").read_text())
    torch.save(stored, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(directory, pickled)

    check_wrong_indices(tmp_path / "sharded")
    (tmp_path / "sharded" / "model-00003-of-00014.safetensors").unlink(missing_ok=True)
    for path in list((tmp_path / "sharded").glob("model-00002-of-*")):
        path.unlink()
    with pytest.raises(UserError, match="model-0000[23]-of-.*, which is missing; copy all shards"):
        open_weights(tmp_path / "sharded")


def check_wrong_indices(sharded: Path) -> None:
    """transformers reads each tensor where the index says; another file may hold an older one."""
    file = sharded / "model.safetensors.index.json"
    good = file.read_text()
    index = json.loads(good)
    first, *names = index["weight_map"]
    last = next(name for name in names if index["weight_map"][name] != index["weight_map"][first])
    for change, message in (
        ({first: index["weight_map"][last]}, f"does not fit its files: {first} is in model-"),
        ({"esm.none": index["weight_map"][first]}, "esm.none is in none, by the index in model-"),
        ({first: 7}, "weight_map is no table of names"),
    ):
        file.write_text(json.dumps({"weight_map": {**index["weight_map"], **change}}))
        with pytest.raises(UserError, match=message):
            open_weights(sharded)
    file.write_text(good)
    path, other = (sharded / index["weight_map"][name] for name in (first, last))
    before = path.read_bytes()
    save_file({**load_file(path), last: load_file(other)[last] + 1}, path)
    with pytest.raises(UserError, match=f"holds {last}, as model-"):
        open_weights(sharded)
    path.write_bytes(before)


def test_a_bare_model_is_an_encoder_without_head(directory: Path, tmp_path: Path) -> None:
    state = load_file(directory / "model.safetensors")
    state = {name: value for name, value in state.items() if not name.startswith("lm_head.")}
    save_file(
        {name.removeprefix("esm."): value for name, value in state.items()}, directory / "model.safetensors"
    )
    weights = open_weights(directory)
    assert weights.description.head is None and not any(n.startswith("lm_head.") for n in weights.infos)
    for target, message in (("te", "holds no head; te holds masked"), ("esm2mega", "start a fine-tuning")):
        with pytest.raises(UserError, match=message):
            convert(directory, tmp_path / target, target)
        assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "config.json: cannot be read as JSON"),
        (
            json.dumps({**CONFIG, "num_hidden_layers": 10**9}),
            "says 1000000000 layers, and it holds 78 tensors",
        ),
        (
            json.dumps({**CONFIG, "tie_word_embeddings": False}),
            "lm_head.decoder.weight is missing, so readers",
        ),
        (
            json.dumps({**CONFIG, "tie_word_embeddings": "False"}),
            "lm_head.decoder.weight is missing, so readers",
        ),
        (
            json.dumps({**CONFIG, "tie_word_embeddings": "maybe"}),
            "tie_word_embeddings is 'maybe', neither true nor false",
        ),
    ],
    ids=["nested", "huge", "untied", "untied in text", "tied and not"],
)
def test_a_bad_configuration_is_one_line(directory: Path, content: str, message: str) -> None:
    (directory / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_weights(directory)


def test_a_file_cut_short_is_one_line(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        open_weights(directory)
