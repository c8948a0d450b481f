"""A protein that is longer than a pack passes whole, alone, and its contacts are computed in tiles."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch

import esm2mega
from esm2mega.config.infer import validate_inference
from esm2mega.config.load import load_run
from esm2mega.config.schema import ModelConfig
from esm2mega.errors import UserError
from esm2mega.infer import maps
from esm2mega.infer.embed import EmbedRequest, embed
from esm2mega.infer.engine import Engine, OutputRequest, group_windows
from esm2mega.infer.memory import need_of
from esm2mega.model import contact_maps, contact_tiles
from tests.infer_models import Reference, random_proteins, write_fasta

# Relative to the largest value: fp32 sums over 700 keys.
BOUND = 2e-5

SHORT = random_proteins([60, 33, 17])
LONG = random_proteins([700, 300], seed=8)

WHOLE = ("infer.outputs=[residue,contacts]", "infer.max_seq_length=1000", "infer.micro_batch_tokens=128")


@pytest.fixture
def in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protein of 300 residues is a long one, of several tiles and panels."""
    monkeypatch.setattr(contact_maps, "_MAP_ELEMENTS", 100 * 100)
    monkeypatch.setattr(contact_tiles, "PANEL_ELEMENTS", 16 * 48 * 48)
    for module in (contact_tiles, maps):
        monkeypatch.setattr(module, "TILE", 48)


def run(reference: Reference, proteins: list[str], out: Path, *overrides: str, **request: str) -> Path:
    fasta = write_fasta(out.with_suffix(".fasta"), [(f"p{n}", text) for n, text in enumerate(proteins)])
    embed(EmbedRequest(str(reference.checkpoint), str(fasta), str(out), overrides=overrides, **request))  # type: ignore[arg-type]
    return out


def contacts_of(path: Path, number: int) -> npt.NDArray[np.float32]:
    with h5py.File(path) as file:
        values = file["contacts"][slice(*file["contact_offsets"][number : number + 2])]
        length = int(file["lengths"][number])
    found: npt.NDArray[np.float32] = values.reshape(length, length)
    return found


def close(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> bool:
    difference = np.abs(actual - expected)[~np.isnan(expected)]
    is_same_shape = actual.shape == expected.shape and (np.isnan(actual) == np.isnan(expected)).all()
    return bool(is_same_shape and difference.max() <= BOUND * np.nanmax(np.abs(expected)))


@pytest.mark.usefixtures("in_tiles")
def test_a_long_protein_equals_hugging_face_and_changes_no_other(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = run(reference, SHORT, tmp_path / "short.h5", *WHOLE)
    assert "pass at once" not in capsys.readouterr().err
    among = run(reference, [*SHORT[:2], *LONG, SHORT[2]], tmp_path / "all.h5", *WHOLE)
    assert "702 tokens pass at once: every process needs about" in capsys.readouterr().err
    for number, protein in enumerate(LONG, start=2):
        assert close(contacts_of(among, number), reference.contacts(protein).numpy())
    for number, other in enumerate((0, 1, 4)):
        assert np.array_equal(contacts_of(alone, number), contacts_of(among, other))
    # Alone, and in another order, it has the same bits.
    again = run(reference, LONG[::-1], tmp_path / "long.h5", *WHOLE)
    with h5py.File(again) as file, h5py.File(among) as other_file:
        rows = slice(*other_file["offsets"][2:4])
        assert np.array_equal(file["residue/layer_4"][300:], other_file["residue/layer_4"][rows])
    assert np.array_equal(contacts_of(again, 1), contacts_of(among, 2))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_tiles_change_no_output(
    reference: Reference, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, in windows, in fp16, as arrays in Python, and as a picture."""
    cases = {
        "whole": WHOLE,
        "fp16": (*WHOLE, "infer.dtype=fp16"),
        "windows": ("infer.outputs=[contacts]", "infer.max_seq_length=180", "infer.too_long=chunk"),
    }
    before = {name: run(reference, LONG, tmp_path / f"{name}.h5", *words) for name, words in cases.items()}
    request.getfixturevalue("in_tiles")
    monkeypatch.setattr("esm2mega.infer.figures.MOST_CELLS", 100)
    for name, words in cases.items():
        after = run(
            reference, LONG, tmp_path / f"{name}_tiles.h5", *words, contact_maps=str(tmp_path / f"{name}_png")
        )
        assert len(list((tmp_path / f"{name}_png").glob("*.png"))) == 2
        for number in range(2):
            one, other = contacts_of(after, number), contacts_of(before[name], number)
            # fp16 may round the other way.
            assert close(one, other) or (name == "fp16" and np.abs(one - other).max() < 1e-3)
    assert np.isnan(contacts_of(before["windows"], 0)).any()
    with esm2mega.load(reference.checkpoint, max_seq_length=1000) as model:
        assert np.array_equal(model.contacts([LONG[0]])[0], contacts_of(tmp_path / "whole_tiles.h5", 0))


@pytest.mark.usefixtures("in_tiles")
def test_contacts_that_are_not_finite_name_the_protein(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.sigmoid", lambda values: values.new_full(values.shape, np.inf))
    with pytest.raises(UserError, match="p0.*contacts"):
        run(reference, LONG, tmp_path / "x.h5", *WHOLE)


def test_long_windows_are_alone_and_the_others_share_packs() -> None:
    # 60 and 50 share a pack, in which 20 has no room; 128 fills one.
    plan = group_windows([50, 300, 60, 128, 129, 20], 128)
    assert sorted(map(sorted, plan)) == [[0, 2], [1], [3], [4], [5]]
    assert group_windows([], 128) == []
    assert group_windows([129], 128) == [[0]]


def test_a_long_pack_passes_the_pipeline_alone() -> None:
    """The others are not padded to it; each stage gets tensors of one size at a time."""
    engine = SimpleNamespace(micro_batch_tokens=128, _ranks=SimpleNamespace(pp_size=1))
    packs = [SimpleNamespace(tokens=range(length)) for length in (128, 300, 20, 50, 129, 400, 60)]
    groups = [[len(pack.tokens) for pack in group] for group in Engine._groups(engine, packs)]
    assert groups == [[128], [300], [20, 50], [129], [400], [60]]
    many = Engine._groups(engine, packs[:1] * 10)
    assert len(many) > 1 and sum(map(len, many)) == 10


def test_context_parallel_inference_asks_nothing_of_the_packs_of_training() -> None:
    run = load_run(None, ["model.size=8M", "parallel.context_parallel_size=3"])
    validate_inference(run, 3)


def test_what_is_said_grows_with_the_length_and_not_with_its_square() -> None:
    model = ModelConfig(
        num_layers=33, hidden_size=1280, ffn_hidden_size=5120, num_attention_heads=20, precision="fp32"
    )
    request = OutputRequest((33,), contact_head=(torch.zeros(660), 0.0))
    small, large = (need_of(model, request, n + 2, 1, 1, 1, 4) for n in (10_000, 30_000))
    assert small.memory < large.memory < 3 * small.memory
    assert 8 * small.disk < large.disk < 10 * small.disk
    # Titin: half a map of 34,350 residues in fp32.
    assert need_of(model, request, 34_352, 1, 1, 1, 4).disk == pytest.approx(2.36e9, rel=0.05)


def test_windows_of_a_protein_wait_for_each_other() -> None:
    model = ModelConfig(num_layers=6, hidden_size=320, ffn_hidden_size=1280, num_attention_heads=20)
    request = OutputRequest((6,), contact_head=(torch.zeros(120), 0.0))
    one, five = (need_of(model, request, 8192, windows, 1, 1, 4) for windows in (1, 5))
    assert five.disk == 5 * one.disk
    # Hidden states of four windows: 320 numbers of 4 bytes for each token.
    assert five.memory - one.memory >= 4 * 8192 * 320 * 4
