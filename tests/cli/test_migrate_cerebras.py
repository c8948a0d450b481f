"""The way of the Model Zoo, on small files in its layout: data, training, evaluation, and a file for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests import foreign
from tests.cli.scripts import records, run, warm_python
from tests.unit.data.benchmarks.test_deeploc2 import write


def test_from_their_checkpoint_to_theirs(tmp_path: Path) -> None:
    """The language-model head of the checkpoint is named and left; a bias that it lacks starts anew."""
    pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
    checkpoint = foreign.write_cerebras(foreign.truth(torch.float32), tmp_path)
    state = torch.load(checkpoint)["model"]
    lost = "bert_encoder.transformer_encoder.layers.2.self_attn.proj_q_dense_layer.bias"
    del state[lost]
    torch.save({"model": state}, checkpoint)
    source = write(tmp_path, 32)
    small = ["train.max_steps=2", "train.eval_every=1", "train.log_every=1", "schedule.warmup_steps=0"]
    small += ["schedule.decay_steps=null", "train.micro_batch_tokens=1028", "train.global_batch_tokens=1028"]
    small.append("task.bootstrap=20")
    with warm_python(tmp_path):
        done = run(
            "migrate/cerebras.sh",
            *small,
            cwd=tmp_path,
            CHECKPOINT=str(checkpoint),
            SOURCE=str(source),
            CONFIG="deeploc2",
            OUT="out",
        )
    assert done.returncode == 0, done.stderr
    assert f"initial: a part of encoder.layers.2.self_attention.linear_qkv.bias: {lost} is not" in done.stderr
    assert ": a head that is not used\n" in done.stderr
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "features").iterdir()) == ["test", "train", "valid"]
    assert [record["step"] for record in records(out / "run") if record["kind"] == "train"] == [1, 2]
    metrics = json.loads((out / "metrics.json").read_text())
    tested = len((out / "tables/test.csv").read_text().splitlines()) - 1
    assert metrics["num_sequences"] == tested and metrics["accuracy"] == metrics["f1_micro"]
    written = torch.load(out / "classifier.mdl")["model"]
    assert written["classifier.classifier.weight"].shape == (2, foreign.H)
    moved = written["model.bert_encoder.transformer_encoder.norm.weight"]
    # Two steps of 1e-5 from the weights that were given.
    assert torch.allclose(moved, state["bert_encoder.transformer_encoder.norm.weight"], atol=1e-4)
    assert yaml.safe_load((out / "classifier.yaml").read_text())["model"]["num_labels"] == 2
    shutil.rmtree(out)
