"""Model cards of each kind of model: what they say is what is known, and what they tell to type works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.cli.app import main
from esm2mega.config.presets import ModelShape
from esm2mega.config.schema import LoRAConfig, Run, TaskConfig
from esm2mega.convert.checksum import foreign_sha256, weights_sha256
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.heads.hf_classifiers import SEQUENCE, TOKEN, shapes_of
from esm2mega.convert.history import DataSet, History, as_record, history_of
from esm2mega.convert.lazy_weights import Description, HeadDescription
from esm2mega.convert.model_card import CARD, Card, card_text
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.data.store.token_store import TokenStore
from esm2mega.files import content_sha256
from esm2mega.finetune.api import TrainedModel, train_model
from esm2mega.report.log import read_log
from tests import foreign
from tests.infer_models import LETTERS
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS

pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
hub = pytest.importorskip("huggingface_hub")

RNG = np.random.default_rng(8)
SEQUENCES = ["".join(RNG.choice(list(LETTERS), n)) for n in RNG.integers(4, 50, 12)]
# As the column of a file may name them.
CLASSES = ["good|bad", "<script>alert(1)</script>", "*x*"]
NUMBERS = [40.0 + text.count("K") for text in SEQUENCES]
FLAGS = [CLASSES[number % 3] for number in range(len(SEQUENCES))]
RESIDUES = ["".join("HE"[letter in "AGVIL"] for letter in text) for text in SEQUENCES]


def train(finished: TinyRun, folder: Path, kind: str, labels: list[Any], *more: str) -> TrainedModel:
    settings = [*SETTINGS, f"run_dir={folder}", f"init_from={finished.run_dir}", f"task.kind={kind}"]
    pairs = list(zip(SEQUENCES, labels, strict=True))
    return train_model([*settings, "train.max_steps=2", *more], train=pairs[:8], valid=pairs[8:])


def converted(source: str | Path, target: Path, *options: str) -> str:
    assert main(["convert", str(source), str(target), "--to", "hf", *options]) == 0
    return (target / CARD).read_text()


def rows_of(card: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its first two lines."""
    section = card.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    table = section.partition("\n| ")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[2:]]


def check_sound(card: str, folder: Path, pipeline: str, library: str = "transformers") -> Any:
    """The front matter is as the Hub reads it, the checksums hold, and nothing leads to this machine."""
    front = hub.ModelCard(card).data
    assert (front.pipeline_tag, front.library_name) == (pipeline, library)
    assert {"esm2", "protein", "esm2mega"} <= set(front.tags)
    listed = {name.strip("`"): digest.strip("`") for name, digest in rows_of(card, "Checksums")}
    assert listed == {path.name: content_sha256(path) for path in folder.iterdir() if path.name != CARD}
    assert str(folder.parent) not in card and "None" not in card and "nan" not in card
    return front


def check_use(card: str, folder: Path, base: Path | None = None) -> torch.Tensor:
    """The program and the commands of the card run as they stand there."""
    places = {"NAME": str(folder), "BASE": str(base)}

    def placed(text: str) -> str:
        return re.sub(r"\b(NAME|BASE)\b", lambda found: places[found[0]], text)

    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    commands = re.search(r"```bash\n(.*?)```", card, re.DOTALL)
    assert program is not None and commands is not None
    values: dict[str, Any] = {}
    with torch.no_grad():
        exec(placed(program[1]), values)
    Path("proteins.fasta").write_text(">a\nMKTAYIAKQR\n")
    for line in commands[1].splitlines():
        name, *arguments = shlex.split(placed(line))
        assert name == "esm2mega" and main(arguments) == 0, line
    return values["outputs"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_pretrained_model(finished: TinyRun, tmp_path: Path) -> None:
    card = converted(finished.run_dir, tmp_path / "mine", "--license", "apache-2.0", "--dtype", "fp32")
    front = check_sound(card, tmp_path / "mine", "fill-mask")
    assert front.license == "apache-2.0"
    assert "# mine\n\nAn ESM-2 protein language model, trained with esm2mega" in card
    store, (training, validation) = TokenStore(finished.train), rows_of(card, "Training data")
    assert training == ["training", "train", f"{len(store)}", f"{int(store.lengths.sum()):,}"]
    valid = TokenStore(finished.valid)
    assert validation == ["validation", "valid", f"{len(valid)}", f"{int(valid.lengths.sum()):,}"]
    assert f"random.fasta | `{store.manifest['sources'][0]['sha256']}`" in card
    recipe = dict(rows_of(card, "Training"))
    assert recipe["optimizer steps"] == "4 of 4" and recipe["tokens per step"] == "256"
    assert recipe["learning rate"] == "0.002, constant, 0 steps of warmup"
    assert recipe["parallel layout"] == "tensor 1, pipeline 1"
    measured = {name.replace("\\", ""): value for name, value in rows_of(card, "Evaluation")}
    (record,) = (
        r for r in read_log(finished.run_dir / "log.jsonl") if r["kind"] == "eval" and r["step"] == 4
    )
    assert measured["valid_loss"] == f"{record['valid_loss']:.4f}"
    assert check_use(card, tmp_path / "mine").shape[-1] == 33


def test_what_is_not_known_any_more_is_left_out(finished: TinyRun, tmp_path: Path) -> None:
    """A checkpoint without its run: what else it names is not opened, so it may be gone or another one."""
    checkpoint = tmp_path / "moved"
    shutil.copytree(choose_checkpoint(finished.run_dir).path, checkpoint)
    whole = converted(finished.run_dir, tmp_path / "whole")
    config = (checkpoint / "config.yaml").read_text()
    assert f"{len(TokenStore(finished.train))}" in rows_of(whole, "Training data")[0]
    stored = finished.train.parent
    moved = stored.with_name("elsewhere")
    for other in (None, finished.valid):
        stored.rename(moved)
        try:
            if other is not None:
                shutil.copytree(moved / "valid", stored / "train")
            card = converted(checkpoint, tmp_path / f"part-{other is None}")
        finally:
            shutil.rmtree(stored, ignore_errors=True)
            moved.rename(stored)
        assert rows_of(card, "Training data") == rows_of(whole, "Training data"), "the checkpoint says it"
        assert "random.fasta" in card and "valid\\_perplexity" not in card
        assert "valid\\_loss" in card, "this one is in the checkpoint"
        assert "No licence was stated" in card and not re.search(r"^license:", card, re.MULTILINE)
    assert config == (checkpoint / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("kind", "labels", "head", "width", "known"),
    [
        ("regression", NUMBERS, "hf", 1, "units of the labels"),
        pytest.param("classification", FLAGS, "hf", 3, r"\<script\>alert(1)", marks=pytest.mark.slow),
        pytest.param("token_classification", RESIDUES, "auto", 2, "| 0 | E |", marks=pytest.mark.slow),
    ],
)
def test_fine_tuned_models(
    kind: str, labels: list[Any], head: str, width: int, known: str, finished: TinyRun, tmp_path: Path
) -> None:
    train(finished, tmp_path / "run", kind, labels, f"task.head={head}")
    card = converted(tmp_path / "run", tmp_path / "mine", "--dtype", "fp32")
    check_sound(card, tmp_path / "mine", f"{'token' if kind.startswith('token') else 'text'}-classification")
    assert known in card and "fine-tuned with esm2mega" in card
    counts = [[use, number, residues] for use, _, number, residues in rows_of(card, "Training data")]
    assert counts == [
        ["training", "8", f"{sum(map(len, SEQUENCES[:8]))}"],
        ["validation", f"{len(labels) - 8}", f"{sum(map(len, SEQUENCES[8 : len(labels)]))}"],
    ]
    outputs = rows_of(card, "What it predicts")
    assert len(outputs) == width and len({len(row) for row in outputs}) == 1
    assert dict(rows_of(card, "Training"))["trained weights"] == "all"
    assert check_use(card, tmp_path / "mine").shape[-1] == width


def test_a_head_that_is_dropped_takes_its_metrics_along(finished: TinyRun, tmp_path: Path) -> None:
    train(finished, tmp_path / "run", "regression", NUMBERS, "task.head=hf")
    card = converted(tmp_path / "run", tmp_path / "mine", "--drop-head")
    check_sound(card, tmp_path / "mine", "feature-extraction")
    assert "An ESM-2 protein encoder, fine-tuned with esm2mega" in card and "What it predicts" not in card
    assert "head of the task is not in this model" in card
    assert "valid\\_loss" not in card
    notes = card.partition("## Conversion\n\n")[2].partition("\n\n")[0]
    assert "as asked for" in notes and check_use(card, tmp_path / "mine").shape[-1] == 24


HOSTILE: list[dict[str, Any]] = [
    {"data": {}},
    {layout.DATA_SETS: 5},
    {layout.DATA_SETS: [{}]},
    {"valid_loss": "abc"},
    {"data": None, "origin": {"training": 5}},
    {"data": None, "origin": {"training": {}}},
]


@pytest.mark.parametrize("change", [*HOSTILE, "step", "samples", "use", "metrics", "config", "rank"])
def test_a_training_that_no_run_has_written_is_one_line(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any] | str
) -> None:
    """By hand, with a valid checksum of the state and no digests."""
    checkpoint = shutil.copytree(choose_checkpoint(finished.run_dir).path, tmp_path / "checkpoint")
    state = {name: value for name, value in layout.read_state(checkpoint).items() if name != "sha256"}
    if isinstance(change, str):
        known = history_of(checkpoint)
        assert known is not None
        record = json.loads(json.dumps(as_record(known)))
        wrong: dict[str, Any] = {"step": "x", "samples": None, "metrics": {"valid": {"a": [1]}}}
        if change in wrong:
            record[change] = wrong[change]
        elif change == "use":
            record["data"][0]["use"] = "x"
        else:
            settings = yaml.safe_load(record["config"])
            section, key, value = {"config": ("optim", "betas", [0.9]), "rank": ("lora", "rank", 0)}[change]
            settings[section][key] = value
            record["config"] = yaml.safe_dump(settings)
        change = {"data": None, "origin": {"training": record}}
    layout.write_state(checkpoint, {**state, **change})
    (checkpoint / "digests.json").unlink()
    (checkpoint / layout.COMPLETE).write_text("")
    assert main(["convert", str(checkpoint), str(tmp_path / "mine"), "--to", "hf"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("esm2mega: error: ") and "internal" not in error
    assert not (tmp_path / "mine").exists()


def test_a_copy_keeps_the_history(finished: TinyRun, tmp_path: Path) -> None:
    assert main(["convert", str(finished.run_dir), str(tmp_path / "copy"), "--to", "esm2mega"]) == 0
    card, again = converted(finished.run_dir, tmp_path / "a"), converted(tmp_path / "copy", tmp_path / "b")
    for heading in ("Training data", "Training", "Evaluation"):
        assert rows_of(again, heading) == rows_of(card, heading) != []


@pytest.mark.slow
def test_adapters_merged_and_beside(finished: TinyRun, tmp_path: Path) -> None:
    lora = ("finetune.mode=lora", "lora.rank=2", "task.head=hf")
    train(finished, tmp_path / "run", "regression", NUMBERS, *lora)
    assert main(["lora", "merge", "run", "--out", "whole"]) == 0
    card = converted("whole", tmp_path / "mine", "--dtype", "fp32")
    check_sound(card, tmp_path / "mine", "text-classification")
    recipe = dict(rows_of(card, "Training"))
    assert recipe["adapters"] == "merged into the weights" and recipe["LoRA"].startswith("rank 2, scale 1")
    check_use(card, tmp_path / "mine")
    Path("predictions.csv").unlink()
    shutil.rmtree("run")
    again = converted("whole", tmp_path / "later", "--dtype", "fp32")
    for heading in ("Training data", "Training", "What it predicts", "Evaluation"):
        assert rows_of(again, heading) == rows_of(card, heading), "the merged checkpoint holds it"

    train(finished, tmp_path / "run", "regression", NUMBERS, *lora)
    converted(finished.run_dir, tmp_path / "base", "--dtype", "fp32")
    assert main(["lora", "export", "run", "--out", "beside", "--license", "mit"]) == 0
    card = (tmp_path / "beside" / CARD).read_text()
    front = check_sound(card, tmp_path / "beside", "text-classification", "peft")
    assert front.license == "mit" and "lora" in front.tags
    assert "LoRA adapters of an ESM-2 model for regression of proteins, fine-tuned with" in card
    pytest.importorskip("peft", reason="peft is not installed: pip install esm2mega[hf]")
    assert check_use(card, tmp_path / "beside", tmp_path / "base").shape == (1, 1)


def heads() -> dict[str, tuple[Any, str, str]]:
    """What a card describes: its head, the class of transformers, and the pipeline."""

    def of(kind: str, head: str, architecture: str, names: list[str]) -> HeadDescription:
        info = TargetInfo(kind, names, [5] * len(names))
        return HeadDescription(
            TaskConfig(kind=kind, head=head), info, shapes_of(architecture, 24, len(names))
        )

    return {
        "lm": ("lm", "EsmForMaskedLM", "fill-mask"),
        "none": (None, "EsmModel", "feature-extraction"),
        "regression": (of("regression", "hf", SEQUENCE, ["a|b"]), SEQUENCE, "text-classification"),
        "multilabel": (of("multilabel", "hf", SEQUENCE, CLASSES), SEQUENCE, "text-classification"),
        "residues": (of("token_classification", "auto", TOKEN, ["H", "E"]), TOKEN, "token-classification"),
    }


HUB = "/home/me/.cache/huggingface/hub/models--facebook--esm2_t6_8M_UR50D/snapshots/c731"


@pytest.mark.parametrize(
    ("start", "name"), [(HUB, "facebook/esm2_t6_8M_UR50D"), ("/home/me/esm2_8M", None), (None, None)]
)
def test_the_hub_is_told_what_a_model_was_made_from(start: str | None, name: str | None) -> None:
    history = History(Run(init_from=start), "1.2.3", 7, 30, 900)
    card = Card("mine", Description(ModelShape(2, 24, 56, 3), 1e-5, head="lm"), history=history)
    assert hub.ModelCard(card_text(card, {"model.safetensors": "0" * 64})).data.base_model == name


@pytest.mark.parametrize("base", [None, "esm2_8M"])
@pytest.mark.parametrize("head", heads())
def test_the_text_of_every_kind_of_card(head: str, base: str | None) -> None:
    described, architecture, pipeline = heads()[head]
    kind = {} if not isinstance(described, HeadDescription) else {"task": described.task}
    run = Run(lora=LoRAConfig(rank=4, alpha=8.0), init_from="/home/me/esm2_8M", **kind)
    adapters = None if base is None else "beside"
    history = History(run, "1.2.3", 7, 30, 900, data=[DataSet("train", "mine.csv")], adapters=adapters)
    card = card_text(
        Card("mine", Description(ModelShape(2, 24, 56, 3), 1e-5, head=described), history=history, base=base),
        {"model.safetensors": "0" * 64},
    )
    front = hub.ModelCard(card).data
    assert (front.pipeline_tag, front.library_name) == (pipeline, "transformers" if base is None else "peft")
    assert f"import AutoTokenizer, {architecture}\n" in card and f"{architecture}.from_pretrained(" in card
    assert ("from peft import PeftModel" in card) == (base is not None)
    assert "with esm2mega 1.2.3 on Megatron-Core" in card and "/home/me" not in card
    recipe = dict(rows_of(card, "Training"))
    assert recipe["LoRA"].startswith("rank 4, scale 2") and recipe["started from"] == "esm2\\_8M"
    if kind:
        outputs = rows_of(card, "What it predicts")
        assert [row[0] for row in outputs] == [str(n) for n in range(described.info.num_outputs)]
        assert {row[2] for row in outputs} == {"5"} and "<script>" not in card


def test_a_model_from_elsewhere_has_no_history(tmp_path: Path) -> None:
    source = foreign.write_hf(foreign.truth(torch.float32), tmp_path)
    card = converted(source, tmp_path / "mine")
    check_sound(card, tmp_path / "mine", "fill-mask")
    assert "converted from a directory of Hugging Face by esm2mega" in card
    assert "nothing is recorded of its training" in card
    headings = re.findall(r"^## (.*)", card, re.MULTILINE)
    assert headings in (
        ["How to use it", "Licence", "Checksums"],
        ["How to use it", "Conversion", "Licence", "Checksums"],
    )


def results(path: Path, weights: str) -> Path:
    """What `esm2mega autoeval` writes, as far as the card reads it."""
    row = {"row": "model", "mode": "probe", "value": 0.5, "low": 0.4, "high": None, "metric": "spearman"}
    path.mkdir()
    content = {
        "models": [
            {"name": "other", "weights_sha256": "0" * 64},
            {"name": "mine", "weights_sha256": weights},
        ],
        "tasks": [
            {
                "task": "gb1",
                "metric": "spearman",
                "num_proteins": {"test": 1234},
                "rows": [
                    {**row, "model": "other"},
                    {**row, "model": "mine", "value": 0.625, "low": 0.5, "high": 0.75},
                    {"row": "baseline", "baseline": "mean", "value": 0.1, "low": None, "high": None},
                ],
            }
        ],
    }
    (path / "results.json").write_text(json.dumps(content))
    return path


def test_benchmarks_of_these_weights(finished: TinyRun, tmp_path: Path, capsys: Any) -> None:
    own = weights_sha256(choose_checkpoint(finished.run_dir).path)
    card = converted(finished.run_dir, tmp_path / "mine", "--results", str(results(tmp_path / "r", own)))
    assert "| gb1 | probe | spearman | 0.6250 | 0.5000 to 0.7500 | 1,234 |" in card
    theirs = foreign_sha256(open_weights(tmp_path / "mine", "hf"))
    again = converted(tmp_path / "mine", tmp_path / "two", "--results", str(results(tmp_path / "s", theirs)))
    assert "| gb1 | probe | spearman | 0.6250 |" in again
    for number, (folder, options, message) in enumerate(
        (
            (results(tmp_path / "t", "1" * 64), ["--to", "hf"], "none of its models has the weights"),
            (tmp_path / "mine", ["--to", "hf"], "holds no results of `esm2mega autoeval`"),
            (tmp_path / "r", ["--to", "esm2mega"], "--results is for the model card of --to hf"),
        )
    ):
        out = str(tmp_path / f"no-{number}")
        assert main(["convert", str(finished.run_dir), out, *options, "--results", str(folder)]) == 2
        assert message in capsys.readouterr().err and not Path(out).exists()
    assert main(["convert", "x", "y", "--to", "hf", "--license", "Apache 2"]) == 2
    assert "write it as apache-2.0" in capsys.readouterr().err
