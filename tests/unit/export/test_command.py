"""`esm2mega export`: the files, what they compute elsewhere, and what is refused."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esm2mega.cli.app import main
from esm2mega.config.schema import LoRAConfig
from esm2mega.convert.formats import esm2mega as own_format
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.start_point import read_start
from esm2mega.export import command, programs
from esm2mega.export.programs import ProgramFormat
from esm2mega.export.proteins import batches, proteins
from esm2mega.finetune.api import infer_model, train_model
from esm2mega.infer.source import source_of
from esm2mega.vocabulary import MASK, PAD, encode_residues
from tests.infer_models import LETTERS, Reference, ids_of
from tests.parity import references
from tests.parity.references import Shape
from tests.unit.conftest import TinyRun
from tests.unit.lora import adapted
from tests.unit.runs import SETTINGS

PAGE = Path(__file__).parents[3] / "docs" / "export.md"

Program = Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


def torch_program(path: Path) -> Program:
    return torch.export.load(path).module()


def onnx_program(path: Path) -> Program:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return dict(zip(names, map(torch.from_numpy, session.run(None, inputs)), strict=True))

    return run


PROGRAMS = {"torch": (".pt2", torch_program), "onnx": (".onnx", onnx_program)}


def exported(checkpoint: Path, to: str, out: Path, *options: str) -> Program:
    if to == "onnx":
        pytest.importorskip("onnxscript", reason="ONNX is not installed: pip install esm2mega[onnx]")
    suffix, load = PROGRAMS[to]
    out = out.with_suffix(suffix)
    assert main(["export", str(checkpoint), "--to", to, "--out", str(out), *options]) == 0
    return load(out)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """In place of traced programs, which take seconds each, the models that would be traced."""
    models: list[torch.nn.Module] = []

    def write(model: torch.nn.Module, names: Sequence[str], path: Path) -> None:
        assert list(names) == model.output_names
        models.append(model)
        path.write_bytes(b"program")

    held = ProgramFormat(".pt2", (), write, lambda path: models[-1])  # type: ignore[arg-type]
    monkeypatch.setitem(command.FORMATS, "torch", held)
    monkeypatch.setattr(command, "traced", lambda model: model)
    return models


def export_eagerly(checkpoint: Path, out: Path, models: list[torch.nn.Module]) -> Program:
    assert main(["export", str(checkpoint), "--to", "torch", "--out", str(out)]) == 0
    return models[-1]


def test_one_trace_as_both_kinds_of_program(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="ONNX is not installed: pip install esm2mega[onnx]")
    start = read_start(reference.checkpoint)
    model = command.padded_model(start, source_of(start), command.OUTPUTS)
    program = programs.traced(model)
    # Others than in the trace: two proteins of 8 tokens.
    ids = torch.nn.utils.rnn.pad_sequence(
        [ids_of(LETTERS[:length])[0] for length in (20, 1, 13)], batch_first=True, padding_value=PAD
    )
    ids[0, 4:9] = MASK
    mask = (ids != PAD).long()
    theirs = reference.run_ids(ids)
    for name, (suffix, load) in PROGRAMS.items():
        path = tmp_path / f"mine{suffix}"
        programs.FORMATS[name].write(program, model.output_names, path)
        for run in (load(path), programs.FORMATS[name].load(path)):
            found = run(ids, mask)
            assert list(found) == ["last_hidden_state", "logits", "contacts"]
            assert (found["logits"] - theirs.logits)[mask.bool()].abs().max() < command.BOUND
            contacts = reference.model.esm.predict_contacts(ids, mask)
            assert (found["contacts"][0, 1:-1, 1:-1] - contacts[0]).abs().max() < command.BOUND
        # The shortest: one protein of one residue.
        assert run(ids[1:2, :3], mask[1:2, :3])["logits"].shape == (1, 3, 33)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "(2, 24, 33)\n"


@pytest.mark.slow
@pytest.mark.parametrize("to", PROGRAMS)
def test_programs_compute_what_hugging_face_does(
    to: str, reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = exported(reference.checkpoint, to, tmp_path / "mine", "--include", "encoder,head,contacts")
    said = capsys.readouterr().out
    assert re.search(r"compared on 20 proteins of 3 to 386 tokens, run by \w+ [\d.+a-z]+: largest", said)
    differences = re.findall(r"(\d\.\de-\d+|0\.0e\+00) \((\w+)\)", said)
    assert [name for _, name in differences] == ["last_hidden_state", "logits", "contacts"]
    assert all(float(value) <= command.BOUND for value, _ in differences)
    assert [path.name for path in tmp_path.iterdir()] == [f"mine{PROGRAMS[to][0]}"]
    # Another number of proteins and another length than those of the trace and of the comparison.
    ids = torch.full((6, 29), PAD)
    for row in range(6):
        tokens = [0, *encode_residues(LETTERS[: 3 * row + 1]).tolist(), 2]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    mask = (ids != PAD).long()
    found, theirs = run(ids, mask), reference.run_ids(ids)
    assert (found["logits"] - theirs.logits)[mask.bool()].abs().max() < command.BOUND
    assert (found["last_hidden_state"] - theirs.hidden_states[-1])[mask.bool()].abs().max() < command.BOUND
    own = found["contacts"][5, 1:17, 1:17] - reference.contacts(LETTERS[:16])
    assert own.abs().max() < command.BOUND
    # The shortest: one protein of one residue.
    assert run(ids[:1, :3], mask[:1, :3])["logits"].shape == (1, 3, 33)


def test_the_proteins_of_the_comparison() -> None:
    """Twenty of unequal lengths, some above 256, with masked residues and every letter, each once."""
    ids = proteins()
    lengths = [len(x) for x in ids]
    assert len(ids) == len(set(lengths)) == 20 and sum(length > 258 for length in lengths) >= 2
    assert set(torch.cat(ids).tolist()) >= {*range(4, 31), 32}
    seen = [
        x[mask.bool()] for _, padded, masks in batches(ids) for x, mask in zip(padded, masks, strict=True)
    ]
    assert len(seen) == 20 and all(torch.equal(a, b) for a, b in zip(seen, ids, strict=True))
    assert {len(padded) for _, padded, _ in batches(ids)} == {1, 3, 4, 5, 7}


@pytest.mark.slow
def test_weights_under_adapters_are_merged(
    tmp_path: Path, eager: list[torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    base = adapted.make_base(tmp_path / "base", torch.float32)
    lora: LoRAConfig = adapted.KINDS["dora"]
    checkpoint = adapted.make_adapters(tmp_path / "adapted", base, lora, torch.float32)
    run = export_eagerly(checkpoint, tmp_path / "mine.pt2", eager)
    assert "adapters merged" in capsys.readouterr().out
    ids, mask = adapted.batch()
    assert (run(ids, mask)["logits"] - adapted.logits(checkpoint)).abs().max() < command.BOUND


@pytest.mark.slow
def test_the_tanh_form_of_gelu(reference: Reference, tmp_path: Path, eager: list[torch.nn.Module]) -> None:
    """The command compares with the model of this package, and both differ from the erf form."""
    weights = open_weights(reference.checkpoint)
    tanh = replace(weights, description=replace(weights.description, activation="gelu_tanh"))
    (tmp_path / "step_00000000").mkdir()
    own_format.write(tanh, tmp_path / "step_00000000")
    run = export_eagerly(tmp_path / "step_00000000", tmp_path / "mine.pt2", eager)
    ids = ids_of(LETTERS * 3)
    difference = run(ids, torch.ones_like(ids))["logits"] - reference.run(LETTERS * 3).logits
    assert difference.abs().max() > 2 * command.BOUND


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_fine_tuned_model_predicts_in_units_of_the_labels(
    mode: str, finished: TinyRun, tmp_path: Path, eager: list[torch.nn.Module]
) -> None:
    rng = np.random.default_rng(8)
    texts = ["".join(rng.choice(list(LETTERS), n)) for n in rng.integers(4, 60, 12)]
    lora = ["finetune.mode=lora", "lora.rank=2"] if mode == "lora" else []
    settings = [*SETTINGS, *lora, f"run_dir={tmp_path / 'run'}", f"init_from={finished.run_dir}"]
    settings += ["task.kind=regression", "task.pooling=attention", "train.max_steps=2"]
    trained = train_model(settings, train=[(text, 40.0 + 3 * text.count("K")) for text in texts])
    program = export_eagerly(Path(trained.checkpoint), tmp_path / "mine.pt2", eager)
    expected: Any = infer_model(trained.checkpoint, texts)
    tokens = [torch.tensor([0, *encode_residues(text).tolist(), 2]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD)
    found = program(ids, (ids != PAD).long())["logits"][:, 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)  # fp32 against fp64, around 40


def test_a_program_that_computes_something_else_is_refused(
    reference: Reference,
    tmp_path: Path,
    eager: list[torch.nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = command.padded_model

    def changed(*arguments: Any) -> Any:
        model = whole(*arguments)
        model.output_layer.bias += 2e-4
        return model

    monkeypatch.setattr(command, "padded_model", changed)
    out = tmp_path / "mine.pt2"
    assert main(["export", str(reference.checkpoint), "--to", "torch", "--out", str(out)]) == 1
    assert "2.0e-04 (logits), and 0.0001 is allowed; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx", "--out", "x.pt2"], "its name must end in .onnx"),
        (["--to", "torch", "--out", "x"], "its name must end in .pt2; name it x.pt2"),
        (["--to", "torch", "--out", "there.pt2"], "there.pt2: exists"),
        (
            ["--to", "torch", "--out", "x.pt2", "--include", "logits"],
            "--include logits is not one of encoder",
        ),
        (["--to", "torch", "--out", "x.pt2", "--include", "contacts"], "has no contact head"),
        (["--to", "keras", "--out", "x.pt2"], "Invalid value for '--to'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_refusals(
    options: list[str],
    message: str,
    finished: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pt2").touch()
    assert main(["export", str(finished.run_dir), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.rstrip("\n").rpartition("esm2mega: error: ")[2].count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if "onnx" in name else found(name, *more)
    )
    assert main(["export", "absent", "--to", "onnx", "--out", str(tmp_path / "x.onnx")]) == 2
    assert "onnx, onnxscript, onnxruntime, which is not installed; pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_of_a_large_model_lie_beside_it(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "_MOST_IN_ONE_FILE", 1000)
    run = exported(reference.checkpoint, "onnx", tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.onnx", "mine.onnx.data"]
    matrices = [weight for weight in reference.model.esm.encoder.parameters() if weight.ndim == 2]
    num_bytes = sum(weight.nbytes for weight in matrices)
    assert num_bytes < (tmp_path / "mine.onnx.data").stat().st_size < 2 * num_bytes
    found = run(ids_of(LETTERS), torch.ones_like(ids_of(LETTERS)))["logits"]
    assert (found - reference.run(LETTERS).logits).abs().max() < command.BOUND
    (tmp_path / "mine.onnx").unlink()
    arguments = ["export", str(reference.checkpoint), "--to", "onnx", "--out", str(tmp_path / "mine.onnx")]
    assert main(arguments) == 2
    assert "mine.onnx.data: exists" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("to", PROGRAMS)
def test_the_smallest_published_shape(to: str, tmp_path: Path) -> None:
    """All outputs of a random model of the shape of ESM-2 8M, from a directory of Hugging Face."""
    model = references.hugging_face(Shape(6, 320, 20, 1280))
    model.save_pretrained(tmp_path / "hf")
    run = exported(tmp_path / "hf", to, tmp_path / "mine", "--include", "encoder,head,contacts")
    batch = references.batch()
    with torch.no_grad():
        theirs = model(batch.input_ids, attention_mask=batch.attention_mask)
    difference = run(batch.input_ids, batch.attention_mask)["logits"] - theirs.logits
    assert difference[batch.attention_mask.bool()].abs().max() < command.BOUND
