"""A user's head and loss: what a checkpoint records of them, what is asked for, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esm2mega import evaluate_model, infer_model, train_model
from esm2mega.cli.app import main
from esm2mega.convert.convert import convert
from esm2mega.errors import UserError
from esm2mega.finetune.losses import RegressionLossReduction
from esm2mega.finetune.user_code import GivenCode
from esm2mega.inspect import inspect_path
from esm2mega.train.losses import LossTerms
from tests import own_code
from tests.checkpoints import put_state
from tests.own_code import AbsoluteLoss, FlatHead, HalfScale, LogLoss, MeanHead, OtherHead, OtherLoss
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(3)
SEQUENCES = ["".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in RNG.integers(9, 40, 16)]
PAIRS = [(text, 5 + len(text) / 10) for text in SEQUENCES]


def train(run_dir: Path, *overrides: str, **given: Any) -> Path:
    settings = [*SETTINGS, f"run_dir={run_dir}", "task.kind=regression", "train.max_steps=1"]
    return train_model([*settings, *overrides], train=PAIRS, **given).checkpoint


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("own"), make_head=MeanHead, loss=AbsoluteLoss())


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("configured"))


def test_what_is_recorded_is_text_and_is_shown(own: Path) -> None:
    state = json.loads((own / "train_state.json").read_text())
    head, loss = "tests.own_code:MeanHead", "tests.own_code:AbsoluteLoss"
    assert state["user_code"] == {"head": head, "loss": loss, "loss_predicts": False}
    # The units in which the model speaks: those of the labels.
    assert (state["task"]["mean"], state["task"]["std"]) == ([0.0], [1.0])
    said = inspect_path(own)
    assert f"task regression, head {head}, 1 outputs\n" in said and f"\nloss {loss}\n" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {},
            "has a head of your own code, tests.own_code:MeanHead; give it as --code tests.own_code:MeanHead",
        ),
        (
            {"make_head": OtherHead},
            "with the head tests.own_code:MeanHead, not with tests.own_code:OtherHead",
        ),
        (
            {"make_head": lambda config, device: OtherHead(config, device), "loss": AbsoluteLoss()},
            "with the head tests.own_code:MeanHead, not with tests.own_code:OtherHead",
        ),
        (
            {"make_head": MeanHead},
            "with a loss of your own code, tests.own_code:AbsoluteLoss, which computes",
        ),
        (
            {"make_head": MeanHead, "loss": OtherLoss()},
            "loss tests.own_code:AbsoluteLoss, not with .*:OtherLoss",
        ),
    ],
)
def test_without_the_code_one_line_says_which_is_needed(own: Path, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        evaluate_model(own, PAIRS, **given)
    assert "\n" not in str(caught.value)


def test_predictions_need_no_loss(own: Path) -> None:
    with_loss = infer_model(own, SEQUENCES, make_head=MeanHead, loss=AbsoluteLoss())
    assert infer_model(own, SEQUENCES, make_head=partial(MeanHead)) == with_loss
    with pytest.raises(UserError, match="not with tests.own_code:OtherLoss; give that one"):
        infer_model(own, SEQUENCES, make_head=MeanHead, loss=OtherLoss())


def test_a_loss_with_predictions_of_its_own_is_asked_for(tmp_path: Path) -> None:
    checkpoint = train(tmp_path / "run", loss=LogLoss())
    with pytest.raises(
        UserError, match="LogLoss, which turns its outputs into predictions; give it as --code"
    ):
        infer_model(checkpoint, SEQUENCES)
    assert min(infer_model(checkpoint, SEQUENCES, loss=LogLoss())) > 0
    with pytest.raises(
        UserError, match="transformers has no equivalent of tests.own_code:LogLoss, which is your own code"
    ):
        convert(checkpoint, tmp_path / "hf", "hf")


def test_code_that_was_not_trained_with_is_refused(configured: Path) -> None:
    for given, message in (
        (
            {"make_head": MeanHead},
            "has the head of its configuration .task.head=auto., not tests.own_code:Mean",
        ),
        (
            {"loss": OtherLoss()},
            "was trained with the loss of its configuration, not with tests.own_code:Other",
        ),
    ):
        with pytest.raises(UserError, match=message):
            infer_model(configured, SEQUENCES, **given)


def test_opening_a_checkpoint_imports_nothing_that_it_names(own: Path, tmp_path: Path) -> None:
    """A module that exists is named, and one that does damage would be in it."""
    import shutil

    copy = tmp_path / "step_00000001"
    shutil.copytree(own, copy)
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    state = json.loads((copy / "train_state.json").read_text())
    state["user_code"] = {"head": "trap:Head", "loss": "trap:Loss", "loss_predicts": True}
    put_state(copy, state)
    sys.path.insert(0, str(tmp_path))
    try:
        for call in (
            inspect_path,
            partial(infer_model, sequences=SEQUENCES),
            partial(evaluate_model, data=PAIRS),
        ):
            try:
                call(copy)
            except UserError as error:
                assert "trap:Head" in str(error)
        assert "trap" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))
    for damaged in ({"head": "a\nb:c", "loss": None}, {"head": 7}, {"other": 1}, [1]):
        state["user_code"] = damaged
        put_state(copy, state)
        with pytest.raises(UserError, match="user_code in train_state.json is damaged"):
            infer_model(copy, SEQUENCES)


def test_a_resume_needs_the_same_code(tmp_path: Path) -> None:
    given = {"make_head": MeanHead, "loss": AbsoluteLoss()}
    train(tmp_path / "run", **given)
    for change, message in (
        (
            {"loss": None},
            "with a loss of your own code, tests.own_code:AbsoluteLoss, which computes the loss",
        ),
        ({"loss": OtherLoss()}, "was trained with the loss tests.own_code:AbsoluteLoss, not"),
        ({"make_head": OtherHead}, "was trained with the head tests.own_code:MeanHead, not"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", "train.max_steps=2", **{**given, **change})
    assert train(tmp_path / "run", "train.max_steps=2", **given).name == "step_00000002"


def test_a_head_that_is_loaded_keeps_its_meaning(own: Path, configured: Path, tmp_path: Path) -> None:
    start = ("finetune.load_head=true", "train.max_steps=1")
    with pytest.raises(UserError, match="has a head of your own code, tests.own_code:MeanHead"):
        train(tmp_path / "a", *start, f"init_from={own}")
    # It speaks in units of the labels, and goes on so with the configured loss.
    made = train(tmp_path / "b", *start, f"init_from={own}", make_head=MeanHead)
    state = json.loads((made / "train_state.json").read_text())
    assert (state["task"]["mean"], state["user_code"]["loss"]) == ([0.0], None)
    with pytest.raises(
        UserError, match="outputs of its head are scaled by mean .* the loss of this run takes"
    ):
        train(tmp_path / "c", *start, f"init_from={configured}", loss=AbsoluteLoss())


def test_checkpoints_without_a_record_are_read_as_before(own: Path, tmp_path: Path) -> None:
    """As those of earlier versions, in which the caller knew what was trained."""
    import shutil

    copy = tmp_path / "old" / "checkpoints" / "step_00000001"
    shutil.copytree(own, copy)
    state = json.loads((copy / "train_state.json").read_text())
    del state["user_code"]
    state["task"] |= {"mean": [7.0], "std": [2.0]}
    put_state(copy, state)
    raw = infer_model(own, SEQUENCES, make_head=MeanHead)
    assert infer_model(copy, SEQUENCES, make_head=MeanHead, loss=AbsoluteLoss()) == raw
    scaled = infer_model(copy, SEQUENCES, make_head=MeanHead)
    np.testing.assert_allclose(scaled, 2 * np.array(raw) + 7, rtol=1e-13)


def test_keys_of_the_loss_that_is_replaced_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="task.loss=huber sets up the loss of the configuration, which tests.own"
    ):
        train(tmp_path, "task.loss=huber", loss=AbsoluteLoss())


def test_a_head_of_one_column_less_is_refused_and_not_spread(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"FlatHead predicted \[\d+\] instead of \[\d+, 1\]: a row for each protein"
    ):
        train(tmp_path, make_head=FlatHead)


class AllTokens(MeanHead):
    def features(self, hidden_states: torch.Tensor, segments: Any) -> torch.Tensor:
        return hidden_states


def test_features_that_a_frozen_encoder_cannot_keep_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"AllTokens.features returned .128, 24.; a frozen encoder keeps"):
        train(tmp_path, "finetune.mode=frozen", make_head=AllTokens)


class Returns(AbsoluteLoss):
    """Returns what it was given."""

    names = ("loss",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def forward(self, batch: Any, output: torch.Tensor) -> Any:
        return self.value(output)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: (x.mean(), {"avg": x.mean()}), r"returned a tuple \(Tensor, dict\); return LossTerms"),
        (lambda x: x.mean(), r"returned a Tensor; return LossTerms\(loss_sum, count\): the sum"),
        (lambda x: None, "returned a NoneType; return LossTerms"),
        (lambda x: LossTerms(x, torch.tensor(1)), "returned a loss_sum of shape"),
        (lambda x: LossTerms(x.sum().item(), torch.tensor(1)), "a loss_sum of type float; return the sum"),
        (
            lambda x: LossTerms(x.sum(), torch.tensor(1.5)),
            "a count of shape .. and torch.float32; return the",
        ),
        (lambda x: LossTerms(x.sum().detach(), torch.tensor(1)), "does not depend on the output"),
        (
            lambda x: LossTerms(x.sum(), torch.tensor(1), {"avg": (x.sum(), x.sum())}),
            "logged avg, its `names`",
        ),
    ],
)
def test_what_a_loss_may_return(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Returns(value).terms(None, torch.ones(3, 1, requires_grad=True))
    assert "\n" not in str(caught.value)


def test_a_count_may_be_a_plain_number() -> None:
    terms = Returns(lambda x: LossTerms(x.sum(), 3)).terms(None, torch.ones(3, 1))
    assert terms.count.dtype == torch.int64 and terms.count.item() == 3


def test_a_loss_that_returns_a_mean_ends_a_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"returned a tuple \(Tensor, dict\); return LossTerms"):
        train(tmp_path, loss=Returns(lambda x: (x.mean(), {"avg": x.mean()})))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": own_code.FailingLoss()}, r"FailingLoss.forward failed at PLACE: AttributeError: .*missing"),
        (
            {"loss": own_code.FailingPredictions()},
            r"FailingPredictions.predictions failed at PLACE: IndexError: index",
        ),
        (
            {"make_head": own_code.FailingHead},
            r"own_code:FailingHead.predict failed at PLACE: RuntimeError: mat1",
        ),
        (
            {"make_head": own_code.FailingFeatures},
            r"own_code:FailingFeatures.features failed at PLACE: AttributeError",
        ),
        ({"make_head": own_code.FailingInit}, r"make_head failed at PLACE: AttributeError: .*missing"),
    ],
)
def test_an_exception_in_the_code_of_a_user_is_one_line_with_its_place(
    tmp_path: Path, given: Any, message: str
) -> None:
    lines = Path(own_code.__file__).read_text().splitlines()
    marked = [number for number, line in enumerate(lines, 1) if line.endswith("# the mistake")]
    places = "|".join(f"{re.escape(own_code.__file__)}:{number}" for number in marked)
    with pytest.raises(UserError, match=message.replace("PLACE", f"({places})")) as caught:
        train(tmp_path, "train.eval_every=1", "data.allow_overlap=true", valid=PAIRS, **given)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


class ConfigHead(MeanHead):
    """A head as BioNeMo makes it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, torch.device("cpu"))


class OneArgument(AbsoluteLoss):
    def forward(self, batch: Any) -> Any:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"loss": AbsoluteLoss},
            r"loss is the class AbsoluteLoss; give an instance, as loss=AbsoluteLoss\(\)",
        ),
        ({"loss": torch.nn.MSELoss()}, "loss is an instance of MSELoss; give an instance of a subclass of"),
        ({"loss": torch.nn.functional.mse_loss}, "loss is an instance of function; give an instance of"),
        ({"loss": "huber"}, "loss is an instance of str"),
        (
            {"loss": OneArgument()},
            r"OneArgument.forward takes \(batch\); it is called with \(batch, output\)",
        ),
        ({"make_head": ConfigHead}, r"make_head takes \(config\); it is called with \(config, device\)"),
        ({"make_head": torch.nn.Linear(2, 1)}, "make_head is an instance of Linear that is built already"),
        (
            {"make_head": torch.nn.Linear},
            "make_head is the class torch.nn.modules.linear:Linear; give a subclass",
        ),
        ({"make_head": "mlp"}, "make_head is an instance of str; give a subclass"),
    ],
)
def test_heads_and_losses_of_other_shapes_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        GivenCode(**given)
    assert "\n" not in str(caught.value)


def test_what_a_function_makes_must_be_a_head(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="make_head made an instance of Linear; return an instance of a subclass"
    ):
        train(tmp_path, make_head=lambda config, device: torch.nn.Linear(config.hidden_size, 1))


def test_a_scale_of_other_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has mean \[1.0, 2.0\] and std 1.0 for 1 outputs"):
        train(tmp_path, loss=RegressionLossReduction(mean=[1.0, 2.0]))
    state = json.loads((train(tmp_path / "run", loss=HalfScale()) / "train_state.json").read_text())
    assert (state["task"]["mean"], state["task"]["std"]) == ([1.0], [2.0])


def test_the_option_imports_what_the_user_names(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta, out = tmp_path / "x.fasta", tmp_path / "x.csv"
    fasta.write_text("".join(f">{n}\n{text}\n" for n, text in enumerate(SEQUENCES)))
    command = ["predict", str(own), str(fasta), "--out", str(out)]
    for code, message in (
        (
            [],
            "has a head of your own code, tests.own_code:MeanHead; give it as --code tests.own_code:MeanHead",
        ),
        (["tests.own_code:OtherHead"], "not with tests.own_code:OtherHead; give that one"),
        (["tests/own_code.py:MeanHead"], "is not MODULE:CLASS; for the class MyHead in my_code.py, start"),
        (["tests.own_code"], "is not MODULE:CLASS"),
        (["absent_code:MeanHead"], "there is no module absent_code in"),
        (["tests.own_code:Absent"], "tests.own_code has no Absent"),
        (["tests.own_code:NOT_A_CLASS"], "is neither a subclass of esm2mega.model.heads.TaskHead nor of"),
        (["tests.own_code:NeedsArguments"], "a loss is made without arguments, which failed (TypeError: "),
        (["tests.own_code:FailingLossInit"], "which failed (ValueError: delta is missing); give them"),
        (["tests.own_code:MeanHead", "tests.own_code:OtherHead"], "is a second head; give one"),
    ):
        assert main([*command, *(word for name in code for word in ("--code", name))]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not out.exists()
    assert main([*command, "--code", f"{own_code.__name__}:MeanHead"]) == 0


def test_a_module_of_the_folder_is_found_and_its_fault_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own: Path
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    Path("heads_of_mine.py").write_text(
        "from tests.own_code import MeanHead as Base\nclass Mine(Base): pass\n"
    )
    Path("broken_of_mine.py").write_text("import nothing_like_this\n")
    Path("x.fasta").write_text(">a\nMKTAY\n")
    for code, message in (
        ("heads_of_mine:Mine", "with the head tests.own_code:MeanHead, not with heads_of_mine:Mine"),
        ("broken_of_mine:Mine", "importing broken_of_mine failed: No module named 'nothing_like_this'"),
    ):
        assert main(["predict", str(own), "x.fasta", "--out", "x.csv", "--code", code]) == 2
        assert re.search(message, capsys.readouterr().err)
