"""A part of a model in each readable format: what fits is taken, and all the rest is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esm2mega.config.schema import ParallelConfig, Run, TaskConfig
from esm2mega.convert.convert import convert
from esm2mega.convert.files import distributed_writer
from esm2mega.convert.formats.registry import READABLE, open_weights
from esm2mega.convert.into_model import entries_of, load_for_task
from esm2mega.convert.start_point import read_start
from esm2mega.errors import UserError
from esm2mega.finetune.api import train_model
from esm2mega.model.build import build_model
from esm2mega.model.heads import head_of_task
from tests import foreign, foreign_bert
from tests.checkpoints import full_tensors
from tests.unit.runs import SETTINGS

pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")

QKV, OUT = "encoder.layers.1.self_attention.linear_qkv.", "encoder.layers.1.self_attention.linear_proj."
NORM = "encoder.final_layernorm.bias"

CASES: dict[str, tuple[str, str, str, str]] = {
    "hf": ("layer.1.attention.self.key.", "lm_head.", "emb_layer_norm_after.bias", QKV),
    "fair-esm": ("layers.1.self_attn.k_proj.", "encoder.lm_head.", "emb_layer_norm_after.bias", QKV),
    "te": ("layers.1.self_attention.proj.", "lm_head.", "emb_layer_norm_after.bias", OUT),
    "nemo2": ("layers.self_attention.linear_proj.", "lm_head.", "final_layernorm.bias", OUT),
    "nemo1": ("layers.1.self_attention.dense.", "lm_head.", "final_layernorm.bias", OUT),
    "cerebras": ("layers.1.self_attn.proj_k_dense_layer.", "bert_mlm_head.", "encoder.norm.bias", QKV),
    "tape": ("layer.1.attention.self.key.", "mlm.", "layer.3.output.LayerNorm.bias", QKV),
    "proteinlm": ("layer.1.attention.self.key.", "mlm.", "encoder.final_ln.bias", QKV),
    "megatron": ("layers.1.attention.dense.", "lm_head", "final_layernorm.bias", OUT),
    "esm2mega": ("layers.self_attention.linear_proj.", "lm_head.", "", OUT),
}
"""For each format: names of a linear of layer 1, which is lost; of the language model's head, which is lost
too; and of a bias that gets another length; and which of our tensors the linear is, or is a third of."""


def damaged(content: Any, lost: str, head: str, other: str) -> Any:
    """A state dict, nested or not, without the two, with another bias, and with a tensor of no meaning."""
    if not isinstance(content, dict):
        return content
    kept = {
        name: damaged(value, lost, head, other)
        for name, value in content.items()
        if lost not in name and head not in name
    }
    for name, value in kept.items():
        if other in name and isinstance(value, Tensor):
            kept[name] = torch.cat((value, value))
            kept = {**kept, f"{name}.extra": torch.ones(2)}
            break
    return kept


def write(name: str, folder: Path, damage: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a model whose storing functions get `damage` of what they store."""
    import torch.distributed.checkpoint as dcp

    folder.mkdir()
    writer = getattr(foreign_bert if name in BERTS else foreign, f"write_{name.replace('-', '_')}", None)
    stores = ((torch, "save"), (dcp, "save"), (foreign, "save_file"))
    if writer is None:
        return written_by_us(folder, damage, monkeypatch)
    with monkeypatch.context() as patch:
        for module, function in stores:
            whole = getattr(module, function)
            patch.setattr(
                module,
                function,
                lambda content, *rest, _whole=whole, **more: _whole(damage(content), *rest, **more),
            )
        return writer(TRUTHS["bert" if name in BERTS else "esm2"], folder)


def written_by_us(folder: Path, damage: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    source = foreign.write_hf(TRUTHS["esm2"], folder)
    whole = distributed_writer.write_weights
    with monkeypatch.context() as patch:
        patch.setattr(
            distributed_writer, "write_weights", lambda path, kept, *rest: whole(path, damage(kept), *rest)
        )
        convert(source, folder / "ours", "esm2mega")
    return folder / "ours"


BERTS = ("tape", "proteinlm", "megatron")
TRUTHS: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def _truths() -> None:
    pytest.importorskip("tape", reason="tape-proteins is not installed: pip install esm2mega[dev]")
    TRUTHS["esm2"], TRUTHS["bert"] = foreign.truth(torch.float32), foreign_bert.truth(torch.float32)


def test_every_format_has_a_case() -> None:
    assert set(CASES) == set(READABLE)


@pytest.mark.parametrize("name", CASES)
def test_a_part_of_a_model_is_a_start(
    name: str,
    world: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lost, head, other, expected_part = CASES[name]
    whole = write(name, tmp_path / "whole", lambda content: content, monkeypatch)
    broken = write(
        name,
        tmp_path / "broken",
        lambda content: damaged(content, lost, head, other or "nothing"),
        monkeypatch,
    )
    if name != "esm2mega":
        with pytest.raises(UserError, match="missing|no masked-language-model head"):
            read_start(broken)
    start, reference = read_start(broken, partial=True), open_weights(whole)
    run = Run(model=start.run.model, task=TaskConfig(kind="regression"))
    run.finetune.strict = False
    make_head = head_of_task(run.task, 1)
    (model,) = build_model(run.model, ParallelConfig(), torch.device("cpu"), 5, make_head)
    before = {entry.key: entry.data.clone() for entry in entries_of([model])}
    load_for_task(start, run, [model])
    said = capsys.readouterr().err
    after = {entry.key: entry.data for entry in entries_of([model])}
    initial = {OUT.replace(".1.", f".{n}.") for n in range(foreign.L)} if "layers.self" in lost else {OUT}
    for key, value in after.items():
        if key.startswith("head."):
            assert torch.equal(value, before[key]), key
            continue
        stored = reference.read(key)[: len(value)]
        rows = len(stored)
        if key == NORM and other:
            assert torch.equal(value, before[key]) and f"initial: {key}: " in said
        elif expected_part == OUT and any(key.startswith(prefix) for prefix in initial):
            # Ours keep all layers of a tensor together.
            shown = key if other else key.replace(".layers.1.", ".layers.").replace(".layers.0.", ".layers.")
            assert torch.equal(value, before[key])
            assert f"initial: {shown}" in said or key not in (f"{OUT}weight", f"{OUT}bias")
        elif key.startswith(expected_part) and key.endswith((".weight", ".bias")):
            # q and v of every head are there, k is as it was.
            parts = [x.reshape(foreign.A, 3, -1) for x in (value, stored, before[key])]
            assert torch.equal(parts[0][:, ::2], parts[1][:, ::2])
            assert torch.equal(parts[0][:, 1], parts[2][:, 1])
            assert f"initial: a part of {key}: " in said
        else:
            assert torch.equal(value[:rows], stored), key
    if other:
        assert ".extra: has no place in this model" in said


def test_a_training_from_a_part_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the command's own way; adapters, which are kept without the weights under them, need all of it."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
    lost, _, _, _ = CASES["hf"]
    broken = write("hf", tmp_path / "hf", lambda content: damaged(content, lost, "none", "none"), monkeypatch)
    settings = [text for text in SETTINGS if not text.startswith(("model.", "train.max_steps"))]
    settings += [f"init_from={broken}", "task.kind=regression", "train.max_steps=1", "optim.lr=1e-30"]
    train = [("MKTAYIAK", 1.0), ("LAGVSERT", 2.0), ("IDPKQNFY", 4.0)]
    with pytest.raises(UserError, match="2 tensors are missing: .*key.bias.*finetune.strict=false"):
        train_model([*settings, f"run_dir={tmp_path / 'run'}"], train=train)
    settings.append("finetune.strict=false")
    trained = train_model([*settings, f"run_dir={tmp_path / 'run'}"], train=train)
    said = capfd.readouterr().err
    assert (
        f"init_from initial: a part of {QKV}weight: esm.encoder.layer.1.attention.self.key.weight is" in said
    )
    assert "init_from dropped: lm_head.layer_norm.weight, " in said and ": a head that is not used\n" in said
    found = full_tensors(trained.checkpoint)["encoder.layers.self_attention.linear_qkv.weight"][1]
    query = TRUTHS["esm2"].state["layers.1.self_attn.q_proj.weight"]
    assert torch.equal(found.reshape(foreign.A, 3, -1)[:, 0].reshape(query.shape), query)
    adapters = ["lora.rank=2", "finetune.mode=lora", f"run_dir={tmp_path / 'adapters'}"]
    with pytest.raises(UserError, match="2 tensors are missing: .*without adapters"):
        train_model([*settings, *adapters], train=train)
