"""Training adapters through the ordinary loop: what moves, what is saved, what a resume and others see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.checkpoint.saver import Saver
from esm2mega.checkpoint.tensor_filter import TRAINED
from esm2mega.config.schema import LoRAConfig, ParallelConfig, Run
from esm2mega.config.validate import check_training_inputs, validate
from esm2mega.errors import UserError
from esm2mega.lora.inject import apply_lora, is_adapter
from esm2mega.model.build import build_model, transformer_config
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.layer_spec import block, local_layer
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.initialize import process_groups
from esm2mega.train.evaluate import evaluate_checkpoint
from esm2mega.train.optimizer import build_optimizer, wrap_data_parallel
from esm2mega.train.pretrain import pretrain
from tests.checkpoints import full_tensors
from tests.unit.conftest import TinyRun
from tests.unit.runs import CPU, tiny_run

ADAPTERS = (
    "lora.rank=3",
    "lora.alpha=6",
    "lora.target_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2]",
)


def _run(finished: TinyRun, run_dir: Path, *changes: str) -> Run:
    return tiny_run(
        f"init_from={finished.run_dir}",
        f"data.train={finished.train}",
        f"data.valid={finished.valid}",
        "train.eval_every=2",
        "checkpoint.save_every=2",
        *ADAPTERS,
        *changes,
        run_dir=run_dir,
    )


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.usefixtures("world")
def test_identity_at_the_start(use_dora: bool) -> None:
    run = tiny_run()
    (model,) = build_model(run.model, run.parallel, CPU, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ids, packed = torch.arange(40) % 20 + 4, PackedSequences.from_lengths([10, 30])
    with torch.no_grad():
        before = model(ids, packed)
        apply_lora([model], LoRAConfig(rank=4, use_dora=use_dora, target_modules=["linear_*"]), 5)
        after = model(ids, packed)
    # DoRA takes the bias off and adds it again.
    assert (after - before).abs().max() <= (1e-13 if use_dora else 0.0)
    factors = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    assert len(factors) == 2 * 6 * (3 if use_dora else 2)
    firsts = [p for name, p in factors.items() if name.endswith("lora_A")]
    assert all(0.5 < float(a.detach().abs().max()) * a.shape[1] ** 0.5 <= 1 for a in firsts)
    assert all(not torch.equal(a, b) for a in firsts for b in firsts if a is not b and a.shape == b.shape)


def test_base_gets_no_gradient_and_stays_as_it_is(finished: TinyRun, tmp_path: Path) -> None:
    seen: list[Any] = []
    sizes: list[int] = []

    def observe(model: list[Any]) -> None:
        seen[:] = unwrap_model(model)
        sizes[:] = [sum(buffer.numel_unpadded for buffer in chunk.buffers) for chunk in model]

    pretrain(_run(finished, tmp_path / "run"), observe)
    (model,) = seen
    before = tiny_run()
    with process_groups(ParallelConfig(), seed=1):
        from esm2mega.checkpoint.store import load_weights

        (base,) = build_model(before.model, before.parallel, CPU, 1)
        load_weights(choose_checkpoint(finished.run_dir).path, [base])
    expected = dict(base.named_parameters())
    parameters = dict(model.named_parameters())
    assert expected.keys() == {name for name in parameters if not is_adapter(name)}
    for name, value in expected.items():
        assert torch.equal(parameters[name], value), name
        assert parameters[name].grad is None and not hasattr(parameters[name], "main_grad"), name
    adapters = [parameter for name, parameter in parameters.items() if is_adapter(name)]
    assert sizes == [sum(parameter.numel() for parameter in adapters)]
    assert all(parameter.abs().max() > 0 and parameter.main_grad.abs().max() > 0 for parameter in adapters)


@pytest.mark.parametrize(
    "changes",
    [
        ("lora.use_dora=true", "model.recompute=full"),
        ("model.precision=bf16", "lora.dropout=0.3"),
        pytest.param(("lora.dropout=0.3",), marks=pytest.mark.slow),
        pytest.param(("model.recompute=full",), marks=pytest.mark.slow),
    ],
)
def test_resume_and_evaluation_are_exact(finished: TinyRun, tmp_path: Path, changes: tuple[str, ...]) -> None:
    pretrain(_run(finished, tmp_path / "whole", *changes))
    constant = "schedule.decay_steps=4"
    pretrain(_run(finished, tmp_path / "broken", *changes, "train.max_steps=2", constant))
    pretrain(_run(finished, tmp_path / "broken", *changes, constant))
    whole, broken = (full_tensors(layout.step_dir(tmp_path / name, 4)) for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert [name for name in whole if not torch.equal(whole[name], broken[name])] == []
    weights = [name for name in whole if not name.startswith("optimizer.")]
    assert weights and all("_lora." in name for name in weights)

    state = layout.read_state(layout.step_dir(tmp_path / "whole", 4))
    assert evaluate_checkpoint(tmp_path / "whole", finished.valid)["loss"] == state["valid_loss"]


def test_dropout_drops_and_differs_between_steps(finished: TinyRun, tmp_path: Path) -> None:
    losses = []
    for dropout in ("0", "0.5"):
        pretrain(_run(finished, tmp_path / dropout, f"lora.dropout={dropout}"))
        lines = (tmp_path / dropout / "log.jsonl").read_text().splitlines()
        losses.append([r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"])
    # The first step has adapters without effect.
    assert losses[0][0] == losses[1][0] and losses[0][3] != losses[1][3]


def test_what_makes_no_sense_is_refused(finished: TinyRun, tmp_path: Path) -> None:
    first = _run(finished, tmp_path / "run", "train.max_steps=2")
    pretrain(first)
    later = "train.max_steps=3"
    for change, word in (
        ("lora.alpha=3", "lora.alpha=6"),
        ("lora.target_modules=[linear_qkv]", "lora.target_modules"),
        ("lora.rank=null", "holds adapters"),
    ):
        with pytest.raises(UserError, match=word):
            pretrain(_run(finished, tmp_path / "run", later, change))
    with pytest.raises(UserError, match="holds a whole model"):
        pretrain(_run(finished, finished.run_dir, "train.max_steps=9"))
    with pytest.raises(UserError, match="lora merge"):
        pretrain(_run(finished, tmp_path / "other", f"init_from={tmp_path / 'run'}"))
    with pytest.raises(UserError, match="init_from"):
        check_training_inputs(_run(finished, tmp_path / "other", "init_from=null"))
    for change, word in (
        ("lora.rank=0", "lora.rank"),
        ("lora.alpha=0", "lora.alpha"),
        ("lora.dropout=1", "lora.dropout"),
        ("lora.target_modules=[linear_x]", "matches no linear"),
        ("model.layer_spec=te", "layer_spec"),
    ):
        with pytest.raises(UserError, match=word):
            validate(_run(finished, tmp_path / "other", change, "model.precision=fp32"), 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("world")
def test_checkpoint_of_a_650M_model_is_small(precision: str, tmp_path: Path) -> None:
    """Rank 8 on q, k and v, Adam's state included. The base has no values here, and no memory."""
    run = tiny_run(
        "model.size=650M",
        "model.num_layers=null",
        "model.hidden_size=null",
        "model.num_attention_heads=null",
        "model.ffn_hidden_size=null",
        f"model.precision={precision}",
        "lora.rank=8",
        run_dir=tmp_path,
    )
    config = transformer_config(run.model, run.parallel, CPU, "sdpa")
    config.perform_initialization = False
    model = ESM2Model(config, block(local_layer(), config.num_layers), CPU)
    apply_lora([model], run.lora, run.seed)
    chunks = wrap_data_parallel([model], run.model, run.parallel)
    optimizer = build_optimizer(run.optim, run.schedule, run.model.precision, chunks)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.step()
    Saver().save(tmp_path / "step", chunks, optimizer, run, {"step": 1}, tensor_filter=TRAINED)
    size = sum(path.stat().st_size for path in (tmp_path / "step").rglob("*"))
    assert 3 * 33 * 3 * 8 * 2 * 1280 * 4 < size < 30e6
