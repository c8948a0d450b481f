"""Weights of another format start a run at any layout, and what is not trained survives it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esm2mega.checkpoint.auxiliary import read_auxiliary
from esm2mega.checkpoint.layout import step_dir
from esm2mega.convert.convert import convert
from esm2mega.convert.formats.registry import open_weights
from tests import foreign
from tests.distributed.runs import train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")


def test_each_rank_of_tp2_pp2_gets_its_share(tmp_path: Path) -> None:
    source = foreign.write_hf(foreign.truth(torch.float32, "fp16"), tmp_path)
    convert(source, tmp_path / "ours", "esm2mega")
    incomplete = tmp_path / "incomplete"
    shutil.copytree(source, incomplete)
    state = load_file(source / "model.safetensors")
    lost = [f"esm.encoder.layer.1.attention.self.key.{part}" for part in ("weight", "bias")]
    save_file({name: x for name, x in state.items() if name not in lost}, incomplete / "model.safetensors")
    paths = map(str, (source, tmp_path / "ours", incomplete))
    results = run_ranks(["-m", "tests.distributed.convert_checks", *paths], 4, tmp_path / "output")
    first, *_, last = (set(result.stdout.splitlines()) for result in results)
    assert {"embedding.word_embeddings.weight [20, 48]", "rotary.inv_freq [4]"} <= first
    assert {"output_layer.weight [20, 48]", "output_layer.bias [20]", "rotary.inv_freq [4]"} <= last
    qkv = "encoder.layers.1.self_attention.linear_qkv.weight"
    assert f"{qkv} [72, 48]" in first & last
    assert f"initial: a part of {qkv}: {lost[0]} is not there" in first & last


@pytest.mark.slow
def test_import_training_resume_and_export(store: Path, tmp_path: Path) -> None:
    """fp16-rounded frequencies and the contact head come out as they went in, of a run on one process that
    TP2 x PP2 went on with; so do the weights, since a learning rate of 1e-300 moves none.
    """
    source = foreign.write_hf(foreign.truth(torch.float32, "fp16"), tmp_path)
    settings: dict[str, Any] = {
        "model.num_layers": foreign.L,
        "model.hidden_size": foreign.H,
        "model.num_attention_heads": foreign.A,
        "model.ffn_hidden_size": foreign.F,
        "model.precision": "fp64",
        "optim.lr": 1e-300,
        "optim.weight_decay": 0.0,
        "init_from": str(source),
    }
    run_dir = tmp_path / "run"
    train(run_dir, store, {**settings, "train.max_steps": 1})
    layout = {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 2}
    resumed = train(run_dir, store, {**settings, **layout, "train.max_steps": 2}, world_size=4)
    assert len(resumed.losses) == 2
    final = step_dir(run_dir, 2)
    assert read_auxiliary(final).keys() == {"contact_head.regression.weight", "contact_head.regression.bias"}
    convert(final, tmp_path / "back", "hf", dtype="fp32")
    expected, actual = open_weights(source), open_weights(tmp_path / "back")
    assert expected.infos.keys() == actual.infos.keys()
    for name in expected.infos:
        assert torch.equal(expected.read(name).double(), actual.read(name).double()), name
