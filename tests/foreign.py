"""Random ESM-2 models in the formats of other packages, written to disk without esm2mega.

The model itself is fair-esm's; files of packages that are not installed here are laid out by hand from its
state dict. Legend: L layers, H hidden size, A heads, d = H/A, F = 4H.
"""

from __future__ import annotations

import io
import json
import tarfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.convert.convert import convert

L, H, A, F = 4, 48, 6, 192
SHAPE = {"num_layers": L, "hidden_size": H, "num_attention_heads": A, "ffn_hidden_size": F}
EPSILON = 1e-5


@dataclass(frozen=True)
class Truth:
    """A fair-esm model, random in every tensor, and what its numerics are."""

    model: Any
    tanh: bool

    @property
    def state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())


def truth(dtype: torch.dtype, frequencies: str = "formula", tanh: bool = False) -> Truth:
    """A random model.

    Args:
        dtype: Of weights, and of rotary frequencies by formula.
        frequencies: ``formula``, or ``fp16`` for those rounded as in the public weights.
        tanh: Whether its feed-forward layers shall have the tanh form of GELU, see `run`.
    """
    from esm.data import Alphabet
    from esm.model.esm2 import ESM2

    from tests.parity.references import randomize

    model = ESM2(num_layers=L, embed_dim=H, attention_heads=A, alphabet=Alphabet.from_architecture("ESM-1b"))
    model = model.to(dtype).eval()
    randomize(model)
    d = H // A
    exponents = torch.arange(0, d, 2, dtype=dtype) / d
    values = 1.0 / 10000.0**exponents
    if frequencies == "fp16":
        values = values.half().to(dtype)
    for layer in model.layers:
        layer.self_attn.rot_emb.inv_freq = values.clone()
    return Truth(model, tanh)


@torch.no_grad()
def run(reference: Truth, input_ids: Tensor, monkeypatch: Any) -> Tensor:
    """Logits ``[b, s, 33]`` of a padded batch, with softmax in the model's dtype and the right GELU."""
    monkeypatch.setattr(
        "esm.multihead_attention.utils_softmax", lambda x, dim, onnx_trace=False: torch.softmax(x, dim)
    )
    gelu = torch.nn.functional.gelu

    def by_width(x: Tensor) -> Tensor:
        # The head, of width H, has the erf form in every format.
        return gelu(x, approximate="tanh" if reference.tanh and x.shape[-1] == F else "none")

    monkeypatch.setattr("esm.modules.gelu", by_width)
    return reference.model(input_ids)["logits"]


def write_fair_esm(reference: Truth, folder: Path) -> Path:
    """``esm2_x.pt`` and its contact head, with the prefixes that published files have."""
    state, contact = {}, {}
    for name, value in reference.state.items():
        if name.startswith("contact_head."):
            contact[name] = value
        else:
            head = name.startswith("lm_head.")
            state[f"encoder.{name}" if head else f"encoder.sentence_encoder.{name}"] = value
    config = Namespace(
        encoder_layers=L, encoder_embed_dim=H, encoder_attention_heads=A, token_dropout=True, arch="esm2"
    )
    path = folder / "esm2_x.pt"
    torch.save({"cfg": {"model": config}, "model": state}, path)
    torch.save({"model": contact}, folder / "esm2_x-contact-regression.pt")
    return path


def hf_state(reference: Truth) -> dict[str, Tensor]:
    """The names of `EsmForMaskedLM`, frequencies per layer."""
    old = reference.state
    new = {
        "esm.embeddings.word_embeddings.weight": old["embed_tokens.weight"],
        "lm_head.bias": old["lm_head.bias"],
    }
    pairs = {
        "esm.encoder.emb_layer_norm_after": "emb_layer_norm_after",
        "esm.contact_head.regression": "contact_head.regression",
        "lm_head.dense": "lm_head.dense",
        "lm_head.layer_norm": "lm_head.layer_norm",
    }
    for n in range(L):
        at, there = f"esm.encoder.layer.{n}.", f"layers.{n}."
        pairs |= {
            f"{at}attention.LayerNorm": f"{there}self_attn_layer_norm",
            f"{at}attention.self.query": f"{there}self_attn.q_proj",
            f"{at}attention.self.key": f"{there}self_attn.k_proj",
            f"{at}attention.self.value": f"{there}self_attn.v_proj",
            f"{at}attention.output.dense": f"{there}self_attn.out_proj",
            f"{at}LayerNorm": f"{there}final_layer_norm",
            f"{at}intermediate.dense": f"{there}fc1",
            f"{at}output.dense": f"{there}fc2",
        }
        frequencies = old[f"{there}self_attn.rot_emb.inv_freq"].clone()
        new[f"{at}attention.self.rotary_embeddings.inv_freq"] = frequencies
    for name, source in pairs.items():
        new |= {f"{name}.{p}": old[f"{source}.{p}"] for p in ("weight", "bias")}
    return new


HF_CONFIG = {
    "model_type": "esm",
    "architectures": ["EsmForMaskedLM"],
    "vocab_size": 33,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": A,
    "intermediate_size": F,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "layer_norm_eps": EPSILON,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "emb_layer_norm_before": False,
}


def write_hf(reference: Truth, folder: Path) -> Path:
    """A directory as transformers 4 writes it."""
    path = folder / "hf"
    path.mkdir()
    save_file(hf_state(reference), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(HF_CONFIG))
    return path


def fused(state: dict[str, Tensor], layer: int, part: str) -> Tensor:
    """Rows ``q k v`` of head 0, then of head 1, by a loop over heads."""
    d = H // A
    q, k, v = (state[f"layers.{layer}.self_attn.{x}_proj.{part}"] for x in "qkv")
    return torch.cat([x[a * d : (a + 1) * d] for a in range(A) for x in (q, k, v)])


def write_te(
    reference: Truth, folder: Path, interleaved: bool = True, rows: int = 33, prefix: str = "model."
) -> Path:
    """NVIDIA's recipe: fused by head or concatenated, with `rows` rows of vocabulary; `prefix` is ``esm.``
    before 2026-03.
    """
    old, path = reference.state, folder / "te"
    path.mkdir()
    lowest = torch.finfo(old["lm_head.bias"].dtype).min
    table = torch.cat((old["embed_tokens.weight"], old["embed_tokens.weight"].new_zeros(rows - 33, H)))
    bias = torch.cat((old["lm_head.bias"], old["lm_head.bias"].new_full((rows - 33,), lowest)))
    new = {
        f"{prefix}embeddings.word_embeddings.weight": table,
        "lm_head.decoder.bias": bias,
    }
    for p in ("weight", "bias"):
        new[f"{prefix}encoder.emb_layer_norm_after.{p}"] = old[f"emb_layer_norm_after.{p}"]
        new[f"lm_head.dense.{p}"] = old[f"lm_head.dense.{p}"]
        new[f"lm_head.decoder.layer_norm_{p}"] = old[f"lm_head.layer_norm.{p}"]
        for n in range(L):
            at, there = f"{prefix}encoder.layers.{n}.", f"layers.{n}."
            qkv = (
                fused(old, n, p)
                if interleaved
                else torch.cat([old[f"{there}self_attn.{x}_proj.{p}"] for x in "qkv"])
            )
            new |= {
                f"{at}self_attention.layernorm_qkv.layer_norm_{p}": old[f"{there}self_attn_layer_norm.{p}"],
                f"{at}self_attention.layernorm_qkv.{p}": qkv,
                f"{at}self_attention.proj.{p}": old[f"{there}self_attn.out_proj.{p}"],
                f"{at}layernorm_mlp.layer_norm_{p}": old[f"{there}final_layer_norm.{p}"],
                f"{at}layernorm_mlp.fc1_{p}": old[f"{there}fc1.{p}"],
                f"{at}layernorm_mlp.fc2_{p}": old[f"{there}fc2.{p}"],
            }
    save_file({name: value.clone() for name, value in new.items()}, path / "model.safetensors")
    config = {**HF_CONFIG, "model_type": "nv_esm", "qkv_weight_interleaved": interleaved}
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_cerebras(reference: Truth, folder: Path) -> Path:
    """A ``.mdl``: rotary channels ``2i`` and ``2i + 1`` are a pair, so rows of q and k move."""
    old, d = reference.state, H // A
    order = torch.tensor([a * d + i // 2 + (i % 2) * (d // 2) for a in range(A) for i in range(d)])
    encoder, head = "bert_encoder.transformer_encoder.", "bert_mlm_head."
    new = {
        "bert_encoder.embedding_layer.word_embeddings.weight": old["embed_tokens.weight"],
        f"{head}classifier.ffn.0.linear_layer.weight": old["embed_tokens.weight"],
        f"{head}classifier.ffn.0.linear_layer.bias": old["lm_head.bias"],
    }
    for p in ("weight", "bias"):
        new[f"{encoder}norm.{p}"] = old[f"emb_layer_norm_after.{p}"]
        new[f"{head}mlm_transform.ffn.ffn.0.linear_layer.{p}"] = old[f"lm_head.dense.{p}"]
        new[f"{head}mlm_transform.ln.{p}"] = old[f"lm_head.layer_norm.{p}"]
        for n in range(L):
            at, there = f"{encoder}layers.{n}.", f"layers.{n}."
            new |= {
                f"{at}norm1.{p}": old[f"{there}self_attn_layer_norm.{p}"],
                f"{at}self_attn.proj_q_dense_layer.{p}": old[f"{there}self_attn.q_proj.{p}"][order],
                f"{at}self_attn.proj_k_dense_layer.{p}": old[f"{there}self_attn.k_proj.{p}"][order],
                f"{at}self_attn.proj_v_dense_layer.{p}": old[f"{there}self_attn.v_proj.{p}"],
                f"{at}self_attn.proj_output_dense_layer.{p}": old[f"{there}self_attn.out_proj.{p}"],
                f"{at}norm2.{p}": old[f"{there}final_layer_norm.{p}"],
                f"{at}ffn.ffn.0.linear_layer.{p}": old[f"{there}fc1.{p}"],
                f"{at}ffn.ffn.1.linear_layer.{p}": old[f"{there}fc2.{p}"],
            }
    path = folder / "x.mdl"
    torch.save({"model": new, "global_step": 7}, path)
    model = {
        "num_hidden_layers": L,
        "hidden_size": H,
        "filter_size": F,
        "num_heads": A,
        "layer_norm_epsilon": EPSILON,
        "rotary_dim": d,
        "token_dropout": True,
        "encoder_nonlinearity": "gelu",
    }
    (folder / "x.yaml").write_text(yaml.safe_dump({"trainer": {"init": {"model": model}}}))
    return path


def nemo_state(reference: Truth) -> dict[str, Tensor]:
    """NeMo 1 names, whole, vocabulary padded to 128 rows of zeros."""
    old = reference.state
    new = {
        "language_model.embedding.word_embeddings.weight": pad(old["embed_tokens.weight"], 128),
        "language_model.rotary_pos_emb.inv_freq": old["layers.0.self_attn.rot_emb.inv_freq"].clone(),
        "lm_head.bias": pad(old["lm_head.bias"], 128),
    }
    for p in ("weight", "bias"):
        new[f"language_model.encoder.final_layernorm.{p}"] = old[f"emb_layer_norm_after.{p}"]
        new[f"lm_head.dense.{p}"] = old[f"lm_head.dense.{p}"]
        new[f"lm_head.layernorm.{p}"] = old[f"lm_head.layer_norm.{p}"]
        for n in range(L):
            at, there = f"language_model.encoder.layers.{n}.", f"layers.{n}."
            new |= {
                f"{at}input_layernorm.{p}": old[f"{there}self_attn_layer_norm.{p}"],
                f"{at}self_attention.query_key_value.{p}": fused(old, n, p),
                f"{at}self_attention.dense.{p}": old[f"{there}self_attn.out_proj.{p}"],
                f"{at}post_attention_layernorm.{p}": old[f"{there}final_layer_norm.{p}"],
                f"{at}mlp.dense_h_to_4h.{p}": old[f"{there}fc1.{p}"],
                f"{at}mlp.dense_4h_to_h.{p}": old[f"{there}fc2.{p}"],
            }
    return new


def pad(x: Tensor, rows: int) -> Tensor:
    return torch.cat((x, x.new_zeros(rows - x.shape[0], *x.shape[1:])))


def rank_state(whole: dict[str, Tensor], tp: int, tp_rank: int, pp: int, stage: int) -> dict[str, Tensor]:
    """What one rank of NeMo 1 stores: its share of each tensor, layers numbered from 0."""
    part, per_stage = {}, L // pp
    for name, value in whole.items():
        if ".layers." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            if layer // per_stage != stage:
                continue
            name = name.replace(f".layers.{layer}.", f".layers.{layer % per_stage}.")
        is_last = "final_layernorm" in name or name.startswith("lm_head.")
        if (is_last and stage != pp - 1) or ("word_embeddings" in name and stage != 0):
            continue
        columns = ("word_embeddings.weight", "lm_head.bias", "query_key_value", "dense_h_to_4h")
        if any(key in name for key in columns):
            value = value.chunk(tp, dim=0)[tp_rank]
        elif name.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight")):
            value = value.chunk(tp, dim=1)[tp_rank]
        part[f"model.{name}"] = value.clone()
    return part


NEMO_CONFIG = {
    "num_layers": L,
    "hidden_size": H,
    "ffn_hidden_size": F,
    "num_attention_heads": A,
    "layernorm_epsilon": EPSILON,
    "position_embedding_type": "rope",
    "embedding_token_dropout": True,
    "megatron_legacy": False,
    "bias_gelu_fusion": False,
    "make_vocab_size_divisible_by": 128,
}


def write_nemo1(reference: Truth, folder: Path, tp: int = 1, pp: int = 1, mode: str = "w") -> Path:
    """A ``.nemo`` archive of `tp` x `pp` ranks; mode ``w:gz`` compresses as old writers did."""
    path, whole = folder / "x.nemo", nemo_state(reference)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        add_member(archive, "./model_config.yaml", yaml.safe_dump(NEMO_CONFIG).encode())
        for stage in range(pp):
            for rank in range(tp):
                name = "./model_weights.ckpt"
                if pp > 1:
                    name = f"./tp_rank_{rank:02d}_pp_rank_{stage:03d}/model_weights.ckpt"
                elif tp > 1:
                    name = f"./mp_rank_{rank:02d}/model_weights.ckpt"
                buffer = io.BytesIO()
                torch.save(rank_state(whole, tp, rank, pp, stage), buffer)
                add_member(archive, name, buffer.getvalue())
    return path


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def unpacked(archive: Path) -> Path:
    """A directory with the members of a ``.nemo`` archive."""
    path = archive.with_name("unpacked")
    with tarfile.open(archive) as members:
        # What the fixture packed itself; Python 3.11.2 and older know no filter.
        members.extractall(path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return path


def nemo2_state(reference: Truth) -> dict[str, Tensor]:
    """The names of Megatron-Core with stacked layers, vocabulary padded to 128 rows of zeros."""
    old = reference.state
    new: dict[str, Any] = {
        "embedding.word_embeddings.weight": pad(old["embed_tokens.weight"], 128),
        "output_layer.bias": pad(old["lm_head.bias"], 128),
    }
    for p in ("weight", "bias"):
        new[f"encoder.final_layernorm.{p}"] = old[f"emb_layer_norm_after.{p}"]
        new[f"lm_head.dense.{p}"] = old[f"lm_head.dense.{p}"]
        new[f"lm_head.layer_norm.{p}"] = old[f"lm_head.layer_norm.{p}"]
        parts: dict[str, Callable[[int], Tensor]] = {
            f"self_attention.linear_qkv.layer_norm_{p}": lambda n, p=p: old[
                f"layers.{n}.self_attn_layer_norm.{p}"
            ],
            f"self_attention.linear_qkv.{p}": lambda n, p=p: fused(old, n, p),
            f"self_attention.linear_proj.{p}": lambda n, p=p: old[f"layers.{n}.self_attn.out_proj.{p}"],
            f"mlp.linear_fc1.layer_norm_{p}": lambda n, p=p: old[f"layers.{n}.final_layer_norm.{p}"],
            f"mlp.linear_fc1.{p}": lambda n, p=p: old[f"layers.{n}.fc1.{p}"],
            f"mlp.linear_fc2.{p}": lambda n, p=p: old[f"layers.{n}.fc2.{p}"],
        }
        for name, get in parts.items():
            new[f"encoder.layers.{name}"] = torch.stack([get(n) for n in range(L)])
    return new


def write_nemo2(reference: Truth, folder: Path) -> Path:
    """A BioNeMo 2 directory: stacked layers, prefix ``module.``, byte objects beside the tensors."""
    import torch.distributed.checkpoint as dcp

    path = folder / "nemo2"
    (path / "context").mkdir(parents=True)
    state: dict[str, Any] = {f"module.{name}": x.clone() for name, x in nemo2_state(reference).items()}
    state["module.encoder.layers.mlp.linear_fc1._extra_state/shard_0_4"] = io.BytesIO(b"not opened")
    state["optimizer.state.exp_avg.module.output_layer.bias"] = torch.zeros(128)
    dcp.save(state, checkpoint_id=path / "weights", no_dist=True)
    leaf = {"type": "leaf", "paths": []}
    items = [
        [f"Attr(name='{key}')", {**leaf, "value": NEMO_CONFIG[key]}]
        for key in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "layernorm_epsilon",
        )
    ]
    objects = {
        "esm2_config_1": {
            "type": {"module": "bionemo.esm2.api", "name": "ESM2GenericConfig"},
            "items": items,
        },
        "trainer_1": {
            "type": {"module": "nemo", "name": "Trainer"},
            "items": [["Attr(name='devices')", leaf]],
        },
    }
    (path / "context" / "io.json").write_text(json.dumps({"root": {}, "objects": objects}))
    return path


def write_sources(truth: Truth, folder: Path) -> None:
    """Write one model as a directory of Hugging Face, a file of fair-esm, and a run with two checkpoints."""
    write_hf(truth, folder)
    write_fair_esm(truth, folder)
    for step in (1, 2):
        target = layout.step_dir(folder / "run", step)
        target.parent.mkdir(parents=True, exist_ok=True)
        convert(folder / "hf", target, "esm2mega")
