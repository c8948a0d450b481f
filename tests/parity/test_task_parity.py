"""Heads against `EsmForSequenceClassification`, `EsmForTokenClassification` and, for several targets, plain
PyTorch; with gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from esm2mega.batch import LabelledBatch
from esm2mega.checkpoint import layout
from esm2mega.checkpoint.store import load_weights
from esm2mega.config.schema import DataConfig, ParallelConfig, TaskConfig
from esm2mega.convert.convert import convert
from esm2mega.convert.formats import hf
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.heads.hf_classifiers import head_rows
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.data.labels.stream import LabelledPacks
from esm2mega.data.stream.build import BatchSpec
from esm2mega.finetune.losses import loss_of_task
from esm2mega.model.build import build_model
from esm2mega.model.heads import head_of_task
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.initialize import process_groups
from esm2mega.vocabulary import encode_residues
from tests import foreign
from tests.parity import references
from tests.parity.references import Shape
from tests.task_batches import proteins_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")

CLASSES = 5
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "LAGVSERTIDPKQNFYMHWCXBUZO", "MK", "GGSSGLLPWYKKTTRRAAHHCC" * 3]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Relative to the largest value, as for the masked language model: some 80 epsilons of fp32."""


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


@dataclass(frozen=True)
class Reference:
    """A model with a head: the directory that it was written to, what it computes, and the gradients of all
    its parameters under the names of transformers.
    """

    path: Path
    shape: Shape
    logits: Callable[[Tensor, Tensor], Tensor]
    gradients: Callable[[], dict[str, Tensor]]


def whole_model(kind: str, folder: Path) -> Reference:
    """fp32: a model of transformers, saved by itself."""
    config = references.hugging_face(Shape()).config
    config.num_labels = CLASSES
    classes = {
        "sequence": transformers.EsmForSequenceClassification,
        "token": transformers.EsmForTokenClassification,
    }
    model = classes[kind](config)
    references.randomize(model)
    model.eval().save_pretrained(folder / "hf")

    def gradients() -> dict[str, Tensor]:
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    return Reference(
        folder / "hf", Shape(), lambda ids, mask: model(ids, attention_mask=mask).logits, gradients
    )


def in_fp64(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reference:
    """transformers' head on fair-esm's encoder: its own has rotary positions and token dropout in fp32,
    whatever the precision of the model.
    """
    from transformers.models.esm.modeling_esm import EsmClassificationHead

    monkeypatch.setattr(
        "esm.multihead_attention.utils_softmax", lambda x, dim, onnx_trace=False: torch.softmax(x, dim)
    )
    encoder = foreign.truth(torch.float64)
    config = transformers.EsmConfig(hidden_size=foreign.H, num_labels=CLASSES, hidden_dropout_prob=0.0)
    head = EsmClassificationHead(config) if kind == "sequence" else torch.nn.Linear(foreign.H, CLASSES)
    references.randomize(head.double())

    def named(values: dict[str, Tensor], of_head: dict[str, Tensor]) -> dict[str, Tensor]:
        state: Any = SimpleNamespace(state=values)
        tensors = {n: x for n, x in foreign.hf_state(state).items() if not n.startswith("lm_head.")}
        return tensors | {f"classifier.{name}": x for name, x in of_head.items()}

    def gradients() -> dict[str, Tensor]:
        nothing = {name: torch.zeros_like(value) for name, value in encoder.state.items()}
        there = {n: p.grad for n, p in encoder.model.named_parameters() if p.grad is not None}
        return named(nothing | there, {n: p.grad for n, p in head.named_parameters()})

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        states = encoder.model(ids, repr_layers=[foreign.L])["representations"][foreign.L]
        return head(states)

    path = folder / "hf"
    path.mkdir()
    save_file(named(encoder.state, head.state_dict()), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(foreign.HF_CONFIG))
    shape = Shape(foreign.L, foreign.H, foreign.A, foreign.F)
    return Reference(path, shape, logits, gradients)


def one_batch() -> LabelledBatch:
    spec = BatchSpec(DataConfig(max_seq_length=128), 160, seed=3)
    (batch,) = LabelledPacks(proteins_of(SEQUENCES), spec)
    return batch


def padded(batch: LabelledBatch) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[n, s]`` of the proteins of a pack, in its order."""
    pieces = list(batch.input_ids.split(batch.seqlens))[: batch.num_sequences]
    ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=1)
    lengths = torch.tensor([len(piece) for piece in pieces])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, reference in expected.items():
        value = actual[name][: reference.shape[0]]
        scale = reference.abs().max().item()
        assert scale > 0, name
        assert (value - reference).abs().max().item() <= tolerance * scale, name


def assert_same_gradients(model: torch.nn.Module, reference: Reference, tolerance: float) -> None:
    """Those of every parameter, under our names."""
    head = open_weights(reference.path).description.task
    assert head is not None
    table = hf.NAMES.with_head(head_rows(head))
    expected = references.ours(reference.gradients(), table, reference.shape)
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(actual) == set(expected)
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_equals_hugging_face_with_every_gradient(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After conversion, through the checkpoint; in fp64 to 1e-10."""
    is_whole = dtype == torch.float32
    reference = whole_model(kind, tmp_path) if is_whole else in_fp64(kind, tmp_path, monkeypatch)
    convert(reference.path, tmp_path / "ours", "esm2mega")
    run = layout.read_config(tmp_path / "ours")
    make_head = head_of_task(run.task, CLASSES)
    (model,) = build_model(run.model, ParallelConfig(), torch.device("cpu"), 5, make_head)
    load_weights(tmp_path / "ours", [model])
    model.eval()

    batch = one_batch()
    ids, mask = padded(batch)
    theirs = reference.logits(ids, mask)
    if kind == "token":
        # Theirs are of all tokens, ours of residues.
        theirs = theirs[mask.bool() & (ids != 0) & (ids != 2)]
    ours = model(batch.input_ids, PackedSequences.from_lengths(batch.seqlens), batch.head_inputs)
    assert_close({"logits": ours.detach()}, {"logits": theirs.detach()}, TOLERANCE[dtype])
    labels = torch.arange(len(theirs)) % CLASSES
    for logits in (ours, theirs):
        cross_entropy(logits, labels).backward()
    assert_same_gradients(model, reference, TOLERANCE[dtype])


def test_several_targets_equal_a_linear_layer_and_a_cross_entropy_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every protein alone, without padding: the loss over all labels that are there, and its gradient."""
    reference = in_fp64("token", tmp_path, monkeypatch)
    convert(reference.path, tmp_path / "ours", "esm2mega")
    columns = {"u": "ab", "v": "xyz"}
    generator = torch.Generator().manual_seed(8)

    def drawn(letters: str, length: int) -> str:
        return "".join(letters[i] for i in torch.randint(len(letters), (length,), generator=generator))

    rows = []
    for number, text in enumerate(SEQUENCES):
        mask = "0" * len(text) if number == 1 else drawn("01", len(text))
        rows.append((text, *(drawn(letters, len(text)) for letters in columns.values()), mask))
    (tmp_path / "t.csv").write_text("\n".join(map(",".join, [("sequence", "u", "v", "m"), *rows])))
    task = TaskConfig(
        kind="token_classification",
        target_columns=["u", "v"],
        mask_column=["m", None],
        label_smoothing=0.1,
    )
    data = DataConfig(max_seq_length=128)
    proteins, info = read_labelled(tmp_path / "t.csv", task, data, None, "data.train")
    (batch,) = LabelledPacks(proteins, BatchSpec(data, 160, seed=3))

    run = layout.read_config(tmp_path / "ours")
    make_head = head_of_task(task, info.num_outputs)
    (model,) = build_model(run.model, ParallelConfig(), torch.device("cpu"), 5, make_head)
    load_weights(tmp_path / "ours", [model])
    model.eval()
    output = model(batch.input_ids, PackedSequences.from_lengths(batch.seqlens), batch.head_inputs)
    found = loss_of_task(task, info).forward(batch, output)
    found.loss_sum.backward()

    expected, count = torch.zeros((), dtype=torch.float64), 0
    for text, *labels, mask in rows:
        ids = torch.tensor([[0, *encode_residues(text).tolist(), 2]])
        logits = reference.logits(ids, torch.ones_like(ids))[0, 1:-1]
        of_target = zip(logits.split([2, 3], dim=1), columns.values(), labels, strict=True)
        for target, (part, letters, names) in enumerate(of_target):
            there = [i for i in range(len(text)) if target == 1 or mask[i] == "1"]
            wanted = torch.tensor([letters.index(names[i]) for i in there], dtype=torch.int64)
            expected += cross_entropy(part[there], wanted, reduction="sum", label_smoothing=0.1)
            count += len(there)
    expected.backward()
    assert found.count == count
    assert found.loss_sum.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same_gradients(model, reference, TOLERANCE[torch.float64])
