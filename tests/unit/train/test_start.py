"""A start looks once at what it starts from, and means that to its end, whatever appears meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.cli.app import main
from esm2mega.convert.convert import convert
from esm2mega.convert.formats.registry import detect, open_weights
from esm2mega.finetune import run as finetune_module
from esm2mega.train import pretrain as pretrain_module
from esm2mega.train import start as start_module
from esm2mega.train.loop import LoopState
from tests import foreign
from tests.unit.conftest import TinyRun

pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

SETTINGS = (
    "data.max_seq_length=64",
    "train.micro_batch_tokens=128",
    "train.global_batch_tokens=256",
    "train.max_steps=1",
    "schedule.warmup_steps=0",
)
TASK = ("task.kind=regression", "task.target_columns=[value]")
CONTACTS = ("task.kind=contact", "task.target_columns=[atoms]", "task.head=attention_maps")
CLASSIFIER = ("task.kind=regression", "task.target_columns=[value]", "task.head=hf", "task.pooling=cls")
LORA = ("finetune.mode=lora", "lora.rank=2")
SHAPE = tuple(
    f"model.{key}={value}"
    for key, value in {
        "num_layers": foreign.L,
        "hidden_size": foreign.H,
        "num_attention_heads": foreign.A,
        "ffn_hidden_size": foreign.F,
    }.items()
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as a directory of Hugging Face, a file of fair-esm, and a run with two checkpoints.

    Beside them a run that was fine-tuned from it, and that as a classifier of Hugging Face; and the table.
    """
    folder = tmp_path_factory.mktemp("sources")
    truth = foreign.truth(torch.float32)
    foreign.write_sources(truth, folder)
    rng = np.random.default_rng(5)
    with (folder / "labels.jsonl").open("w") as file:
        for length in rng.integers(10, 55, 30):
            sequence = "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), length))
            atoms = np.cumsum(rng.normal(size=(length, 3)), axis=0).round(3).tolist()
            file.write(json.dumps({"sequence": sequence, "value": rng.normal(), "atoms": atoms}) + "\n")
    tuned = ["finetune", f"init_from={folder / 'run'}", f"run_dir={folder / 'tuned'}", *CLASSIFIER, *SETTINGS]
    assert main([*tuned, f"data.train={folder / 'labels.jsonl'}", "data.crop=start"]) == 0
    convert(folder / "tuned", folder / "classifier", "hf")
    return folder


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Training ends where it would begin; what would have been trained stands in the list."""
    sessions: list[Any] = []

    def begin(run: Any, ranks: Any, make: Any, start: Any, begun: float | None) -> LoopState:
        sessions.append((make(start), start))
        return LoopState()

    for module in (pretrain_module, finetune_module):
        monkeypatch.setattr(module, "run_session", begin)
    return sessions


_opened: list[str] | None = None


def _note_opening(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        _opened.append(os.fspath(arguments[0]))


sys.addaudithook(_note_opening)


@contextmanager
def counted(counts: Counter[str], place: Path) -> Iterator[None]:
    """Count detections of a format, looks at what is newest in `place`, and openings of ``config.json``."""
    global _opened
    codes = {
        detect.__code__: "detections",
        layout.find_checkpoints.__code__: "resolutions",
        layout.read_config.__code__: "configurations",
    }

    def profile(frame: Any, event: str, _: Any) -> None:
        name = codes.get(frame.f_code) if event == "call" else None
        if name == "resolutions" and Path(frame.f_locals["run_dir"]) != place:
            return
        if name is not None:
            counts[name] += 1

    _opened = []
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        opened, _opened = _opened, None
    counts["config.json"] = sum(str(path) == str(place / "config.json") for path in opened)


def command(sources: Path, source: str, run_dir: Path, *settings: str) -> list[str]:
    """A fine-tuning that starts from one of `sources`."""
    given = [f"init_from={sources / source}", f"data.train={sources / 'labels.jsonl'}", f"run_dir={run_dir}"]
    return ["finetune", *given, *SETTINGS, *settings]


PRETRAINED = ("hf", "esm2_x.pt", "run")
FULL, WITH_LORA = TASK, (*TASK, *LORA)
CONTACT_HEAD = (*CONTACTS, "finetune.load_head=true")
HEAD = (*CLASSIFIER, "data.crop=start", "finetune.load_head=true")


@pytest.mark.some(5)
@pytest.mark.parametrize(
    ("source", "settings"),
    [
        *((source, kind) for kind in (FULL, WITH_LORA, CONTACT_HEAD) for source in PRETRAINED),
        *((source, kind) for source in ("classifier", "tuned") for kind in (HEAD, (*HEAD, *LORA))),
    ],
)
def test_a_start_looks_once(
    sources: Path, tmp_path: Path, begun: list[Any], source: str, settings: tuple[str, ...]
) -> None:
    counts: Counter[str] = Counter()
    with counted(counts, sources / source):
        assert main(command(sources, source, tmp_path / "new", *settings)) == 0
    is_own = source in ("run", "tuned")
    assert counts["detections"] == 1
    assert counts["resolutions"] == is_own
    assert counts["configurations"] == is_own
    assert counts["config.json"] == (source in ("hf", "classifier"))
    assert len(begun) == 1


@pytest.mark.parametrize("source", PRETRAINED)
@pytest.mark.parametrize("lora", [(), ("lora.rank=2",)])
def test_so_does_that_of_a_pretraining(
    sources: Path,
    finished: TinyRun,
    tmp_path: Path,
    begun: list[Any],
    source: str,
    lora: tuple[str, ...],
) -> None:
    given = (f"init_from={sources / source}", f"data.train={finished.train}", f"run_dir={tmp_path / 'new'}")
    counts: Counter[str] = Counter()
    with counted(counts, sources / source):
        assert main(["pretrain", *given, *SHAPE, *SETTINGS, *lora]) == 0
    assert counts == {
        "detections": 1,
        **({"resolutions": 1, "configurations": 1} if source == "run" else {}),
        "config.json": source == "hf",
    }
    assert len(begun) == 1


def appears(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[], object]) -> None:
    """Have something made right before a function of `esm2mega.train.start` is called for the first time."""
    original, made = getattr(start_module, name), []

    def call(*arguments: Any) -> Any:
        if not made:
            made.append(make())
        return original(*arguments)

    monkeypatch.setattr(start_module, name, call)


@pytest.mark.parametrize("settings", [FULL, WITH_LORA, CONTACT_HEAD])
def test_a_checkpoint_that_appears_meanwhile_changes_nothing(
    sources: Path,
    finished: TinyRun,
    tmp_path: Path,
    begun: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
) -> None:
    """The newer one has another shape: its configuration or its weights would not fit."""
    run_dir = tmp_path / "run"
    shutil.copytree(sources / "run", run_dir)
    newer = layout.step_dir(run_dir, 3)
    appears(
        monkeypatch, "load_run_over", lambda: shutil.copytree(layout.step_dir(finished.run_dir, 4), newer)
    )
    data = f"data.train={sources / 'labels.jsonl'}"
    assert main(command(tmp_path, "run", tmp_path / "new", data, *settings)) == 0
    assert choose_checkpoint(run_dir).path == newer
    ((session, start),) = begun
    assert start.path == layout.step_dir(run_dir, 2) and not start.is_resumed
    (model,) = session.built.state.model
    name = "encoder.final_layernorm.weight"
    expected = open_weights(layout.step_dir(run_dir, 2)).read(name)
    assert torch.equal(dict(model.module.named_parameters())[name], expected)
    if settings == WITH_LORA:
        assert session.built.extra_state["base"]["path"] == str(layout.step_dir(run_dir, 2).resolve())


def test_a_run_is_resumed_from_what_was_its_newest(
    finished: TinyRun, tmp_path: Path, begun: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    newest = layout.step_dir(run_dir, 4)
    appears(monkeypatch, "check_same_model", lambda: shutil.copytree(newest, layout.step_dir(run_dir, 5)))
    finished_run = ["pretrain", "--config", str(finished.run_dir / "config.yaml")]
    assert main([*finished_run, f"run_dir={run_dir}", "train.max_steps=6"]) == 0
    ((_, start),) = begun
    assert start.path == newest and start.is_resumed and start.state["step"] == 4
