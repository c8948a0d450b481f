"""Heads of TAPE and ProteinLM: the numbers of their own modules here, and of ours there, in fp64.

TAPE's classes run themselves. ProteinLM's are put together here from modules of PyTorch, by its definition.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esm2mega.finetune.api
from esm2mega.batch import Segments
from esm2mega.checkpoint import layout
from esm2mega.checkpoint.store import load_weights
from esm2mega.cli.app import main
from esm2mega.config.schema import ParallelConfig, TaskConfig
from esm2mega.convert.convert import convert
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.heads import tape_heads
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.convert.verify.verify import verify
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.model.build import build_model
from esm2mega.model.heads import head_of_task
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.initialize import process_groups
from esm2mega.vocabulary import CLS, EOS, encode_residues
from tests import foreign_bert
from tests.parity.references import SEED, randomize

pytest.importorskip("tape", reason="TAPE is not installed: pip install esm2mega[dev]")

H, POSITIONS, CLASSES = foreign_bert.H, 20, 3
SEQUENCES = ["MKTAYIAKQRQISFVK", "LA", "WYVTSAXBUZO"]
TASKS = {
    "regression": "ProteinBertForValuePrediction",
    "classification": "ProteinBertForSequenceClassification",
    "token_classification": "ProteinBertForSequenceToSequenceClassification",
    "contact": "ProteinBertForContactPrediction",
}


def ids_of(sequence: str) -> Tensor:
    return torch.tensor([CLS, *encode_residues(sequence).tolist(), EOS])


def shaken(model: nn.Module) -> Any:
    """Random in every tensor, statistics of batch normalisations included."""
    randomize(model)
    generator = torch.Generator().manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            # 30 blocks would raise what passes through them to any height.
            module.weight.data.mul_(0.05)
    return model.eval()


class ProteinLMContact(nn.Module):
    """Its head for contacts, by the definition: maps of products and differences, 30 residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = nn.Sequential(nn.Dropout(), nn.Conv2d(2 * H, 64, 1))
        for number in range(30):
            block = nn.Module()
            for n in (1, 2):
                setattr(block, f"conv{n}", nn.Conv2d(64, 64, 3, padding=1, bias=False))
                setattr(block, f"bn{n}", nn.BatchNorm2d(64))
            self.predict.add_module(f"ResidualBlock{number}", block)
        self.linear = nn.Sequential(nn.Linear(64, 2))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.cat([x[:, None] * x[None], x[:, None] - x[None]], dim=-1)
        maps = self.predict[1](pairs.permute(2, 0, 1)[None])
        for block in list(self.predict)[2:]:
            inner = block.bn1(block.conv1(maps)).relu()
            maps = (block.bn2(block.conv2(inner)) + maps).relu()
        logits = self.linear(maps[0].permute(1, 2, 0))
        return ((logits + logits.transpose(0, 1)) / 2)[1:-1, 1:-1]


class ProteinLM(nn.Module):
    """A model of ProteinLM: TAPE's modules in its order, and its head under its names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from tape.models import modeling_utils as tape

        self.truth = foreign_bert.truth(torch.float64, positions=POSITIONS)
        head: nn.Module = ProteinLMContact() if kind == "contact" else nn.Module()
        if kind == "regression":
            head.value_prediction = tape.SimpleMLP(H, 1024, 1)
        elif kind == "classification":
            head.classify = tape.SimpleMLP(H, 1024, CLASSES)
        elif kind == "token_classification":
            head.classify = tape.SimpleConv(H, 512, CLASSES)
        self.kind, self.head = kind, shaken(head.double())

    def __call__(self, ids: Tensor) -> Tensor:
        states = foreign_bert.states_preln(self.truth, ids[None], torch.ones_like(ids)[None])[0]
        if self.kind == "contact":
            return self.head(states)
        if self.kind == "token_classification":
            return self.head.classify(states[None])[0, 1:-1]
        return next(iter(self.head.children()))(states[:1])

    def write(self, path: Path) -> Path:
        source = foreign_bert.write_proteinlm(self.truth, path)
        state = torch.load(source / "pytorch_model.bin")
        state = {name: value for name, value in state.items() if not name.startswith("mlm.")}
        prefix = "classify" if self.kind.endswith("classification") else "predict"
        state |= {f"{prefix}.{name}": value for name, value in self.head.state_dict().items()}
        torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        return source


class Tape:
    """A model of TAPE, by its own classes."""

    def __init__(self, kind: str, model: Any = None) -> None:
        from tape.models import modeling_bert

        self.kind, self.type = kind, getattr(modeling_bert, TASKS[kind])
        if model is None:
            config = modeling_bert.ProteinBertConfig(
                hidden_size=H,
                num_hidden_layers=2,
                num_attention_heads=foreign_bert.A,
                intermediate_size=foreign_bert.F,
                max_position_embeddings=POSITIONS,
                num_labels=CLASSES,
            )
            model = shaken(self.type(config).double())
        self.model = model

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        theirs = foreign_bert.tape_ids(ids[None])
        mask = torch.ones_like(theirs)
        if self.kind == "contact":
            return self.model(theirs, torch.tensor([len(ids) - 2]), input_mask=mask)[0][0]
        output = self.model(theirs, input_mask=mask)[0]
        return output[0, 1:-1] if self.kind == "token_classification" else output

    def write(self, path: Path) -> Path:
        (path / "tape").mkdir()
        self.model.save_pretrained(path / "tape")
        return path / "tape"

    def loaded(self, path: Path) -> Tape:
        torch.set_default_dtype(torch.float64)
        try:
            return Tape(self.kind, self.type.from_pretrained(path).eval())
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.fixture
def world() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


@torch.no_grad()
def ours(checkpoint: Path, ids: Tensor) -> Tensor:
    run = layout.read_config(checkpoint)
    run.model.precision = "fp64"
    outputs = layout.read_state(checkpoint)["task"]["names"]
    cpu = torch.device("cpu")
    (model,) = build_model(run.model, ParallelConfig(), cpu, 5, head_of_task(run.task, len(outputs)))
    load_weights(checkpoint, [model])
    return model.eval()(ids, PackedSequences.from_lengths([len(ids)], cpu), Segments.of_protein(ids))


def comparable(output: Tensor, kind: str) -> Tensor:
    """Two classes for all pairs of residues as our logit of a contact for each i < j."""
    if kind != "contact":
        return output
    first, second = torch.triu_indices(len(output), len(output), 1)
    return (output[..., 1] - output[..., 0])[first, second][:, None]


@pytest.mark.some(3)
@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind != "classification"])
@pytest.mark.parametrize("name", ["tape", "proteinlm"])
def test_heads_there_and_here(name: str, kind: str, tmp_path: Path) -> None:
    """fp64, 1e-10 of the largest output: 30 blocks add up some thousand products each. Classes of proteins
    have the head of a regression, with more outputs.
    """
    reference: Any = Tape(kind) if name == "tape" else ProteinLM(kind)
    source = reference.write(tmp_path)
    convert(source, tmp_path / "ours", "esm2mega")
    assert layout.read_config(tmp_path / "ours").task.kind == kind
    convert(tmp_path / "ours", tmp_path / "back", name)
    convert(tmp_path / "back", tmp_path / "again", "esm2mega")
    for sequence in SEQUENCES:
        ids = ids_of(sequence)
        with torch.no_grad():
            expected = comparable(reference(ids), kind)
        found = [ours(tmp_path / "ours", ids), ours(tmp_path / "again", ids)]
        if name == "tape":
            found.append(comparable(reference.loaded(tmp_path / "back")(ids), kind))
        for actual in found:
            assert actual.shape == expected.shape
            assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()
    first, second = (open_weights(tmp_path / x) for x in ("ours", "again"))
    assert first.infos == second.infos and first.description == second.description
    scales = ("head.norm", "head.blocks")
    assert all(torch.equal(first.read(x), second.read(x)) for x in first.infos if not x.startswith(scales))
    # A divisor of 1 is the nearest that its square, the variance, leaves.
    for x in (x for x in first.infos if x.startswith(scales)):
        assert torch.allclose(first.read(x), second.read(x), rtol=1e-15, atol=0)


ATOMS = [[3.8 * min(n, 15 - n), 5.0 * (n > 7), 0.0] for n in range(16)]
LABELS: dict[str, list[Any]] = {
    "regression": [103.5, 99.25, 101.0, 107.0],
    "classification": ["0", "1", "2", "1"],
    "token_classification": ["0120" * 4, "2211" * 4, "0000" * 4, "1012" * 4],
    "contact": [ATOMS] * 4,
}
SMALL = (
    *("data.max_seq_length=20", "train.micro_batch_tokens=64", "train.global_batch_tokens=64"),
    *("train.max_steps=1", "schedule.warmup_steps=0", "task.dropout=0.0"),
)
PRE_LN = (
    *("model.family=proteinbert_preln", "model.final_layernorm=false", "model.max_positions=20"),
    *(
        "model.num_layers=2",
        "model.hidden_size=24",
        "model.num_attention_heads=3",
        "model.ffn_hidden_size=96",
    ),
    *("model.layernorm_epsilon=1e-12", "data.max_seq_length=20", "train.max_steps=2", "train.log_every=1"),
    *("train.micro_batch_tokens=64", "train.global_batch_tokens=64", "schedule.warmup_steps=0"),
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a model of ProteinLM, as its configuration trains it."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "x.fasta").write_text("".join(f">{n}\n{x * 2}\n" for n, x in enumerate(SEQUENCES)))
    words = ["pretrain", f"run_dir={folder / 'run'}", f"data.train={folder / 'x.fasta'}", *PRE_LN]
    assert main([*words, f"data.cache_dir={folder}"]) == 0
    return folder / "run"


def test_what_is_pretrained_here_goes_out_exactly(pretrained: Path, tmp_path: Path) -> None:
    """A final LayerNorm that it does not have is written as none, and read as none."""
    words = ["convert", str(pretrained), str(tmp_path / "out"), "--to", "proteinlm", "--verify"]
    assert main(words) == 0
    report = json.loads((tmp_path / "out.verify.json").read_text())
    assert report["passed"] and report["notes"]["changed"] == [] and report["logits"]["relative"] < 1e-5
    convert(tmp_path / "out", tmp_path / "back", "esm2mega")
    first, second = open_weights(pretrained), open_weights(tmp_path / "back")
    assert first.infos == second.infos and first.description == second.description
    known = sorted(set(range(33)) - {29, 30, 31})
    for name in first.infos:
        a, b = first.read(name), second.read(name)
        is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.bias")
        assert torch.equal(a[known], b[known]) if is_vocabulary else torch.equal(a, b), name
    # ProteinLM's reader finds the LayerNorm that it computes.
    state = torch.load(tmp_path / "out/pytorch_model.bin")
    assert state["bert.encoder.final_ln.weight"].eq(1).all()
    # With a final LayerNorm that counts there is no exact form, which is said and found.
    normed = [word.replace("false", "true") for word in PRE_LN]
    fasta = pretrained.parent / "x.fasta"
    run = tmp_path / "normed"
    words = ["pretrain", f"run_dir={run}", f"data.train={fasta}", f"data.cache_dir={fasta.parent}", *normed]
    assert main(words) == 0
    assert main(["convert", str(run), str(tmp_path / "x"), "--to", "proteinlm", "--verify"]) == 1


@pytest.mark.parametrize(
    "kind",
    [
        "regression",
        pytest.param("classification", marks=pytest.mark.slow),
        "token_classification",
        pytest.param("contact", marks=pytest.mark.slow),
    ],
)
def test_what_is_finetuned_here_goes_out(pretrained: Path, kind: str, tmp_path: Path) -> None:
    """With its head, in units of the labels; the verification computes both sides on its own."""
    settings = [*SMALL, f"run_dir={tmp_path / 'run'}", f"init_from={pretrained}", f"task.kind={kind}"]
    train = [("LAGVSERTIDPKQNFY", label) for label in LABELS[kind]]
    trained = esm2mega.finetune.api.train_model([*settings, "task.head=proteinlm"], train=train)
    conversion = convert(trained.checkpoint, tmp_path / "out", "proteinlm")
    lines = verify(conversion)
    assert lines[0] == "source run by esm2mega, target by plain PyTorch"
    assert json.loads((tmp_path / "out.verify.json").read_text())["logits"]["scale"] > 0
    info = layout.read_state(trained.checkpoint)["task"]
    found = open_weights(tmp_path / "out").description.task
    assert found is not None and found.info.names == info["names"]
    if kind == "regression":
        assert info["mean"][0] > 100 and any("scale of the labels" in x for x in conversion.notes.changed)
        predicted = esm2mega.finetune.api.infer_model(trained.checkpoint, SEQUENCES[1:])
        convert(tmp_path / "out", tmp_path / "back", "esm2mega")
        again = esm2mega.finetune.api.infer_model(tmp_path / "back", SEQUENCES[1:])
        assert predicted == pytest.approx(again, rel=1e-6)
        convert(trained.checkpoint, tmp_path / "bare", "proteinlm", drop_head=True)
        assert open_weights(tmp_path / "bare").description.head is None
    with pytest.raises(UserError, match="family proteinbert_preln"):
        convert(trained.checkpoint, tmp_path / "tape", "tape")
    # A verification that only ever passes would show nothing.
    file = tmp_path / "out" / "pytorch_model.bin"
    state = torch.load(file)
    (name,) = [x for x in state if x.endswith(("main.3.bias", "main.4.bias", "linear.0.bias"))]
    state[name] = state[name] + torch.arange(1, len(state[name]) + 1) * 0.1
    torch.save(state, file)
    with pytest.raises(Exception, match="verification failed"):
        verify(conversion)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "mlp"}, "proteinlm has no equivalent of task.head=mlp for task.kind=regression"),
        ({"head": "tape"}, "no equivalent of task.head=tape .* train with task.head=proteinlm"),
        ({"kind": "multilabel"}, "no equivalent of task.head=proteinlm for task.kind=multilabel"),
        ({"hidden_size": 7}, "task.hidden_size=7: proteinlm has 1024 in this head"),
        ({"target_columns": ["a", "b"]}, "proteinlm predicts one of them; train on one column"),
        ({"dropout": 0.0}, "no equivalent of a user's own head"),
    ],
)
def test_heads_without_an_equal(change: dict[str, Any], message: str) -> None:
    task = replace(TaskConfig(kind="regression", head="proteinlm"), **change)
    shapes = tape_heads.shapes_of(tape_heads.HEADS["proteinlm"][0], H, 1)
    if "dropout" in change:
        shapes |= {"head.gate": (H,)}
    columns = task.target_columns
    info = TargetInfo("regression", columns, mean=[0.0] * len(columns), std=[1.0] * len(columns))
    with pytest.raises(UserError, match=message):
        tape_heads.equal_head(HeadDescription(task, info, shapes), "proteinlm")
