"""The whole training step of a GPU, on a device that computes nothing: it waits for nothing.

Operations that mix devices, or whose result has a size that depends on values, are errors there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm
from tests.gpu.fake_cuda import compile_stand_in

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device, which is better"),
]
ROOT = Path(__file__).parents[2]
MICRO_BATCHES = 2
# Forward, of one layer that is not the last, in bf16 with the fused kernel of attention; views do not count.
OPERATIONS_OF_A_LAYER = 21
# Backward, of the same, with the sums into the buffer of gradients.
BACKWARD_OPERATIONS_OF_A_LAYER = 42


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("stand_in") / "stand_in.so"
    compile_stand_in(library)
    return library


def step(stand_in: Path, *overrides: str, plant: str = "nothing") -> dict[str, Any]:
    ended = warm.run(["-m", "tests.gpu.fake_step", str(stand_in), plant, *overrides], cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("precision", "layers", "attention"),
    [
        ("bf16", "auto", "varlen"),
        pytest.param("fp32", "auto", "sdpa", marks=pytest.mark.slow),
        pytest.param("fp64", "auto", "sdpa", marks=pytest.mark.slow),
        # Of the stand-in in tests/te_stub.py, which checks what it is called with.
        pytest.param("bf16", "te", "te", marks=pytest.mark.slow),
        pytest.param("fp32", "te", "sdpa", marks=pytest.mark.slow),
    ],
)
def test_a_step_waits_for_nothing_before_its_result(
    stand_in: Path, precision: str, layers: str, attention: str
) -> None:
    found = step(stand_in, f"model.precision={precision}", f"model.layer_spec={layers}")
    assert found["attention"] == attention
    assert found["waits"] == {}
    # One transfer for each micro-batch, and back what the log wants.
    assert sorted((key.partition(" at ")[0], n) for key, n in found["transfers"].items()) == [
        ("cpu to cuda", MICRO_BATCHES),
        ("cuda to cpu", 1),
    ]
    assert list(found["result"].values()) == [1]
    if attention == "varlen":
        assert sum(found["layer"].values()) == OPERATIONS_OF_A_LAYER, found["layer"]
        assert sum(found["backward"].values()) == BACKWARD_OPERATIONS_OF_A_LAYER, found["backward"]


def test_an_item_in_a_layer_is_found(stand_in: Path) -> None:
    found = step(stand_in, "model.precision=bf16", plant="item")
    assert [key.partition(" at ")[0] for key in found["waits"]] == ["item"]
    assert "hidden_states.sum().item()" in next(iter(found["waits"]))


@pytest.mark.slow
def test_tensor_parallel_columns_have_their_bias_in_the_product(stand_in: Path) -> None:
    found = step(stand_in, "model.precision=bf16", "parallel.tensor_model_parallel_size=2")
    assert found["waits"] == {}
    # Those of a layer in one process, but that the two products whose sums go over the ranks get no bias:
    # that is an addition of its own. `_unsafe_view` gives a product its third dimension back.
    assert found["layer"].pop("aten._unsafe_view.default") == 2
    assert sum(found["layer"].values()) == OPERATIONS_OF_A_LAYER + 2, found["layer"]
    products = (found["layer"][f"aten.{name}.default"] for name in ("addmm", "mm"))
    assert list(products) == [2, 2]
    assert found["backward"].pop("aten._unsafe_view.default") == 4
    assert sum(found["backward"].values()) == BACKWARD_OPERATIONS_OF_A_LAYER, found["backward"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["e4m3", "hybrid"])
def test_a_step_in_fp8_waits_for_nothing(stand_in: Path, format: str) -> None:
    found = step(stand_in, "model.precision=bf16", "model.layer_spec=te", f"model.fp8={format}")
    assert found["waits"] == {}
    # The products themselves are those of the stand-in; rows are added before each, and taken away after it.
    assert found["layer"]["aten.constant_pad_nd.default"] == 4


@pytest.mark.slow
def test_outputs_and_heads_wait_for_nothing(stand_in: Path) -> None:
    """Embeddings, contacts, logits of some tokens, and steps of training heads and their losses."""
    ended = warm.run(["-m", "tests.gpu.fake_outputs", str(stand_in)], cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    # Two integers, which every process must know of before the next step.
    signal = found.pop("signal")
    assert list(signal["waits"].values()) == [1] and sorted(signal["transfers"].values()) == [1, 1]
    assert {name: each["waits"] for name, each in found.items()} == dict.fromkeys(
        ["contacts", "logits", "regression", "tape"], {}
    )
    # A pack is sent in one transfer.
    assert list(found["contacts"]["transfers"].values()) == [2] == list(found["logits"]["transfers"].values())
