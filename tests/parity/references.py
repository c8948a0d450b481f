"""Reference ESM-2 models from other packages, random in every tensor, and their weights under our names.

Legend: L layers, H hidden size, A heads, d = H/A, F FFN width. All of L, H, A, F, d differ from one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esm2mega.config.presets import ModelShape
from esm2mega.convert.name_table import NameTable
from esm2mega.vocabulary import MASK, PAD, encode_residues

VOCAB_SIZE = 33
SEED = 20


@dataclass(frozen=True)
class Shape:
    """fair-esm fixes F = 4H, Hugging Face does not."""

    num_layers: int = 3
    hidden_size: int = 40
    num_attention_heads: int = 5
    ffn_hidden_size: int = 112


def randomize(model: torch.nn.Module) -> None:
    """Give every parameter non-trivial values: a swapped LayerNorm or a dropped bias must show."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
            is_norm_scale = parameter.dim() == 1 and name.endswith("weight")
            # Matrices at 1/sqrt(fan_in) keep attention far from uniform; 0.02 would make it nearly so.
            spread = 0.3 if parameter.dim() < 2 else 1.2 / parameter.shape[-1] ** 0.5
            parameter.copy_(noise * spread + (1.0 if is_norm_scale else 0.0))


def hugging_face(shape: Shape, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A random `EsmForMaskedLM`."""
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK,
        pad_token_id=PAD,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.ffn_hidden_size,
        position_embedding_type="rotary",
        token_dropout=True,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        emb_layer_norm_before=False,
        max_position_embeddings=1026,
    )
    model = EsmForMaskedLM(config).to(dtype)
    randomize(model)
    return model.eval()


def fair_esm(shape: Shape, dtype: torch.dtype) -> torch.nn.Module:
    """A random fair-esm `ESM2`."""
    import esm

    assert shape.ffn_hidden_size == 4 * shape.hidden_size
    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    model = esm.model.esm2.ESM2(
        num_layers=shape.num_layers,
        embed_dim=shape.hidden_size,
        attention_heads=shape.num_attention_heads,
        alphabet=alphabet,
        token_dropout=True,
    ).to(dtype)
    randomize(model)
    if dtype == torch.float64:
        # .to() rounded nothing, but the frequencies were made in fp32; the fp64 proof wants the formula in
        # fp64.
        d = shape.hidden_size // shape.num_attention_heads
        for layer in model.layers:
            layer.self_attn.rot_emb.inv_freq = 1.0 / 10000.0 ** (torch.arange(0, d, 2, dtype=dtype) / d)
    return model.eval()


def ours(source: dict[str, Tensor], table: NameTable, shape: Shape) -> dict[str, Tensor]:
    """Values (or gradients) of a reference under the names of a single-stage `ESM2Model`, by the converter's
    name table.
    """
    dimensions = ModelShape(**vars(shape))
    values = {
        entry.ours: entry.kind.to_ours([source[part] for part in entry.theirs], dimensions)
        for entry in table.entries(dimensions)
        if not entry.optional
    }
    return {_local_name(name): value for name, value in values.items()}


def _local_name(name: str) -> str:
    """Checkpoints have LayerNorms under the names that they have in Transformer Engine's fused modules."""
    for fused, local in (
        ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
        ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ):
        name = name.replace(fused, local)
    return name


@dataclass(frozen=True)
class Batch:
    """A padded batch: ids, 1 = keep, and labels (-100 = none), each ``[b, s]``."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def batch() -> Batch:
    """Lengths 3 to 700 tokens, ``<mask>`` tokens, the non-standard residues X B U Z O and one unknown letter
    (J).
    """
    generator = torch.Generator().manual_seed(SEED + 1)
    lengths = [1, 46, 298, 255, 698]
    width = max(lengths) + 2
    input_ids = torch.full((len(lengths), width), PAD)
    labels = torch.full((len(lengths), width), -100)
    for row, length in enumerate(lengths):
        residues = torch.randint(4, 24, (length,), generator=generator)
        if length > 12:
            residues[2:9] = torch.tensor(encode_residues(b"XBUZOJA").astype("int64"))
        tokens = torch.cat((torch.tensor([0]), residues, torch.tensor([2])))
        chosen = torch.rand(length + 2, generator=generator) < 0.15
        chosen[0] = chosen[-1] = False
        labels[row, : length + 2][chosen] = tokens[chosen]
        masked = chosen & (torch.rand(length + 2, generator=generator) < 0.8)
        # The rows differ in their share of <mask>, one has none: token dropout is per sequence.
        if row != 1:
            tokens[masked] = MASK
        input_ids[row, : length + 2] = tokens
    return Batch(input_ids, (input_ids != PAD).long(), labels)
