"""`model.from`: the architecture of a name or directory of Hugging Face, and nothing else of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esm2mega.config.architecture import FROM, PUBLISHED, check_esm2
from esm2mega.config.load import load_run, load_run_over, run_from_yaml
from esm2mega.config.presets import PRESETS, shape_of
from esm2mega.config.resolved import save_resolved
from esm2mega.errors import UserError
from esm2mega.vocabulary import MASK, PAD, VOCAB

SMALL = {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 56, "num_attention_heads": 2}


PUBLIC = {
    "model_type": "esm",
    "vocab_size": 33,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "emb_layer_norm_before": False,
    "layer_norm_eps": 1e-5,
}
"""Stands in every published `config.json` of ESM-2; the test of the converter reads one of transformers."""


def directory(path: Path, **changes: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**PUBLIC, **SMALL, **changes}))
    return path


def test_names_are_the_published_ones() -> None:
    assert list(PUBLISHED) == [
        "facebook/esm2_t6_8M_UR50D",
        "facebook/esm2_t12_35M_UR50D",
        "facebook/esm2_t30_150M_UR50D",
        "facebook/esm2_t33_650M_UR50D",
        "facebook/esm2_t36_3B_UR50D",
        "facebook/esm2_t48_15B_UR50D",
    ]
    for name, size in PUBLISHED.items():
        assert load_run(None, [f"{FROM}={name}"]).model == load_run(None, [f"model.size={size}"]).model


def test_the_tokens_of_esm2_are_those_of_the_vocabulary() -> None:
    good = {"position_embedding_type": "rotary", "token_dropout": True}
    good |= {"vocab_size": len(VOCAB), "pad_token_id": PAD, "mask_token_id": MASK}
    check_esm2(Path("x"), good)


def test_a_directory_gives_shape_and_epsilon_and_is_not_recorded(tmp_path: Path) -> None:
    path = directory(tmp_path / "hf", layer_norm_eps=1e-12)
    run = load_run(None, [f"{FROM}={path}", "model.precision=bf16"])
    assert tuple(shape_of(run.model)) == tuple(SMALL.values())
    assert (run.model.size, run.model.layernorm_epsilon, run.model.precision) == (None, 1e-12, "bf16")
    save_resolved(run, tmp_path / "config.yaml")
    assert "  from:" not in (tmp_path / "config.yaml").read_text()
    (path / "config.json").unlink()
    assert run_from_yaml(tmp_path / "config.yaml") == run


def test_an_absent_epsilon_is_that_of_the_class(tmp_path: Path) -> None:
    path = directory(tmp_path / "hf")
    content = json.loads((path / "config.json").read_text())
    del content["layer_norm_eps"]
    (path / "config.json").write_text(json.dumps(content))
    assert load_run(None, [f"{FROM}={path}"]).model.layernorm_epsilon == 1e-12


def test_a_published_shape_keeps_its_name(tmp_path: Path) -> None:
    eight = dict(zip(SMALL, PRESETS["8M"], strict=True))
    assert load_run(None, [f"{FROM}={directory(tmp_path / 'hf', **eight)}"]).model.size == "8M"


def test_files_and_later_words(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"defaults: base\nmodel:\n  from: {directory(tmp_path / 'hf')}\n")
    assert load_run(str(tmp_path / "x.yaml")).model.hidden_size == 24
    # The last one counts, and null is none; what it gives may be given besides.
    run = load_run(str(tmp_path / "x.yaml"), [f"{FROM}=facebook/esm2_t12_35M_UR50D", "model.num_layers=12"])
    assert run.model.size == "35M"
    run = load_run(str(tmp_path / "x.yaml"), [f"{FROM}=null", "model.size=8M"])
    assert run.model.size == "8M"
    over = load_run_over(run, [f"{FROM}={tmp_path / 'hf'}"])
    assert (over.model.size, over.model.hidden_size) == (None, 24)


@pytest.mark.parametrize(
    ("changes", "overrides", "expected"),
    [
        (
            {},
            ["model.num_layers=4"],
            r"override: model.num_layers=4 contradicts model.from=.*hf, which has 3; ",
        ),
        ({}, ["model.size=8M"], r"model.size=8M contradicts model.from=.*hf, which has null; leave one"),
        (
            {},
            ["model.layernorm_epsilon=1e-6"],
            r"model.layernorm_epsilon=1e-6 contradicts .* which has 1e-05",
        ),
        ({}, ["model.family=proteinbert_preln"], r"contradicts .* which has esm2"),
        ({"model_type": "bert"}, [], r"override: .*hf/config.json: model_type is 'bert', not 'esm'"),
        (
            {"position_embedding_type": "absolute"},
            [],
            "position_embedding_type is 'absolute'; ESM-2 has 'rotary'",
        ),
        ({"vocab_size": 446}, [], "vocab_size is 446; ESM-2 has 33"),
        ({"hidden_size": "24"}, [], "hidden_size is '24', not a positive number"),
        ({"num_attention_heads": None}, [], "num_attention_heads is None, not a positive number"),
        ({"num_hidden_layers": True}, [], "num_hidden_layers is True, not a positive number"),
        ({"layer_norm_eps": "x"}, [], "layer_norm_eps is 'x', not a number"),
    ],
    ids=str,
)
def test_contradictions_and_other_models(
    tmp_path: Path, changes: dict[str, Any], overrides: list[str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected) as error:
        load_run(None, [f"{FROM}={directory(tmp_path / 'hf', **changes)}", *overrides])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["esm2_t6_8M", "facebook/esm2_t6_8M", "."])
def test_a_name_that_is_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"{name} is neither a directory with config.json nor one of facebook/"
    ):
        load_run(None, [f"{FROM}={name}"])
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        load_run(None, [f"{FROM}={tmp_path}"])
    with pytest.raises(UserError, match=r"model.from=\[a\]: expected a name or directory"):
        load_run(None, [f"{FROM}=[a]"])
