"""Random protein BERTs of TAPE, and the files of ProteinLM laid out by hand from their state dict.

ProteinLM's pre-LN model is computed with the modules of TAPE in another order. Legend: L layers, H hidden
size, A heads, d = H/A, F = 4H, P positions.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

L, H, A, F, P = 4, 48, 6, 192, 720
EPSILON = 1e-12
TAPE = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "<unk>": 4}
TAPE |= {letter: 5 + n for n, letter in enumerate("ABCDEFGHIKLMNOPQRSTUVWXYZ")}


@dataclass(frozen=True)
class BertTruth:
    """A `ProteinBertForMaskedLM`, random in every tensor."""

    model: Any

    @property
    def state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())


def truth(dtype: torch.dtype, tanh: bool = False, positions: int = P) -> BertTruth:
    from tape.models.modeling_bert import ProteinBertConfig, ProteinBertForMaskedLM

    from tests.parity.references import randomize

    config = ProteinBertConfig(
        hidden_size=H,
        num_hidden_layers=L,
        num_attention_heads=A,
        intermediate_size=F,
        max_position_embeddings=positions,
    )
    model = ProteinBertForMaskedLM(config).to(dtype).eval()
    randomize(model)
    if tanh:
        for layer in model.bert.encoder.layer:
            layer.intermediate.intermediate_act_fn = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    return BertTruth(model)


def tape_ids(input_ids: Tensor) -> Tensor:
    """Ids of ESM-2 ``[b, s]`` to those of TAPE, token by token."""
    from esm2mega.vocabulary import VOCAB

    return torch.tensor([[TAPE[VOCAB[token]] for token in row] for row in input_ids.tolist()])


@torch.no_grad()
def run_postln(reference: BertTruth, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """TAPE's own forward pass; logits ``[b, s, 30]`` in its order."""
    return reference.model(tape_ids(input_ids), input_mask=attention_mask)[0]


def run_preln(reference: BertTruth, input_ids: Tensor, attention_mask: Tensor, final_norm: bool) -> Tensor:
    """ProteinLM's forward pass. The LayerNorm of TAPE's embeddings serves as the final one."""
    with torch.no_grad():
        x = states_preln(reference, input_ids, attention_mask)
        x = reference.model.bert.embeddings.LayerNorm(x) if final_norm else x
        return reference.model.mlm(x)[0]


@torch.no_grad()
def states_preln(reference: BertTruth, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden states of ProteinLM before a final LayerNorm, ``[b, s, H]``."""
    bert, ids = reference.model.bert, tape_ids(input_ids)
    tables = bert.embeddings
    positions = torch.arange(ids.shape[1])
    x = tables.word_embeddings(ids) + tables.position_embeddings(positions)
    x = x + tables.token_type_embeddings.weight[0]
    mask = (1.0 - attention_mask[:, None, None].to(x.dtype)) * -10000.0
    for layer in bert.encoder.layer:
        context = layer.attention.self(layer.attention.output.LayerNorm(x), mask)[0]
        x = x + layer.attention.output.dense(context)
        x = x + layer.output.dense(layer.intermediate(layer.output.LayerNorm(x)))
    return x


def esm_order(logits: Tensor) -> Tensor:
    """``[…, 30]`` of TAPE to ``[…, 33]`` of ESM-2; NaN where TAPE has no token."""
    from esm2mega.vocabulary import VOCAB

    ours = logits.new_full((*logits.shape[:-1], 33), float("nan"))
    for token, row in TAPE.items():
        ours[..., VOCAB.index(token)] = logits[..., row]
    return ours


def write_tape(reference: BertTruth, folder: Path) -> Path:
    path = folder / "tape"
    path.mkdir()
    reference.model.save_pretrained(path)
    return path


def preln_parts(n: int) -> dict[str, str]:
    """What a pre-LN layer is made of, and which modules of TAPE play the part, see `run_preln`."""
    at = f"bert.encoder.layer.{n}."
    return {
        "first_norm": f"{at}attention.output.LayerNorm",
        "query": f"{at}attention.self.query",
        "key": f"{at}attention.self.key",
        "value": f"{at}attention.self.value",
        "dense": f"{at}attention.output.dense",
        "second_norm": f"{at}output.LayerNorm",
        "up": f"{at}intermediate.dense",
        "down": f"{at}output.dense",
    }


def write_proteinlm(reference: BertTruth, folder: Path, stale_decoder: bool = False) -> Path:
    """ProteinLM's modified TAPE, in PyTorch's old serialization; with `stale_decoder` as its converter leaves
    it.
    """
    old, path = reference.state, folder / "proteinlm"
    path.mkdir()
    names = {
        "first_norm": "input_ln",
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "dense": "attention.dense",
        "second_norm": "post_attn_ln",
        "up": "mlp.dense_h_4h",
        "down": "mlp.dense_4h_h",
    }
    tables = "bert.embeddings."
    new = {
        f"{tables}{x}_embeddings.weight": old[f"{tables}{x}_embeddings.weight"] for x in ("word", "position")
    }
    new[f"{tables}token_type_embeddings.weight"] = old[f"{tables}token_type_embeddings.weight"][:1]
    for p in ("weight", "bias"):
        for n in range(L):
            for part, source in preln_parts(n).items():
                new[f"bert.encoder.layer.{n}.{names[part]}.{p}"] = old[f"{source}.{p}"]
        new[f"bert.encoder.final_ln.{p}"] = old[f"bert.embeddings.LayerNorm.{p}"]
        new[f"bert.bert_tail_dense.{p}"] = old[f"bert.pooler.dense.{p}"]
        new[f"mlm.transform.dense.{p}"] = old[f"mlm.transform.dense.{p}"]
        new[f"mlm.transform.LayerNorm.{p}"] = old[f"mlm.transform.LayerNorm.{p}"]
    new["mlm.bias"] = old["mlm.bias"]
    new["mlm.decoder.weight"] = old["mlm.decoder.weight"] + (1.0 if stale_decoder else 0.0)
    new = {name: value.clone() for name, value in new.items()}
    torch.save(new, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    config = {
        "vocab_size": 30,
        "hidden_size": H,
        "num_hidden_layers": L,
        "num_attention_heads": A,
        "intermediate_size": F,
        "hidden_act": "gelu",
        "max_position_embeddings": reference.model.config.max_position_embeddings,
        "type_vocab_size": 1,
        "layer_norm_eps": EPSILON,
        "base_model": "transformer",
        "pruned_heads": {},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def fused(state: dict[str, Tensor], n: int, part: str, heads: range, version: float) -> Tensor:
    """Rows of one rank's fused projection in the order of a checkpoint version, one row after the other."""
    d = H // A
    qkv = [state[f"{preln_parts(n)[x]}.{part}"] for x in ("query", "key", "value")]
    if version >= 2.0:
        order = [(x, a, i) for a in heads for x in range(3) for i in range(d)]
    elif version >= 1.0:
        order = [(x, a, i) for a in heads for i in range(d) for x in range(3)]
    else:
        order = [(x, a, i) for x in range(3) for a in heads for i in range(d)]
    return torch.stack([qkv[x][a * d + i] for x, a, i in order])


def write_megatron(
    reference: BertTruth,
    folder: Path,
    version: float | None = 3.0,
    tp: int = 1,
    pp: int = 1,
    tanh: bool = False,
) -> Path:
    """``iter_0000007`` of ProteinLM's Megatron-LM, states of random generators included."""
    path = folder / "megatron"
    path.mkdir()
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    arguments = Namespace(
        num_layers=L,
        hidden_size=H,
        num_attention_heads=A,
        max_position_embeddings=P,
        layernorm_epsilon=EPSILON,
        bias_gelu_fusion=tanh,
        params_dtype=torch.float32,
    )
    for stage in range(pp):
        for rank in range(tp):
            model = rank_model(reference.state, version or 0.0, tp, rank, pp, stage)
            content = {
                "args": arguments,
                "iteration": 7,
                "model": model,
                "np_rng_state": np.random.RandomState(1).get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
            if version is not None:
                content["checkpoint_version"] = version
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            (path / "iter_0000007" / name).mkdir(parents=True)
            torch.save(content, path / "iter_0000007" / name / "model_optim_rng.pt")
    return path


def rank_model(
    state: dict[str, Tensor], version: float, tp: int, rank: int, pp: int, stage: int
) -> dict[str, Any]:
    """The nested ``model`` of one rank; row 5 of the vocabulary is unused; 128 rows per rank."""

    def vocabulary(name: str) -> Tensor:
        value = state[name]
        unused = torch.full((1, *value.shape[1:]), 7.0, dtype=value.dtype)
        padding = value.new_zeros(128 * tp - 31, *value.shape[1:])
        return torch.cat((value[:5], unused, value[5:], padding)).chunk(tp)[rank].clone()

    def columns(value: Tensor) -> Tensor:
        return value.chunk(tp, dim=0)[rank].clone()

    def rows(value: Tensor) -> Tensor:
        return value.chunk(tp, dim=1)[rank].clone()

    heads = range(rank * A // tp, (rank + 1) * A // tp)
    transformer: dict[str, Tensor] = {}
    for local, n in enumerate(range(stage * L // pp, (stage + 1) * L // pp)):
        parts, at = preln_parts(n), f"layers.{local}."
        for p in ("weight", "bias"):
            split = rows if p == "weight" else torch.clone
            transformer |= {
                f"{at}input_layernorm.{p}": state[f"{parts['first_norm']}.{p}"],
                f"{at}attention.query_key_value.{p}": fused(state, n, p, heads, version),
                f"{at}attention.dense.{p}": split(state[f"{parts['dense']}.{p}"]),
                f"{at}post_attention_layernorm.{p}": state[f"{parts['second_norm']}.{p}"],
                f"{at}mlp.dense_h_to_4h.{p}": columns(state[f"{parts['up']}.{p}"]),
                f"{at}mlp.dense_4h_to_h.{p}": split(state[f"{parts['down']}.{p}"]),
            }
    model: dict[str, Any] = {"language_model": {"transformer": transformer}}
    table = vocabulary("bert.embeddings.word_embeddings.weight")
    if stage == 0:
        positions = state["bert.embeddings.position_embeddings.weight"]
        positions = positions + state["bert.embeddings.token_type_embeddings.weight"][0]
        model["language_model"]["embedding"] = {
            "word_embeddings": {"weight": table},
            "position_embeddings": {"weight": positions},
        }
    if stage == pp - 1:
        for p in ("weight", "bias"):
            transformer[f"final_layernorm.{p}"] = state[f"bert.embeddings.LayerNorm.{p}"]
        head = {
            f"{ours}.{p}": state[f"mlm.transform.{theirs}.{p}"]
            for ours, theirs in (("dense", "dense"), ("layernorm", "LayerNorm"))
            for p in ("weight", "bias")
        }
        model["lm_head"] = {**head, "bias": vocabulary("mlm.bias")}
        if pp > 1:
            model["word_embeddings_for_head"] = {"weight": table}
    return model
