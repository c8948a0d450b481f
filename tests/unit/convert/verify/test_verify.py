"""A right conversion passes, a wrong one fails and says by how much; the plain reference is right itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from esm2mega.cli.app import main
from esm2mega.convert.convert import convert
from esm2mega.convert.verify import verify
from esm2mega.convert.verify.esm2_weights import read_plain_model
from esm2mega.convert.verify.plain_model import forward
from esm2mega.errors import UserError
from tests import foreign

pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")

WRITERS: dict[str, tuple[bool, Callable[[foreign.Truth, Path], Path]]] = {
    "hf": (False, foreign.write_hf),
    "fair-esm": (False, foreign.write_fair_esm),
    "te": (True, foreign.write_te),
    "cerebras": (False, foreign.write_cerebras),
    "nemo1": (False, foreign.write_nemo1),
    "nemo2": (True, foreign.write_nemo2),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return foreign.write_hf(foreign.truth(torch.float32, "fp16"), tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_plain_reference_equals_fair_esm(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, every format's own arrangement: 1e-5 of the largest logit and of the largest hidden value."""
    tanh, write = WRITERS[name]
    reference = foreign.truth(torch.float32, "formula" if name != "hf" else "fp16", tanh)
    path = write(reference, tmp_path)
    for ids in verify.sequences():
        expected = foreign.run(reference, ids[None], monkeypatch)[0]
        with torch.no_grad():
            states = reference.model(ids[None], repr_layers=range(foreign.L + 1))["representations"]
        hidden, logits = forward(read_plain_model(path, name, lambda x: x), ids)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        for number, state in enumerate(hidden):
            assert (state - states[number][0]).abs().max() <= 1e-5 * states[number].abs().max()


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_right_conversion_passes(source: Path, tmp_path: Path, dtype: str | None) -> None:
    lines = verify.verify(convert(source, tmp_path / "ours", "esm2mega", dtype=dtype))
    assert "target by esm2mega" in lines[0]
    report = json.loads((tmp_path / "ours.verify.json").read_text())
    assert report["passed"] and report["logits"]["relative"] <= 1e-5
    assert len(report["hidden_states"]) == foreign.L + 1
    assert all(layer["relative"] <= 1e-5 for layer in report["hidden_states"])
    assert report["tensors"] and all(t["source"] == t["target"] for t in report["tensors"].values())
    assert len(report["sequence_lengths"]) == 4 and max(report["sequence_lengths"]) > 256
    assert report["weights_dtype"] == ("bfloat16" if dtype else "float32")


@pytest.mark.parametrize(
    ("installed", "run_by"),
    [
        (True, {"hf": "transformers", "fair-esm": "fair-esm"}),
        (False, dict.fromkeys(("hf", "fair-esm"), "plain")),
    ],
)
def test_with_and_without_the_foreign_packages(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    run_by: dict[str, str],
) -> None:
    if not installed:
        monkeypatch.setattr(verify, "_installed", lambda package: None)
    line = verify.verify(convert(source, tmp_path / "esm2_x.pt", "fair-esm"))[0]
    assert line.startswith(f"source run by {run_by['hf']}")
    assert f"target by {run_by['fair-esm']}" in line


def test_another_gelu_fails_and_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["convert", str(source), str(tmp_path / "te"), "--to", "te", "--verify"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert "verification failed: logits differ by" in error
    assert "feed-forward GELU: erf in the source, tanh in Transformer Engine's kernel" in error
    assert json.loads((tmp_path / "te.verify.json").read_text())["passed"] is False


def test_swapped_layernorms_fail(source: Path, tmp_path: Path) -> None:
    """Shapes fit and every name is there; only numbers tell."""
    conversion = convert(source, tmp_path / "wrong", "hf")
    state = load_file(tmp_path / "wrong" / "model.safetensors")
    first, second = (f"esm.encoder.layer.2.{x}LayerNorm.weight" for x in ("", "attention."))
    state[first], state[second] = state[second], state[first]
    save_file(state, tmp_path / "wrong" / "model.safetensors")
    with pytest.raises(verify.MachineError, match="verification failed: .*no change is known"):
        verify.verify(conversion)
    report = json.loads((tmp_path / "wrong.verify.json").read_text())
    wrong = [layer["relative"] > 1e-5 for layer in report["hidden_states"]]
    assert wrong == [False, False, False, True, True], "the report shows the first layer that is wrong"
    differing = {name for name, t in report["tensors"].items() if t["source"] != t["target"]}
    assert differing == {
        "encoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        "encoder.layers.2.mlp.linear_fc1.layer_norm_weight",
    }


def test_what_transformers_refuses_is_one_line(source: Path, tmp_path: Path) -> None:
    """It checks values of ``config.json`` that no conversion reads."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": "x"}))
    conversion = convert(source, tmp_path / "ours", "esm2mega")
    with pytest.raises(
        UserError, match=r"hf: transformers .* does not run it \(.*\); the conversion"
    ) as caught:
        verify.verify(conversion)
    assert "\n" not in str(caught.value)
