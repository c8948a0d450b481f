"""Reference ESM-2 models from other packages, random in every tensor, and their weights under our names.

Legend: L layers, H hidden size, A heads, d = H/A, F FFN width. All of L, H, A, F, d differ from one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esm2mega.data.tokenizer import MASK, PAD, encode_residues

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
            spread = 0.3 if parameter.dim() == 1 else 1.2 / parameter.shape[-1] ** 0.5
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


def _fuse(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Rows of the fused projection are head-major: q, k, v of head 0, then of head 1."""
    parts = [x.reshape(heads, 1, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


def _norm(ours: str, theirs: str, source: dict[str, Tensor], out: dict[str, Tensor]) -> None:
    for part in ("weight", "bias"):
        out[f"{ours}.{part}"] = source[f"{theirs}.{part}"]


def from_hugging_face(source: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Values (or gradients) of an `EsmForMaskedLM` under the names of a single-stage `ESM2Model`."""
    out = {
        "embedding.word_embeddings.weight": source["esm.embeddings.word_embeddings.weight"],
        "output_layer.bias": source["lm_head.bias"],
    }
    for n in range(shape.num_layers):
        theirs, ours = f"esm.encoder.layer.{n}", f"encoder.layers.{n}"
        for part in ("weight", "bias"):
            q, k, v = (source[f"{theirs}.attention.self.{x}.{part}"] for x in ("query", "key", "value"))
            out[f"{ours}.self_attention.linear_qkv.{part}"] = _fuse(q, k, v, shape.num_attention_heads)
        _norm(f"{ours}.input_layernorm", f"{theirs}.attention.LayerNorm", source, out)
        _norm(f"{ours}.self_attention.linear_proj", f"{theirs}.attention.output.dense", source, out)
        _norm(f"{ours}.pre_mlp_layernorm", f"{theirs}.LayerNorm", source, out)
        _norm(f"{ours}.mlp.linear_fc1", f"{theirs}.intermediate.dense", source, out)
        _norm(f"{ours}.mlp.linear_fc2", f"{theirs}.output.dense", source, out)
    _norm("encoder.final_layernorm", "esm.encoder.emb_layer_norm_after", source, out)
    _norm("lm_head.dense", "lm_head.dense", source, out)
    _norm("lm_head.layer_norm", "lm_head.layer_norm", source, out)
    return out


def from_fair_esm(source: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Values (or gradients) of a fair-esm `ESM2` under the names of a single-stage `ESM2Model`."""
    out = {
        "embedding.word_embeddings.weight": source["embed_tokens.weight"],
        "output_layer.bias": source["lm_head.bias"],
    }
    for n in range(shape.num_layers):
        theirs, ours = f"layers.{n}", f"encoder.layers.{n}"
        for part in ("weight", "bias"):
            q, k, v = (source[f"{theirs}.self_attn.{x}_proj.{part}"] for x in "qkv")
            out[f"{ours}.self_attention.linear_qkv.{part}"] = _fuse(q, k, v, shape.num_attention_heads)
        _norm(f"{ours}.input_layernorm", f"{theirs}.self_attn_layer_norm", source, out)
        _norm(f"{ours}.self_attention.linear_proj", f"{theirs}.self_attn.out_proj", source, out)
        _norm(f"{ours}.pre_mlp_layernorm", f"{theirs}.final_layer_norm", source, out)
        _norm(f"{ours}.mlp.linear_fc1", f"{theirs}.fc1", source, out)
        _norm(f"{ours}.mlp.linear_fc2", f"{theirs}.fc2", source, out)
    _norm("encoder.final_layernorm", "emb_layer_norm_after", source, out)
    _norm("lm_head.dense", "lm_head.dense", source, out)
    _norm("lm_head.layer_norm", "lm_head.layer_norm", source, out)
    return out


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
