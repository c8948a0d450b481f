"""The contact head of a published model: it is trained further as the head of a task, and goes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import esm2mega.finetune.api
from esm2mega.checkpoint.tensors import TensorReader
from esm2mega.cli.app import main
from esm2mega.convert.convert import convert
from esm2mega.convert.files.vocabulary import write_tokenizer
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.heads.contact_head import BIAS, WEIGHT, as_published
from esm2mega.convert.model_card import CARD
from esm2mega.convert.verify.verify import verify
from esm2mega.errors import MachineError, UserError
from esm2mega.finetune.api import TrainedModel, infer_model, train_model
from tests.parity import references
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "LAGVSERTIDPKQNFYMHWC"]
ATOMS = [[[3.8 * min(n, len(s) - n), 5.0 * (2 * n > len(s)), 0.0] for n in range(len(s))] for s in SEQUENCES]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of transformers with a random contact head; read only."""
    folder = tmp_path_factory.mktemp("published")
    references.hugging_face(references.Shape()).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def expected_contacts(path: Path) -> list[np.ndarray]:
    """Of transformers, with its own tokenizer; ``[l, l]`` each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.EsmModel.from_pretrained(path, attn_implementation="eager").eval()
    found = []
    for sequence in SEQUENCES:
        tokens = tokenizer(sequence, return_tensors="pt")
        with torch.no_grad():
            found.append(model.predict_contacts(tokens["input_ids"], tokens["attention_mask"])[0].numpy())
    return found


def settings(published: Path, folder: Path) -> list[str]:
    batches = ["data.max_seq_length=64", "train.micro_batch_tokens=64", "train.global_batch_tokens=128"]
    schedule = ["schedule.warmup_steps=0", "optim.lr=0.02", "train.eval_every=0", "finetune.load_head=true"]
    task = ["task.kind=contact", "task.head=attention_maps", "train.max_steps=1"]
    return [f"run_dir={folder}", f"init_from={published}", *task, *batches, *schedule]


def train(published: Path, folder: Path, *changes: str) -> TrainedModel:
    return train_model(
        [*settings(published, folder), *changes], train=list(zip(SEQUENCES, ATOMS, strict=True))
    )


def close(found: Any, expected: list[np.ndarray]) -> None:
    """Off the diagonal, which is no pair; 1e-5: fp32 in another order."""
    for ours, theirs in zip(found, expected, strict=True):
        first, second = np.triu_indices(len(theirs), 1)
        np.testing.assert_allclose(ours[first, second], theirs[first, second], rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["hf", "fair-esm", "esm2mega"])
def test_it_starts_as_published(
    published: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever format it comes in: a step of nearly no size leaves what transformers predicts."""
    path = published
    if source != "hf":
        path = tmp_path / ("esm2_x.pt" if source == "fair-esm" else "ours")
        if source == "fair-esm":
            shape = references.Shape(ffn_hidden_size=160)
            references.hugging_face(shape).save_pretrained(tmp_path / "hf")
            write_tokenizer(tmp_path / "hf")
            published = tmp_path / "hf"
        convert(published, path, source)
    capsys.readouterr()
    trained = train(path, tmp_path / "run", "optim.lr=1e-12")
    assert "init_from contact head: the start of the head\n" in capsys.readouterr().err
    close(infer_model(trained.checkpoint, SEQUENCES), expected_contacts(published))


@pytest.mark.some(1)
@pytest.mark.parametrize("mode", ["full", "frozen", "lora"])
def test_it_goes_back_as_trained(published: Path, mode: str, tmp_path: Path) -> None:
    """Into an `EsmModel` of transformers, and into the contacts of `embed`."""
    adapters = ["lora.rank=3"] if mode == "lora" else []
    trained = train(published, tmp_path / "run", f"finetune.mode={mode}", *adapters, "train.max_steps=4")
    found = infer_model(trained.checkpoint, SEQUENCES)
    pairs = np.triu_indices(len(SEQUENCES[0]), 1)
    assert np.abs(found[0][pairs] - expected_contacts(published)[0][pairs]).max() > 1e-2
    with esm2mega.load(trained.checkpoint) as embedder:
        close(embedder.contacts(SEQUENCES), found)
    whole = trained.checkpoint
    if mode == "lora":
        whole = tmp_path / "merged"
        assert main(["lora", "merge", str(trained.checkpoint), "--out", str(whole)]) == 0
    report = convert(whole, tmp_path / "hf", "hf")
    assert "contact head: equal" in verify(report)[1]
    assert report.notes.changed == ["head of the task: now the contact head"]
    assert any(line.startswith("contact_head.regression.*: that of before") for line in report.notes.dropped)
    close(found, expected_contacts(tmp_path / "hf"))
    # The card says what the head was trained for, and its program predicts contacts.
    card = (tmp_path / "hf" / CARD).read_text()
    assert "An ESM-2 model for contact prediction of proteins" in card and "Task: contact." in card
    assert "head of the task: now the contact head" in card
    program = card.partition("```python\n")[2].partition("```")[0]
    values: dict[str, Any] = {}
    with torch.no_grad():
        exec(program.replace("NAME", str(tmp_path / "hf")), values)
    assert values["outputs"].shape == (1, 76, 76) and "--include contacts" in card
    assert open_weights(tmp_path / "hf").description.head is None
    file = tmp_path / "hf" / "model.safetensors"
    state = load_file(file)
    state["esm.contact_head.regression.weight"] = state["esm.contact_head.regression.weight"].flip(1)
    save_file(state, tmp_path / "hf" / "flipped")
    original = file.read_bytes()
    (tmp_path / "hf" / "flipped").rename(file)
    with pytest.raises(MachineError, match="verification failed: .*contact head: different"):
        verify(report)
    file.write_bytes(original)
    # And from there once more.
    again = train(tmp_path / "hf", tmp_path / "again", "optim.lr=1e-12")
    close(infer_model(again.checkpoint, SEQUENCES), found)


def test_a_start_at_zero_is_said(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train(published, tmp_path / "run", "finetune.load_head=false", "optim.lr=1e-12")
    assert "contact head: not the start, which is zero; finetune.load_head=true" in capsys.readouterr().err
    close(infer_model(trained.checkpoint, SEQUENCES), [np.full((len(s), len(s)), 0.5) for s in SEQUENCES])


def test_weights_decay_and_the_bias_does_not(published: Path, tmp_path: Path) -> None:
    """Decay is decoupled: two runs of a step differ by lr x decay x the weights before it, and by no more."""
    before = open_weights(published)
    after = []
    for decay in (0.0, 0.5):
        settings = ["finetune.mode=frozen", "optim.lr=0.1", f"optim.weight_decay={decay}"]
        trained = train(published, tmp_path / f"run{decay}", *settings)
        after.append(as_published(TensorReader(trained.checkpoint).read, references.Shape().num_layers))
    for name, factor in ((WEIGHT, 0.1 * 0.5), (BIAS, 0.0)):
        lost = after[0][name] - after[1][name]
        assert torch.allclose(lost, factor * before.read(name), rtol=0, atol=1e-6), name


def test_a_model_without_one_is_refused(published: Path, tmp_path: Path) -> None:
    bare = references.hugging_face(references.Shape())
    torch.nn.init.zeros_(bare.esm.contact_head.regression.weight)
    torch.nn.init.zeros_(bare.esm.contact_head.regression.bias)
    bare.save_pretrained(tmp_path / "bare")
    convert(tmp_path / "bare", tmp_path / "ours", "esm2mega")
    for path in (tmp_path / "bare", tmp_path / "ours"):
        with pytest.raises(UserError, match=r"has no contact head; set finetune.load_head=false"):
            train(path, tmp_path / "run")
    with pytest.raises(UserError, match="has no head of a task"):
        train(published, tmp_path / "run", "task.head=product")


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_every_stage_of_a_pipeline_takes_its_layers(published: Path, tmp_path: Path) -> None:
    table = tmp_path / "train.jsonl"
    rows = [{"sequence": s, "target": atoms} for s, atoms in zip(SEQUENCES, ATOMS, strict=True)]
    table.write_text("\n".join(map(json.dumps, rows)))
    command = ["-m", "esm2mega", "finetune", f"data.train={table}", *settings(published, tmp_path / "run")]
    command += ["optim.lr=1e-12", "parallel.pipeline_model_parallel_size=3", "checkpoint.save_every=1"]
    run_ranks(command, 3, tmp_path / "output")
    close(infer_model(tmp_path / "run", SEQUENCES), expected_contacts(published))


def test_adapters_are_not_used_over_another_contact_head(published: Path, tmp_path: Path) -> None:
    base = shutil.copytree(published, tmp_path / "base")
    trained = train(base, tmp_path / "run", "finetune.mode=lora", "lora.rank=3")
    assert infer_model(trained.checkpoint, SEQUENCES[:1])
    file = base / "model.safetensors"
    state = load_file(file)
    state["esm.contact_head.regression.bias"] = state["esm.contact_head.regression.bias"] + 1
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match="its adapters were trained on, but another contact head"):
        infer_model(trained.checkpoint, SEQUENCES[:1])
