"""`esm2mega benchmark`: what it writes and prints, whom it leaves out, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esm2mega.benchmark import command, contenders, peers, sections
from esm2mega.benchmark.breakdown import PHASES
from esm2mega.benchmark.turns import Pass
from esm2mega.cli.app import main
from esm2mega.model.kernels.int8 import int8_defect
from tests.infer_models import random_proteins, write_fasta

SMALL = ["benchmark", "--model", "tiny", "--steps", "2", "--rounds", "1", "--pack-tokens", "128"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


class HuggingFace:
    """Stands for a peer that takes no time."""

    def __init__(self, size: str, precision: str, device: torch.device) -> None:
        pass

    def pass_over(self, batches: Any) -> Pass:
        return Pass(lambda: None, 7.0, computed=1.5)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face is there and computes nothing, fair-esm is not installed, esm-cpp does not import."""
    found = {"transformers": "5.0", "esm-cpp": "0.2"}
    monkeypatch.setattr(peers, "installed_version", found.get)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "esm_cpp", None)
    monkeypatch.setattr(contenders.peers, "HuggingFaceTrainer", HuggingFace)
    monkeypatch.setattr(contenders.peers, "hf_embedding", lambda *_: Pass(lambda: None, 7.0))


def test_everything_is_measured_and_written(stubbed: None, tmp_path: Path, capsys: Any) -> None:
    proteins = random_proteins([20, 41, 33, 60, 100, 200, 15, 27, 80, 31])
    fasta = write_fasta(tmp_path / "p.fasta", [(f"p{i}", text) for i, text in enumerate(proteins)])
    out = tmp_path / "out"
    words = ["--precision", "fp32", "--peers", "--threads", "1", "--out", str(out), str(fasta)]
    assert main([*SMALL, *words]) == 0
    said = capsys.readouterr()
    result = json.loads((out / command.JSON_NAME).read_text())
    assert (out / command.PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
    assert set(result) == {
        *(
            "conditions",
            "settings",
            "proteins",
            "absent",
            "machine",
            "data",
            "training",
            "embedding",
            "steps",
        ),
    }
    assert result["proteins"]["source"] == str(fasta) and result["proteins"]["read"] == 10
    assert result["conditions"]["threads"] == 1
    assert {row["precision"] for row in result["machine"]["products"] if row["is_peak"]} == {
        *("fp32", "bf16", "int8"),
    }
    assert all(len(rates) == 1 and rates[0] > 0 for rates in result["data"].values())
    programs = {s: [row["contender"] for row in result[s]["rows"]] for s in ("training", "embedding")}
    assert programs == {
        "training": ["esm2mega", "hf-random", "hf-sorted"],
        "embedding": ["esm2mega"] * (1 if int8_defect() else 2) + ["hf-sorted"],
    }
    ours, theirs, _ = result["training"]["rows"]
    assert ours["ours_is"] == {} and ours["share_of_product"][0] > 0
    assert theirs["computed_per_real"] == 1.5
    (ratio,) = theirs["ours_is"]["fp32"]
    assert ratio == pytest.approx(ours["tokens_per_second"][0] / theirs["tokens_per_second"][0])
    (step,) = result["steps"]
    assert step["steps"] == 2 and list(step["shares"]) == list(PHASES)
    assert sum(step["shares"].values()) == pytest.approx(1)
    assert "operations" not in theirs
    for section in ("training", "embedding"):
        operations = result[section]["rows"][0]["operations"]
        shares = [one["share"] for one in operations]
        assert shares == sorted(shares, reverse=True) and 0.5 < sum(shares) <= 1
        assert "aten::addmm" in {one["name"] for one in operations}
        assert f"longest operations of esm2mega in {section}, fp32" in said.out
    assert "aten::mm" in {one["name"] for one in ours["operations"]}
    assert "fair-esm is left out: not installed (pip install fair-esm)\n" in said.err
    assert "esm-cpp is left out: 0.2 does not import: " in said.err
    assert set(result["absent"]) == {"fair-esm", "esm-cpp"}
    assert "esm2mega fp32 is" in said.out and "hf-sorted" in said.out
    assert said.out.splitlines()[-2:] == [
        str(out / name) for name in (command.JSON_NAME, command.PICTURE_NAME)
    ]


def test_esm_cpp_gets_weights_and_proteins(monkeypatch: pytest.MonkeyPatch) -> None:
    """In int8 its weights are quantized; it reads the number of threads from the environment."""
    calls: list[Any] = []

    class Model:
        @staticmethod
        def load_from_safetensors(path: str) -> Model:
            calls.append((Path(path).stat().st_size > 4 * 800_000, peers.os.environ["ESM_NUM_THREADS"]))
            return Model()

        def quantize_weights(self) -> None:
            calls.append("quantized")

        def forward_scheduled(self, ids: Any) -> None:
            calls.append([one.tolist() for one in ids])

    monkeypatch.setenv("ESM_NUM_THREADS", "9")
    monkeypatch.setitem(sys.modules, "esm_cpp", SimpleNamespace(Model=Model))
    proteins = [[peers.np.array([5, 6], dtype="uint8")], [peers.np.array([7], dtype="uint8")]]
    work = peers.esm_cpp_embedding(proteins, "tiny", "int8", threads=3)
    work.run()
    assert calls == [(True, "3"), "quantized", [[0, 5, 6, 2], [0, 7, 2]]]
    assert work.units == 7


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", "8m"], "--model 8m is not one of tiny, 8M, 35M, 150M, 650M, 3B, 15B; did you mean 8M?"),
        (["--precision", "fp32,fp16"], "--precision fp16 is not one of fp32, bf16"),
        (["absent.fasta"], "absent.fasta"),
        (
            ["--model", "15B", "--precision", "fp32"],
            "--model 15B: 1 of it in training take more than 272 GB",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**11))
    assert main([*SMALL, "--model", "tiny", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main([*SMALL, "--out", str(tmp_path / "out")]) == 2
    assert "benchmark measures one process, not 2; start it without torchrun" in capsys.readouterr().err


def test_a_device_without_a_product_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> Pass:
        if dtype == torch.int8:
            raise RuntimeError("not for Char\nmore")
        return Pass(lambda: None, float(m * n))

    monkeypatch.setattr(sections, "product", product)
    settings = command.settings_of("tiny", ["fp32"], 1, 1, 64, 1, 1, False)
    result, peaks = sections.measure_machine(settings, torch.device("cpu"))
    assert set(peaks) == {"fp32", "bf16"}
    assert result["products_absent"] == {"int8": "not for Char"}


def test_a_peer_that_fails_takes_nothing_from_the_others(
    stubbed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    class Raising(HuggingFace):
        def pass_over(self, batches: Any) -> Pass:
            raise RuntimeError("no kernel\nfor this shape")

    def no_model(*_: Any) -> Pass:
        raise MemoryError("too large")

    monkeypatch.setattr(contenders.peers, "HuggingFaceTrainer", Raising)
    monkeypatch.setattr(contenders.peers, "hf_embedding", no_model)
    out = tmp_path / "out"
    assert main([*SMALL, "--precision", "fp32", "--peers", "--threads", "1", "--out", str(out)]) == 0
    result = json.loads((out / command.JSON_NAME).read_text())
    failed = "RuntimeError: no kernel for this shape"
    assert result["training"]["failed"] == {"hf-random fp32": failed, "hf-sorted fp32": failed}
    assert result["embedding"]["failed"] == {"hf-sorted fp32": "MemoryError: too large"}
    for section in ("training", "embedding"):
        assert {row["contender"] for row in result[section]["rows"]} == {"esm2mega"}
    assert f"hf-random fp32 failed: {failed}\n" in capsys.readouterr().out


def test_what_was_measured_before_a_failure_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def stopped(*_: Any) -> None:
        raise RuntimeError("the step is broken")

    monkeypatch.setattr(command, "measure_steps", stopped)
    out = tmp_path / "out"
    assert main([*SMALL, "--precision", "fp32", "--threads", "1", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "the step is broken" in error and f"the 4 before it are in {out / command.JSON_NAME}" in error
    result = json.loads((out / command.JSON_NAME).read_text())
    assert result["ended_by"] == "RuntimeError: the step is broken"
    assert result["embedding"]["rows"] and "steps" not in result


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("it measured"))
    (tmp_path / "file").write_text("")
    assert main([*SMALL, "--out", str(tmp_path / "file" / "out")]) == 2
    assert f"{tmp_path / 'file'} is not a directory" in capsys.readouterr().err


def test_the_report_is_shown_before_it_is_written(
    stubbed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_json", full)
    assert main([*SMALL, "--precision", "fp32", "--threads", "1", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "a training step of esm2mega" in said.out and "No space left on device" in said.err
