"""`embed --precision int8`: bits of a protein, its drift from fp32, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from scipy import stats

import esm2mega
from esm2mega.config.infer import validate_int8
from esm2mega.config.load import load_run
from esm2mega.data.variants.wild_types import WildType
from esm2mega.errors import MachineError, UserError
from esm2mega.infer.drift import Outputs, compare
from esm2mega.infer.embed import EmbedRequest, embed
from esm2mega.infer.score import ScoreOptions, score_file
from esm2mega.model.kernels.int8 import check_products
from tests.infer_models import Reference, random_proteins, write_fasta

PROTEINS = random_proteins([1, 60, 17, 126, 2, 33, 90, 41, 5], seed=6)
# The weights of this random model are some times larger than trained ones: attention is near one-hot.
LOOSE = "infer.max_drift=0.5"


@pytest.fixture(autouse=True)
def machine() -> None:
    try:
        check_products()
    except MachineError as error:
        pytest.skip(str(error))


def run(
    reference: Reference, folder: Path, name: str, proteins: list[str], *overrides: str, **request: Any
) -> list[str]:
    fasta = write_fasta(
        folder / f"{name}.fasta", [(f"p{i}", sequence) for i, sequence in enumerate(proteins)]
    )
    overrides = ("infer.precision=int8", *overrides)
    out = str(folder / f"{name}.h5")
    return embed(EmbedRequest(str(reference.checkpoint), str(fasta), out, overrides=overrides, **request))


def test_same_bits_alone_and_in_any_pack(reference: Reference, tmp_path: Path) -> None:
    said = run(reference, tmp_path, "all", PROTEINS, LOOSE)
    run(reference, tmp_path, "small", PROTEINS[::-1], LOOSE, "infer.micro_batch_tokens=128")
    run(reference, tmp_path, "alone", PROTEINS[2:3], LOOSE)
    with h5py.File(tmp_path / "all.h5") as file, h5py.File(tmp_path / "small.h5") as small:
        assert file.attrs["precision"] == "int8"
        name, borders, last = "residue/layer_4", file["offsets"][:], len(PROTEINS) - 1
        backwards = small["offsets"][:]
        for number in range(len(PROTEINS)):
            rows = file[name][borders[number] : borders[number + 1]]
            other = last - number
            assert np.array_equal(rows, small[name][backwards[other] : backwards[other + 1]])
            if number == 2:
                with h5py.File(tmp_path / "alone.h5") as alone:
                    assert np.array_equal(rows, alone[name][:])
                    assert np.array_equal(file["pooled/layer_4"][number], alone["pooled/layer_4"][0])
    (line,) = [line for line in said if line.startswith("int8 beside fp32: ")]
    for part in ("cosine at least 0.", "largest difference", "perplexity", "Spearman of a scan at least 0."):
        assert part in line


def test_drift_above_the_bound_is_refused(reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"more than --max-drift 1e-09 .*cosine at least .*--precision fp32"):
        run(reference, tmp_path, "x", PROTEINS, "infer.max_drift=1e-9")
    assert [path.name for path in tmp_path.iterdir()] == ["x.fasta"]


def test_drift_is_measured_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)

    def outputs(noise: float) -> list[Outputs]:
        drawn = torch.Generator().manual_seed(1)
        made = []
        for length in (30, 50):
            states, scan = torch.randn(length, 24, generator=drawn), torch.randn(length, 20, generator=drawn)
            masked = torch.rand(length // 7, 1, generator=drawn)
            near = [x + noise * torch.randn(x.shape, generator=generator) for x in (states, scan, masked)]
            made.append(Outputs(*(x.double() for x in near)))
        return made

    exact, other = outputs(0), outputs(0.1)
    drift = compare(exact, other, 80)
    pairs = list(zip(exact, other, strict=True))
    cosines = [
        float(a @ b / a.norm() / b.norm())
        for left, right in pairs
        for a, b in zip(left.states, right.states, strict=True)
    ]
    assert drift.cosine == pytest.approx(min(cosines), abs=1e-12)
    scans = [stats.spearmanr(a.scan.flatten(), b.scan.flatten()).statistic for a, b in pairs]  # type: ignore[union-attr]
    assert drift.spearman == pytest.approx(min(scans), abs=1e-12)
    losses = [np.concatenate([o.masked.flatten() for o in side]) for side in (other, exact)]  # type: ignore[union-attr]
    assert drift.perplexity == pytest.approx([np.exp(x.mean()) for x in losses], abs=1e-12)
    drift.check(0.5)
    with pytest.raises(UserError, match="cosine of a residue"):
        drift.check(1e-6)
    assert compare(exact, exact, 80).parts == pytest.approx(dict.fromkeys(drift.parts, 0), abs=1e-12)


def test_a_drift_without_a_number_is_refused() -> None:
    states = torch.ones(3, 4, dtype=torch.float64)
    constant = Outputs(
        states, torch.zeros(3, 20, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    )
    with pytest.raises(UserError, match="nan in Spearman"):
        compare([constant], [constant], 3).check(1)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel.tensor_model_parallel_size=2", "set parallel.tensor_model_parallel_size=1"),
        ("parallel.pipeline_model_parallel_size=2", "set parallel.pipeline_model_parallel_size=1"),
        ("lora.rank=4", "`esm2mega lora merge`"),
        ("infer.max_drift=0", "infer.max_drift=0"),
    ],
)
def test_settings_that_are_refused(override: str, said: str) -> None:
    run = load_run("base", ["model.size=8M", "infer.precision=int8", override])
    with pytest.raises(UserError, match=said):
        validate_int8(run)


def test_other_commands_refuse_int8(reference: Reference, tmp_path: Path) -> None:
    how = ScoreOptions(overrides=["infer.precision=int8"])
    with pytest.raises(UserError, match="of `esm2mega embed`.*`score` computes in fp32"):
        score_file(str(reference.checkpoint), [WildType("a", "MKTAY")], None, str(tmp_path / "x.csv"), how)
    with pytest.raises(UserError, match="of `esm2mega embed`.*esm2mega.load computes in fp32"):
        esm2mega.load(reference.checkpoint, precision="int8")
