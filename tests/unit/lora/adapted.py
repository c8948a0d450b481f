"""A random ESM-2 of Hugging Face as base, and checkpoints of adapters on it with values in every factor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.config.lora import LINEARS, LM_HEAD, is_trained_bias, targets_of
from esm2mega.config.schema import LoRAConfig, ParallelConfig, Run
from esm2mega.convert.formats.esm2mega import run_of
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.start_point import read_checkpoint, read_start
from esm2mega.lora.base import identify, with_base
from esm2mega.lora.checkpoint import Factors, load_model, write_adapters
from esm2mega.model.build import build_model
from esm2mega.parallel.initialize import process_groups
from tests.padded import pack, unpack
from tests.parity import references
from tests.parity.references import Shape
from tests.unit.runs import CPU

SHAPE = Shape(num_layers=3, hidden_size=40, num_attention_heads=5, ffn_hidden_size=112)
EVERYWHERE = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
KINDS = {
    "plain": LoRAConfig(rank=3, alpha=5.0, target_modules=EVERYWHERE),
    "rslora": LoRAConfig(rank=4, alpha=6.0, use_rslora=True, target_modules=EVERYWHERE),
    "dora": LoRAConfig(rank=3, alpha=7.0, use_dora=True, target_modules=EVERYWHERE),
    "some": LoRAConfig(
        rank=2,
        use_dora=True,
        use_rslora=True,
        target_modules=["encoder.layers.[02].*.linear_k", "linear_v", "encoder.layers.1.mlp.linear_fc2"],
    ),
    "head": LoRAConfig(rank=3, use_dora=True, bias="lora_only", target_modules=["query", "lm_head.dense"]),
    "biases": LoRAConfig(rank=3, alpha=5.0, bias="all", target_modules=["all-linear"]),
}


@dataclass(frozen=True)
class Base:
    """A model of Hugging Face and its directory."""

    model: Any
    path: Path


def make_base(folder: Path, dtype: torch.dtype) -> Base:
    """Random values in every tensor."""
    model = references.hugging_face(SHAPE, dtype)
    model.save_pretrained(folder)
    return Base(model, folder)


def random_factors(run: Run, dtype: torch.dtype) -> dict[tuple[str, int], Factors]:
    """Values that change the logits a good deal."""
    generator = torch.Generator().manual_seed(4)
    lora = run.lora
    h, f, rank = SHAPE.hidden_size, SHAPE.ffn_hidden_size, lora.rank
    assert rank is not None
    inputs, outputs = {"linear_fc2": f}, {"linear_fc1": f}
    targets = targets_of(run)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # Their product is about a third of the weight; much larger ones amplify every rounding.
    return {
        (linear.name, layer): Factors(
            normal(rank, i := inputs.get(linear.name, h)) / i**0.5,
            normal(o := outputs.get(linear.name, h), rank) * 0.3 / lora.scaling,
            normal(o).abs() + 0.5 if lora.use_dora else None,
        )
        for linear in (*LINEARS, LM_HEAD)
        for layer in targets.get(linear.name, ())
    }


def random_biases(run: Run, base: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Other values than those of the base for all biases that are trained."""
    generator = torch.Generator().manual_seed(5)
    targets = targets_of(run)
    return {
        name: torch.randn(info.shape, generator=generator).to(dtype) * 0.3
        for name, info in open_weights(base).infos.items()
        if is_trained_bias(name, run.lora, targets)
    }


def make_adapters(folder: Path, base: Base, lora: LoRAConfig, dtype: torch.dtype) -> Path:
    """A checkpoint as a run would leave it, of step 0."""
    run = run_of(replace(open_weights(base.path).description, dtype=dtype))
    run.lora, run.init_from = lora, str(base.path)
    folder.mkdir()
    state = {
        "step": 0,
        "valid_loss": None,
        "data": None,
        "token_counts": None,
        "origin": {"format": "tests", "path": ""},
    }
    biases = random_biases(run, base.path, dtype)
    write_adapters(folder, run, identify(read_start(base.path)), random_factors(run, dtype), state, biases)
    return folder


def batch() -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of three proteins, masked and non-standard residues among them."""
    rows = references.batch()
    width = int(rows.attention_mask[:3].sum(dim=1).max())
    return rows.input_ids[:3, :width], rows.attention_mask[:3, :width]


def logits(checkpoint: Path, run: Run | None = None) -> Tensor:
    """``[b, s, v]`` of a checkpoint of ours; zeros at padding."""
    run = layout.read_config(checkpoint) if run is None else run
    ids, mask = batch()
    with process_groups(ParallelConfig(), seed=1):
        chunks = build_model(run.model, run.parallel, CPU, run.seed, has_lora=run.lora.rank is not None)
        load_model(with_base(read_checkpoint(checkpoint), run.init_from), run, chunks)
        tokens, packed = pack(ids, mask)
        with torch.no_grad():
            return unpack(chunks[0].eval()(tokens, packed), mask)


@torch.no_grad()
def their_logits(model: Any, head: Any = None) -> Tensor:
    """The same of a model of Hugging Face; of one without a head, with `head` on its hidden states."""
    ids, mask = batch()
    output = model.eval()(ids, attention_mask=mask)
    return (output.logits if head is None else head(output.last_hidden_state)) * mask.unsqueeze(-1)


def gradients(checkpoint: Path, weights: Tensor) -> dict[str, Tensor]:
    """Gradients of ``(logits * weights).sum()`` with respect to every factor, under the names of PEFT."""
    run = layout.read_config(checkpoint)
    ids, mask = batch()
    with process_groups(ParallelConfig(), seed=1):
        (model,) = build_model(run.model, run.parallel, CPU, run.seed, has_lora=True)
        load_model(with_base(read_checkpoint(checkpoint), run.init_from), run, [model])
        tokens, packed = pack(ids, mask)
        (model(tokens, packed) * weights[mask.bool()]).sum().backward()
        found: dict[str, Tensor] = {}
        stems = {linear.name: linear.hugging_face for linear in LINEARS}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # encoder.layers.0.mlp.linear_fc1_lora.lora_A
                stem, _, factor = name.rpartition(".")
                if stem.startswith("encoder."):
                    _, _, layer, _, linear = stem.split(".")
                    stem = f"esm.encoder.layer.{layer}.{stems[linear.removesuffix('_lora')]}"
                found[f"base_model.model.{stem.removesuffix('_lora')}.{factor}"] = parameter.grad
        return found
