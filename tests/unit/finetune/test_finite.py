"""A fine-tuned model that gives NaN is refused everywhere; metrics that are undefined stay so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.finetune.api import evaluate_model, infer_model, train_model
from esm2mega.vocabulary import VOCAB
from tests.checkpoints import changed_weights
from tests.infer_models import random_proteins, write_fasta
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

SEQUENCES = [text.replace("W", "A") for text in random_proteins([20, 31, 9, 40], seed=4)]
WITH_W = [*SEQUENCES[:2], "MKWAYRST", *SEQUENCES[2:]]
"""Tryptophan in number 2 alone."""

KINDS: dict[str, list[Any]] = {
    "regression": [0.5, -1.0, 2.0, 0.1],
    "token_classification": ["HEC"[i % 3] * len(s) for i, s in enumerate(SEQUENCES)],
    "contact": [[[3.0 * i, 0.0, 0.0] for i in range(len(s))] for s in SEQUENCES],
}


def _label(kind: str, sequence: str) -> Any:
    labels = {"token_classification": "H", "regression": 1.0, "contact": [[0.0, 0.0, 0.0]]}
    label = labels[kind]
    return label * len(sequence) if kind in ("token_classification", "contact") else label


def _nan(table: torch.Tensor) -> None:
    table[VOCAB.index("W")] = torch.nan


@pytest.fixture(scope="module", params=KINDS)
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("damaged")
    settings = [*SETTINGS, f"task.kind={request.param}", f"run_dir={folder / 'run'}", "train.max_steps=1"]
    pairs = list(zip(SEQUENCES, KINDS[request.param], strict=True))
    checkpoint = train_model(settings, train=pairs).checkpoint
    changes = {"embedding.word_embeddings.weight": _nan}
    return request.param, changed_weights(checkpoint, folder / "damaged", changes)


def test_predict_evaluate_and_compare(
    damaged: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, checkpoint = damaged
    fasta = write_fasta(tmp_path / "x.fasta", [(f"p{i}", text) for i, text in enumerate(WITH_W)])
    rows = [{"id": f"p{i}", "sequence": s, "target": _label(kind, s)} for i, s in enumerate(WITH_W)]
    table = tmp_path / "x.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outs = [tmp_path / "out.h5", tmp_path / "out.json"]
    commands = [["predict", str(checkpoint), str(fasta), "--out", str(outs[0])]]
    evaluated = ["--data", str(table), "--out", str(outs[1])]
    commands.append(["evaluate", str(checkpoint), *evaluated])
    if kind == "regression":
        commands.append(["compare", str(checkpoint), str(checkpoint), *evaluated])
        commands.append([*commands[0][:-1], str(tmp_path / "out.csv")])
    for command in commands:
        assert main(command) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("esm2mega: error: p2: its prediction has values that are not finite"), said
        assert f"`esm2mega inspect {checkpoint}`" in said
        assert not any(path.exists() for path in (*outs, tmp_path / "out.csv"))
        assert not list(tmp_path.rglob("done.*"))
    write_fasta(fasta, [("p", SEQUENCES[0])])
    assert main([*commands[0], "--overwrite"]) == 0


def test_from_python(damaged: tuple[str, Path]) -> None:
    kind, checkpoint = damaged
    with pytest.raises(UserError, match="its prediction has values that are not finite"):
        infer_model(checkpoint, WITH_W)
    with pytest.raises(UserError, match="its prediction has values that are not finite"):
        evaluate_model(checkpoint, [(text, _label(kind, text)) for text in WITH_W])
    assert len(infer_model(checkpoint, SEQUENCES)) == len(SEQUENCES)
    if kind == "regression":  # the correlation with labels that are all equal is not defined, and no error
        numbers = evaluate_model(checkpoint, [(text, 1.0) for text in SEQUENCES])
        assert numbers["spearman"] is None and numbers["loss"] > 0
