"""State dicts and files in the forms in which people save fair-esm's ESM-2 give the same model."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from esm2mega.cli.app import main
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.lazy_weights import Weights
from esm2mega.errors import UserError
from tests import foreign

pytest.importorskip("esm", reason="fair-esm is not installed")

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def truth() -> foreign.Truth:
    return foreign.truth(torch.float32, "fp16")


@pytest.fixture(scope="module")
def expected(truth: foreign.Truth, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The same model from the file that fair-esm publishes, with its contact head."""
    return open_weights(foreign.write_fair_esm(truth, tmp_path_factory.mktemp("whole")))


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.infos == expected.infos and found.description == expected.description
    for name in expected.infos:
        assert torch.equal(found.read(name), expected.read(name)), name


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def without(state: State, *parts: str) -> State:
    return {name: value for name, value in state.items() if not any(part in name for part in parts)}


FORMS: dict[str, Callable[[State], Any]] = {
    "state_dict": lambda state: state,
    "model": lambda state: {"model": state},
    "lightning": lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3},
    "data parallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: {"model": prefixed(state, "_orig_mod.module."), "step": 7},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_is_read_for_what_it_is(
    truth: foreign.Truth, expected: Weights, tmp_path: Path, form: str
) -> None:
    path = tmp_path / "mine.pt"
    torch.save(FORMS[form](truth.state), path)
    found = open_weights(path)
    assert_same(found, expected)
    assert any("configuration: none in the file; 6 heads" in line for line in found.notes.filled)
    has_prefix = any("the prefix of the names of all tensors" in line for line in found.notes.dropped)
    assert has_prefix == (form not in ("state_dict", "model"))
    assert not any("contact head" in line for line in found.notes.dropped)


@pytest.mark.parametrize("name", ["mine.pth", "mine.ckpt", "pytorch_model.bin", "model.safetensors"])
def test_other_names_of_files(truth: foreign.Truth, expected: Weights, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({name: value.clone() for name, value in truth.state.items()}, path)
    else:
        torch.save(truth.state, path)
    assert_same(open_weights(path), expected)


def test_what_shows_the_number_of_heads(truth: foreign.Truth, expected: Weights, tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.save(without(truth.state, "inv_freq"), path)
    found = open_weights(path)
    assert found.description == expected.description
    assert any("6 heads by the size of its contact head" in line for line in found.notes.filled)
    torch.save(without(truth.state, "inv_freq", "contact_head"), path)
    with pytest.raises(UserError, match="do not say how many heads the model has"):
        open_weights(path)
    # As many layers of the width of a published model, here without values.
    table = {"embed_tokens.weight": torch.zeros(33, 320)}
    layers = {f"layers.{n}.fc1.bias": torch.zeros(1280) for n in range(6)}
    torch.save(table | layers, path)
    with pytest.raises(UserError, match="tensors are missing"):
        open_weights(path)


def test_a_converted_state_dict_is_verified(truth: foreign.Truth, tmp_path: Path) -> None:
    """By a forward pass of its own, since fair-esm's loader does not take such a file."""
    path = tmp_path / "mine.pt"
    torch.save(FORMS["lightning"](truth.state), path)
    assert main(["convert", str(path), str(tmp_path / "ours"), "--to", "esm2mega", "--verify"]) == 0
    report = json.loads((tmp_path / "ours.verify.json").read_text())
    assert report["passed"] and report["source"]["run_by"] == "plain PyTorch"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"args": Namespace(arch="roberta_large"), "model": {}}, "is ESM-1b or ESM-1v .*, not ESM-2"),
        ({"model": {"trunk.blocks.0.weight": torch.zeros(2)}}, "is ESMFold, not ESM-2"),
        ({"esm.embeddings.word_embeddings.weight": torch.zeros(33, 8)}, "names of transformers"),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "names of no known format: a, b"),
        ({"model": [1, 2]}, "not a state dict of tensors"),
    ],
)
def test_another_model_is_named(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path / "x.pt")


class _Settings:
    """Stands for the object of a library that a file holds beside its tensors."""


def test_a_refused_pickle_is_named_by_the_names_in_it(tmp_path: Path) -> None:
    path = tmp_path / "esmfold.pt"
    torch.save({"cfg": _Settings(), "model": {"trunk.structure_module.bias": torch.zeros(2)}}, path)
    with pytest.raises(UserError, match=r"is ESMFold, not ESM-2.*it would load .*_Settings"):
        open_weights(path)
