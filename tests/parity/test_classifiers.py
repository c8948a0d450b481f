"""Classification models of transformers and fine-tuned checkpoints: each becomes the other, with labels."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import esm2mega.finetune.api
from esm2mega.checkpoint import layout
from esm2mega.cli.app import main
from esm2mega.config.head_form import head_form
from esm2mega.config.schema import Run, TaskConfig
from esm2mega.convert.convert import convert
from esm2mega.convert.files.vocabulary import write_tokenizer
from esm2mega.convert.formats import esm2mega as own_format
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.heads.hf_classifiers import architecture_of
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.convert.verify import verify
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import MachineError, UserError
from esm2mega.files import appearing
from esm2mega.train.start import find_init
from tests.parity import references

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NAMES = ["helix", "strand", "coil"]
MODELS: dict[str, tuple[str, str | None, list[str], str]] = {
    "classification": ("Sequence", "single_label_classification", NAMES, "classification"),
    "multilabel": ("Sequence", "multi_label_classification", NAMES, "multilabel"),
    "one number": ("Sequence", None, ["fitness"], "regression"),
    "several numbers": ("Sequence", "regression", ["stability", "activity"], "regression"),
    "residues": ("Token", None, NAMES, "token_classification"),
    "numbers of residues": ("Token", "regression", ["exposure"], "token_regression"),
}
"""Class, ``problem_type``, labels; and our kind."""

Model = Any


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models with fp16-rounded frequencies, saved by transformers itself; read only."""
    folder = tmp_path_factory.mktemp("sources")
    for name, (kind, problem, labels, _) in MODELS.items():
        config = references.hugging_face(references.Shape()).config
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        config.problem_type = problem
        model = getattr(transformers, f"EsmFor{kind}Classification")(config)
        references.randomize(model)
        model.esm.rotary_embeddings.inv_freq.copy_(model.esm.rotary_embeddings.inv_freq.half().float())
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name)
    return folder


def load(path: Path, kind: str) -> Model:
    """As a user of transformers does; nothing missing or too much in the directory."""
    auto = getattr(transformers, f"AutoModelFor{kind}Classification")
    model, info = auto.from_pretrained(path, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def run(model: Model) -> torch.Tensor:
    batch = references.batch()
    return model(batch.input_ids, attention_mask=batch.attention_mask).logits


@pytest.mark.some(3)
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(sources: Path, name: str, tmp_path: Path) -> None:
    """A checkpoint as fine-tuning writes it; back in transformers the same bits, labels and logits."""
    kind, problem, labels, ours = MODELS[name]
    convert(sources / name, tmp_path / "ours", "esm2mega")
    task = layout.read_config(tmp_path / "ours").task
    info = TargetInfo.from_dict(layout.read_state(tmp_path / "ours")["task"])
    assert (task.kind, info.kind, info.names) == (ours, ours, labels)
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    first, second = open_weights(sources / name), open_weights(tmp_path / "back")
    assert first.infos == second.infos
    assert all(torch.equal(first.read(x), second.read(x)) for x in first.infos)
    model = load(tmp_path / "back", kind)
    assert model.config.id2label == dict(enumerate(labels)) and model.config.num_labels == len(labels)
    assert model.config.label2id == {label: number for number, label in enumerate(labels)}
    expected = {"one number": "regression", "residues": None}.get(name, problem)
    assert model.config.problem_type == expected
    # The same weights elsewhere in memory: a kernel may add in another order.
    assert torch.allclose(run(load(sources / name, kind)), run(model), rtol=1e-6, atol=1e-6)
    convert(tmp_path / "back", tmp_path / "again", "esm2mega")
    third = open_weights(tmp_path / "again")
    assert all(torch.equal(first.read(x), third.read(x)) for x in first.infos)


def outputs_of(path: Path, kind: str, sequences: list[str]) -> list[torch.Tensor]:
    """Logits of transformers with its own tokenizer, a sequence at a time: ``[1, k]`` or ``[L, k]``."""
    model, tokenizer = load(path, kind), transformers.AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        found = [model(**tokenizer(x, return_tensors="pt")).logits for x in sequences]
    return found if kind == "Sequence" else [x[0, 1:-1] for x in found]


SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "LAGVSERTIDPKQNFYMHWCXB", "MK"]


def test_a_converted_classifier_predicts(sources: Path, tmp_path: Path) -> None:
    """Without training; classes of residues have a blank between if their names are words."""
    (tmp_path / "x.fasta").write_text("".join(f">{i}\n{x}\n" for i, x in enumerate(SEQUENCES)))
    for name in ("classification", "several numbers", "residues"):
        kind, _, labels, _ = MODELS[name]
        ours = tmp_path / name.replace(" ", "_")
        assert main(["convert", str(sources / name), str(ours), "--to", "esm2mega"]) == 0
        table = tmp_path / f"{ours.name}.csv"
        assert main(["predict", str(ours), str(tmp_path / "x.fasta"), "--out", str(table)]) == 0
        convert(ours, tmp_path / f"{ours.name}_hf", "hf")
        expected = outputs_of(tmp_path / f"{ours.name}_hf", kind, SEQUENCES)
        for line, logits in zip(table.read_text().splitlines()[1:], expected, strict=True):
            cells = line.split(",")[2:]
            likeliest = [labels[number] for number in logits.argmax(-1)]
            if name == "several numbers":
                assert torch.tensor([float(x) for x in cells]) == pytest.approx(logits[0], abs=1e-4)
            elif name == "residues":
                assert cells == [" ".join(likeliest)]
            else:
                assert cells[0] == likeliest[0]
                assert torch.tensor([float(x) for x in cells[1:]]) == pytest.approx(
                    logits[0].softmax(-1), abs=1e-5
                )


def settings(folder: Path, *more: str) -> list[str]:
    batches = ["data.max_seq_length=64", "train.micro_batch_tokens=128", "train.global_batch_tokens=128"]
    schedule = ["schedule.warmup_steps=0", "optim.lr=1e-4", "train.eval_every=0", "task.dropout=0.1"]
    return [f"run_dir={folder}", *batches, *schedule, *more]


def pairs(values: list[Any]) -> list[tuple[str, Any]]:
    letters = random.Random(3)
    return [("".join(letters.choices("LAGVSERTIDPKQNFYMHWC", k=12)), value) for value in values]


def test_a_trained_regression_becomes_a_model_of_transformers(sources: Path, tmp_path: Path) -> None:
    """In units of the labels: their scale, far from 0 and 1, is folded into the last layer."""
    targets = [[100 + 3 * i % 7, -0.5 + 0.01 * i] for i in range(12)]
    trained = esm2mega.finetune.api.train_model(
        settings(
            *(tmp_path / "run", f"init_from={sources / 'residues'}", "task.kind=regression", "task.head=hf"),
            *("task.target_columns=[melting,activity]", "train.max_steps=2"),
        ),
        train=pairs(targets),
    )
    report = convert(trained.checkpoint, tmp_path / "hf", "hf")
    assert any("scale of the labels (mean 10" in line for line in report.notes.changed)
    predicted = esm2mega.finetune.api.infer_model(trained.checkpoint, SEQUENCES)
    expected = outputs_of(tmp_path / "hf", "Sequence", SEQUENCES)
    for found, logits in zip(predicted, expected, strict=True):
        assert [found["melting"], found["activity"]] == pytest.approx(logits[0].tolist(), rel=1e-5, abs=1e-5)
    info = open_weights(tmp_path / "hf").description.task.info
    assert (info.names, info.mean, info.std) == (["melting", "activity"], [0.0, 0.0], [1.0, 1.0])
    # Rounded once, and by the verification in the same way.
    verify.verify(convert(trained.checkpoint, tmp_path / "bf16", "hf", dtype="bf16"))


def test_labels_survive_training(sources: Path, tmp_path: Path) -> None:
    """A loaded head keeps its classes in their order, which is not that of the alphabet, and those without a
    label in the training data; so does a run that resumes.
    """
    common = [f"init_from={sources / 'classification'}", "task.kind=classification", "task.head=hf"]
    common = settings(tmp_path / "run", *common, "finetune.load_head=true")
    train = pairs(["strand", "helix"] * 8)
    for steps in (1, 2):
        trained = esm2mega.finetune.api.train_model([*common, f"train.max_steps={steps}"], train=train)
    state = layout.read_state(trained.checkpoint)
    assert (state["step"], state["task"]["names"], state["task"]["counts"]) == (2, NAMES, [8, 8, 0])
    convert(trained.checkpoint, tmp_path / "hf", "hf")
    logits = torch.cat(outputs_of(tmp_path / "hf", "Sequence", SEQUENCES))
    predicted = esm2mega.finetune.api.infer_model(trained.checkpoint, SEQUENCES)
    assert predicted == [NAMES[number] for number in logits.argmax(-1)]
    before = torch.cat(outputs_of(sources / "classification", "Sequence", SEQUENCES))
    # It went on from the loaded head: two small steps, not another start.
    assert 0 < (logits - before).abs().max() < 0.5 * before.abs().max()

    for change, message in (
        ("task.kind=multilabel", "holds the head of task.kind=classification, the configuration says"),
        ("task.head=mlp", "holds another head than the configuration names; set task.head=hf"),
        (f"init_from={tmp_path / 'lm'}", "has no head of a task; set finetune.load_head=false"),
    ):
        references.hugging_face(references.Shape()).save_pretrained(tmp_path / "lm")
        other = [*common, f"run_dir={tmp_path / 'other'}", "train.max_steps=1", change]
        with pytest.raises(UserError, match=message):
            esm2mega.finetune.api.train_model(other, train=train)
    message = r"train\[0\]: the class 'turn' in column 'target' is none of those .* helix, strand"
    with pytest.raises(UserError, match=message):
        esm2mega.finetune.api.train_model(
            [*common, f"run_dir={tmp_path / 'other'}", "train.max_steps=1"], train=pairs(["turn"] * 4)
        )


def test_columns_of_a_loaded_head(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Outputs go by their order: other names for them are taken and said, the same ones swapped refused."""
    common = settings(tmp_path / "run", f"init_from={sources / 'several numbers'}", "task.kind=regression")
    common += ["task.head=hf", "finetune.load_head=true", "train.max_steps=1"]
    train = pairs([[float(i), 1.0] for i in range(6)])
    for columns, message in (
        ("activity,stability", r"have another order; set task.target_columns=\[stability,activity\]"),
        ("stability", "the loaded head has 2 outputs, stability, activity; name a column for each"),
    ):
        with pytest.raises(UserError, match=message):
            esm2mega.finetune.api.train_model([*common, f"task.target_columns=[{columns}]"], train=train)
    trained = esm2mega.finetune.api.train_model([*common, "task.target_columns=[a,b]"], train=train)
    assert "outputs of the loaded head: stability for a, activity for b\n" in capsys.readouterr().err
    task = layout.read_state(trained.checkpoint)["task"]
    assert (task["names"], task["std"]) == (["a", "b"], [1.0, 1.0])


@pytest.mark.some(2)
@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("name", ["several numbers", "residues"])
def test_verification_compares_the_outputs(
    sources: Path, name: str, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transformers' own head and with the plain one; a change of it alone is found."""
    if not installed:
        monkeypatch.setattr(verify, "_installed", lambda package: None)
    convert(sources / name, tmp_path / "ours", "esm2mega")
    conversion = convert(tmp_path / "ours", tmp_path / "hf", "hf")
    run_by = "transformers" if installed else "plain PyTorch"
    assert verify.verify(conversion)[0].startswith(f"source run by esm2mega, target by {run_by}")
    assert json.loads((tmp_path / "hf.verify.json").read_text())["logits"]["scale"] > 0.1
    file = tmp_path / "hf" / "model.safetensors"
    state = load_file(file)
    state["classifier.weight" if name == "residues" else "classifier.out_proj.weight"][0] += 0.01
    save_file(state, file)
    with pytest.raises(MachineError, match="verification failed"):
        verify.verify(conversion)


@pytest.mark.parametrize("head", ["product", "attention_maps"])
def test_verification_compares_contacts(sources: Path, head: str, tmp_path: Path) -> None:
    """Outputs of pairs, of which a protein of one residue has none."""
    atoms = [[3.8 * min(n, 15 - n), 5.0 * (n > 7), 0.0] for n in range(16)]
    trained = esm2mega.finetune.api.train_model(
        settings(
            *(tmp_path / "run", f"init_from={sources / 'residues'}", "task.kind=contact"),
            *(f"task.head={head}", "train.max_steps=1"),
        ),
        train=[(sequence + "MKTA", atoms) for sequence, _ in pairs([0] * 4)],
    )
    conversion = convert(trained.checkpoint, tmp_path / "copy", "esm2mega")
    verify.verify(conversion)
    assert json.loads((tmp_path / "copy.verify.json").read_text())["logits"]["scale"] > 0
    weights = open_weights(tmp_path / "copy")
    changed = "head.output.weight" if head == "product" else "head.weights.1"
    read = weights.read
    weights.read = lambda name: read(name) * (1.1 if name == changed else 1.0)
    with appearing(tmp_path / "other") as directory:
        own_format.write(weights, directory)
    with pytest.raises(MachineError, match="verification failed"):
        verify.verify(replace(conversion, target=tmp_path / "other"))


def test_the_encoder_alone(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--drop-head` gives an `EsmModel` whose pooler, which readers would draw at random, is zero."""
    source = str(sources / "classification")
    assert main(["convert", source, str(tmp_path / "bare"), "--to", "hf", "--drop-head", "--verify"]) == 0
    said = capsys.readouterr().out
    assert "dropped: head.output.weight, head.output.bias, head.dense.weight, head.dense.bias: the" in said
    assert "filled:  pooler: zeros, the source has none" in said
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert type(model).__name__ == "EsmModel" and not info["missing_keys"] and not info["unexpected_keys"]
    assert open_weights(tmp_path / "bare").description.head is None
    # Where there is none, none was dropped.
    notes = convert(tmp_path / "bare", tmp_path / "again", "hf", drop_head=True).notes
    assert not [line for line in notes.dropped if "the head" in line]
    convert(Path(source), tmp_path / "ours", "esm2mega")
    tokens = transformers.AutoTokenizer.from_pretrained(source)(SEQUENCES[0], return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**tokens).last_hidden_state[0, 1:-1]
    for path in (source, tmp_path / "ours", tmp_path / "bare"):
        with esm2mega.load(path) as embedder:
            found = torch.from_numpy(embedder.embed(SEQUENCES[:1])[0])
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for arguments, message in (
        (["convert", source, str(tmp_path / "te"), "--to", "te"], "holds the head of a task (task.kind="),
        (["convert", str(tmp_path / "bare"), str(tmp_path / "x"), "--to", "esm2mega"], "this model has none"),
        (["score", source, "--sequence", "MK", "--out", str(tmp_path / "x.csv")], "it gives no logits"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="the head of task.kind=classification instead of .*fine-tune it"):
        find_init(Run(init_from=source))


def test_heads_without_an_equal() -> None:
    info = TargetInfo("regression", ["x"])
    for change in ({"head": "mlp"}, {"head": "linear", "pooling": "cls"}, {"head": "auto"}):
        task = TaskConfig(kind="regression", **change)
        with pytest.raises(UserError, match=r"no equivalent of the head (mlp|linear) .*--drop-head writes"):
            architecture_of(HeadDescription(task, info, {}))
    gelu = TaskConfig(kind="classification", head="pooler", pooler_activation="gelu")
    with pytest.raises(UserError, match="no equivalent of the head cls gelu"):
        architecture_of(HeadDescription(gelu, info, {}))
    with pytest.raises(UserError, match="no equivalent of the head residue cnn"):
        architecture_of(HeadDescription(TaskConfig(kind="token_classification", head="cnn"), info, {}))
    pooler = TaskConfig(kind="classification", head="pooler")
    assert head_form(pooler) == head_form(TaskConfig(kind="classification", head="hf"))
    names = [f"head.{layer}.{part}" for layer in ("dense", "output") for part in ("weight", "bias")]
    assert (
        architecture_of(HeadDescription(pooler, info, dict.fromkeys(names, ())))
        == "EsmForSequenceClassification"
    )
    # A user's own head under the same configuration.
    with pytest.raises(UserError, match="no equivalent of the head cls tanh"):
        architecture_of(HeadDescription(pooler, info, dict.fromkeys([*names, "head.gate"], ())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}}, "numbers 4 labels, the classifier has 3"),
        ({"id2label": {"0": "a", "1": "b", "7": "c"}}, "they must be 0, 1 and so on"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "id2label has 'a' twice"),
        ({"id2label": ["a", "b", "c"]}, "id2label is no table"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking'; known are regression"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    sources: Path, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = json.loads((sources / "classification" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").symlink_to(sources / "classification" / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)
