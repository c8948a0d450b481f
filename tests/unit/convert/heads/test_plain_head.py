"""The default head goes out as tensors and a few words, which the lines of the docs compute with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from esm2mega import infer_model, train_model
from esm2mega.cli.app import main
from esm2mega.config.schema import TaskConfig
from esm2mega.convert.heads.plain_head import READER, export_notes
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.data.labels.schema import TargetInfo
from tests.cli.pages import ROOT, TEXT, blocks
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
pytest.importorskip("transformers", reason="transformers is not installed")

RNG = np.random.default_rng(9)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(9, 40, 8)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("regression", ()), ("classification", ("task.head=linear", "task.pooling=max"))],
)
def test_the_lines_of_the_docs_predict_the_same(
    kind: str, settings: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [len(s) if kind == "regression" else "ab"["K" in s] for s in SEQUENCES]
    labels[:2] = [labels[0], labels[1]] if kind == "regression" else ["a", "b"]
    words = [*SETTINGS, f"run_dir={tmp_path / 'run'}", f"task.kind={kind}", "train.max_steps=2", *settings]
    trained = train_model(words, train=list(zip(SEQUENCES, labels, strict=True)))
    assert "`convert --to hf` writes it as head.safetensors" in capsys.readouterr().err
    out = tmp_path / "fitness_hf"
    assert main(["convert", str(trained.checkpoint), str(out), "--to", "hf", "--verify"]) == 0
    assert "the head, written to head.safetensors and head.json beside the encoder" in capsys.readouterr().out
    (lines,) = blocks(TEXT[ROOT / "docs" / "converters.md"], "py")
    assert lines.strip() == READER.replace("NAME", "fitness_hf")
    card = (out / "README.md").read_text()
    assert (
        READER in card and f"Task: {kind}." in card and "head.safetensors" in card.partition("Checksums")[2]
    )
    expected = infer_model(trained.checkpoint, SEQUENCES[:1])[0]
    names: dict[str, object] = {}
    exec(lines.replace('"fitness_hf"', repr(str(out))).replace("MKTAYIAKQR", SEQUENCES[0]), names)
    found = names["predicted"]
    assert isinstance(found, dict) and list(found) == json.loads((out / "head.json").read_text())["names"]
    if kind == "regression":
        assert found["target"] == pytest.approx(expected, abs=1e-4 * abs(expected))
    else:
        assert max(found, key=found.__getitem__) == expected and sum(found.values()) == pytest.approx(1.0)
    # Read back, it is an encoder, and says so.
    assert main(["convert", str(out), str(tmp_path / "again"), "--to", "hf"]) == 0
    assert "dropped: head.json and head.safetensors: the head of a task" in capsys.readouterr().out


def test_what_becomes_of_a_head_is_said_before_training() -> None:
    def notes(kind: str, **task: str) -> str:
        names = ["a", "b"]
        return " ".join(
            export_notes(HeadDescription(TaskConfig(kind=kind, **task), TargetInfo(kind, names), {}))
        )

    assert notes("regression", head="hf") == notes("token_classification") == ""
    assert notes("contact", head="attention_maps") == ""
    assert "writes it as head.safetensors" in notes("multilabel")
    for kind, task in (
        ("contact", {}),
        ("token_classification", {"head": "cnn"}),
        ("regression", {"pooling": "attention"}),
        ("classification", {"head": "tape"}),
    ):
        assert "--drop-head writes the encoder alone: transformers has no equivalent" in notes(kind, **task)
