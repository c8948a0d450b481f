"""Hidden states of every layer, logits and contacts through the engine, in fp64 against fair-esm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from esm2mega.config.schema import ParallelConfig
from esm2mega.convert.formats import fair_esm
from esm2mega.infer.engine import Engine, OutputRequest, WindowPack
from esm2mega.infer.windows import whole
from esm2mega.parallel.initialize import process_groups
from esm2mega.vocabulary import encode_residues
from tests.infer_models import SHAPE, ids_of, random_proteins
from tests.parity import references
from tests.parity.test_esm2_parity import TOLERANCE, ours

pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")


def test_everything_equals_fair_esm_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    # fair-esm takes the attention softmax in fp32 whatever the model's dtype, which alone costs 2e-7.
    monkeypatch.setattr(
        "esm.multihead_attention.utils_softmax", lambda x, dim, onnx_trace=False: torch.softmax(x, dim)
    )
    shape = replace(SHAPE, ffn_hidden_size=4 * SHAPE.hidden_size)
    reference = references.fair_esm(shape, torch.float64)
    state = dict(reference.state_dict())
    proteins = [*random_proteins([1, 60, 17, 300]), "MXBUZO-.AK"]
    windows = [whole(len(protein)) for protein in proteins]
    tokens = np.concatenate([w.tokens(encode_residues(p)) for w, p in zip(windows, proteins, strict=True)])
    head = (state["contact_head.regression.weight"].flatten(), float(state["contact_head.regression.bias"]))
    layers = tuple(range(shape.num_layers + 1))
    with process_groups(ParallelConfig(), seed=1) as ranks:
        model = (
            ours(shape, "fp64", references.ours(state, fair_esm.NAMES, shape)).eval().requires_grad_(False)
        )
        engine = Engine(
            model, ranks, OutputRequest(layers, logits=True, contact_head=head), micro_batch_tokens=1024
        )
        (outputs,) = engine.run([WindowPack(windows, tokens)])
    assert outputs.logits is not None
    first = 0
    for number, protein in enumerate(proteins):
        with torch.no_grad():
            theirs = reference(ids_of(protein), repr_layers=list(layers), return_contacts=True)
        rows = slice(first, first + len(protein) + 2)
        pairs = [(outputs.hidden[layer][rows], theirs["representations"][layer][0]) for layer in layers]
        pairs.append((outputs.logits[rows], theirs["logits"][0]))
        pairs.append((outputs.contacts[number], theirs["contacts"][0]))
        for actual, expected in pairs:
            assert actual.shape == expected.shape
            assert (actual - expected).abs().max() <= TOLERANCE.fp64 * expected.abs().max()
        first = rows.stop
