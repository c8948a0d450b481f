"""Models straight from the files of other packages: values are those of these packages, at every layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import esm2mega
from esm2mega.config.infer import OUTPUTS
from esm2mega.errors import UserError
from esm2mega.infer.embed import EmbedRequest, embed
from tests import foreign, foreign_bert
from tests.infer_models import Reference, ids_of, random_proteins, write_fasta

# Relative to the largest value, as in tests/parity.
BOUND = 1e-5
LAYERS = [0, 1, 2, 3, 4]
PROTEINS = [*random_proteins([1, 120, 17], seed=6), "MXBUZO-.AK"]


class Values(NamedTuple):
    """What a package gives for one protein: states of all layers and logits with ``<cls>`` and ``<eos>``."""

    states: list[Tensor]
    logits: Tensor
    contacts: Tensor | None = None


Run = Callable[[str], Values]


def hugging_face(reference: Reference, _: Path) -> tuple[Path, Run]:
    def run(protein: str) -> Values:
        theirs = reference.run(protein)
        return Values([x[0] for x in theirs.hidden_states], theirs.logits[0], reference.contacts(protein))

    return reference.hugging_face, run


def fair_esm(_: Reference, folder: Path) -> tuple[Path, Run]:
    truth = foreign.truth(torch.float32, "fp16")

    @torch.no_grad()
    def run(protein: str) -> Values:
        theirs = truth.model(ids_of(protein), repr_layers=LAYERS, return_contacts=True)
        states = [theirs["representations"][layer][0] for layer in LAYERS]
        return Values(states, theirs["logits"][0], theirs["contacts"][0])

    return foreign.write_fair_esm(truth, folder), run


def close(actual: Any, expected: Tensor) -> bool:
    assert actual.shape == expected.shape
    return bool(np.abs(actual - expected.numpy()).max() <= BOUND * expected.abs().max())


@pytest.mark.parametrize("package", [hugging_face, fair_esm])
def test_embed_and_load_give_what_the_package_gives(
    package: Callable[[Reference, Path], tuple[Path, Run]], reference: Reference, tmp_path: Path
) -> None:
    """Every layer, logits and contacts, fp32; without a conversion in between."""
    path, run = package(reference, tmp_path)
    fasta = write_fasta(tmp_path / "p.fasta", [(f"p{i}", protein) for i, protein in enumerate(PROTEINS)])
    overrides = (f"infer.outputs=[{','.join(OUTPUTS)}]", f"infer.layers={LAYERS}")
    embed(EmbedRequest(str(path), str(fasta), str(tmp_path / "x.h5"), overrides=overrides))
    with esm2mega.load(path) as model, h5py.File(tmp_path / "x.h5") as file:
        states, logits = model.embed(PROTEINS, layers=LAYERS), model.logits(PROTEINS)
        contacts = model.contacts(PROTEINS)
        for number, protein in enumerate(PROTEINS):
            expected = run(protein)
            rows = slice(*file["offsets"][number : number + 2])
            for layer in LAYERS:
                residues = expected.states[layer][1:-1]
                assert close(states[layer][number], residues)
                assert np.array_equal(file[f"residue/layer_{layer}"][rows], states[layer][number])
                assert close(file[f"pooled/layer_{layer}"][number], residues.mean(0))
            assert close(logits[number], expected.logits[1:-1])
            assert np.array_equal(file["logits"][rows], logits[number])
            assert expected.contacts is not None and close(contacts[number], expected.contacts)
            maps = file["contacts"][slice(*file["contact_offsets"][number : number + 2])]
            assert np.array_equal(maps.reshape(contacts[number].shape), contacts[number])


def test_a_directory_and_its_conversion_give_the_same_bits(reference: Reference) -> None:
    values = []
    for path in (reference.hugging_face, reference.checkpoint):
        with esm2mega.load(path) as model:
            values.append([*model.embed(PROTEINS), *model.logits(PROTEINS), *model.contacts(PROTEINS)])
    assert all(map(np.array_equal, *values))


def test_weights_in_fp16_are_computed_in_fp32(reference: Reference, tmp_path: Path) -> None:
    """As the larger models are published; every fp16 number is one of fp32."""
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "config.json").write_text((reference.hugging_face / "config.json").read_text())
    state = load_file(reference.hugging_face / "model.safetensors")
    half = {name: value.half() for name, value in state.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        from transformers import EsmForMaskedLM

        theirs = EsmForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = theirs(ids_of(PROTEINS[1])).logits[0, 1:-1]
    with esm2mega.load(folder) as model:
        assert close(model.logits(PROTEINS[1:2])[0], expected)


def tape(folder: Path) -> tuple[Path, Run]:
    truth = foreign_bert.truth(torch.float32)
    truth.model.bert.encoder.output_hidden_states = True

    @torch.no_grad()
    def run(protein: str) -> Values:
        logits, states = truth.model(foreign_bert.tape_ids(ids_of(protein)))
        return Values([x[0] for x in states], foreign_bert.esm_order(logits[0]))

    return foreign_bert.write_tape(truth, folder), run


def proteinlm(folder: Path) -> tuple[Path, Run]:
    """Its states are what its layers read, and what the head reads."""
    truth = foreign_bert.truth(torch.float32)
    seen: list[Tensor] = []
    first_norms = [layer.attention.output.LayerNorm for layer in truth.model.bert.encoder.layer]
    for module in (*first_norms, truth.model.mlm):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].clone()))

    def run(protein: str) -> Values:
        seen.clear()
        ids = ids_of(protein)
        logits = foreign_bert.run_preln(truth, ids, torch.ones_like(ids), final_norm=False)
        return Values(list(seen), foreign_bert.esm_order(logits[0]))

    return foreign_bert.write_proteinlm(truth, folder), run


@pytest.mark.parametrize("package", [tape, proteinlm])
def test_relatives_of_esm2(package: Callable[[Path], tuple[Path, Run]], tmp_path: Path) -> None:
    """Learned positions; layers whose states are normalised at their end (TAPE), or not (ProteinLM)."""
    pytest.importorskip("tape", reason="TAPE is not installed: pip install tape_proteins")
    path, run = package(tmp_path)
    proteins = PROTEINS[:3]
    with esm2mega.load(path, max_seq_length=foreign_bert.P) as model:
        states, logits = model.embed(proteins, layers=LAYERS), model.logits(proteins)
        for number, protein in enumerate(proteins):
            expected = run(protein)
            for layer in LAYERS:
                assert close(states[layer][number], expected.states[layer][1:-1])
            known = ~expected.logits[0].isnan()
            assert close(logits[number][:, known.numpy()], expected.logits[1:-1, known])
        with pytest.raises(UserError, match="has no contact head"):
            model.contacts(proteins)
    with pytest.raises(UserError, match=r"infer.max_seq_length=721 is more than the 720 positions"):
        esm2mega.load(path, max_seq_length=foreign_bert.P + 1)


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match="in none of the formats esm2mega, hf, fair-esm"):
        esm2mega.load(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="nowhere"):
        esm2mega.load(tmp_path / "nowhere")
