"""A difference anywhere is found: in any step, on any rank, in any file; and a piece that nobody holds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esm2mega.prove.compare import Difference, Outcome, differences, worst
from tests.checkpoints import put_state

NAMES = ("embedding", "column", "bias")
STEPS = 2


def _whole(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding": (4, 3), "column": (2, 6), "bias": (5,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


Content = dict[str, Any]


def _reference() -> Content:
    def pieces(seed: int) -> dict[str, Any]:
        return {
            name: (-1, tuple(value.shape), 0, value.flatten().clone()) for name, value in _whole(seed).items()
        }

    ranks = [
        {"tp_rank": 0, "tp_size": 1, "gradients": [pieces(1), pieces(2)], "weights": pieces(3)},
    ]
    return _content(ranks)


def _two_ranks() -> Content:
    """TP 2: the embedding split by rows, the column by its second dimension; both hold the bias."""

    def pieces(seed: int, rank: int) -> dict[str, Any]:
        whole = _whole(seed)
        rows, columns = whole["embedding"].chunk(2, 0)[rank], whole["column"].chunk(2, 1)[rank]
        return {
            "embedding": (0, tuple(rows.shape), 0, rows.flatten().clone()),
            "column": (1, tuple(columns.shape), 0, columns.flatten().clone()),
            "bias": (-1, (5,), 0, whole["bias"].clone()),
        }

    ranks = [
        {
            "tp_rank": rank,
            "tp_size": 2,
            "gradients": [pieces(1, rank), pieces(2, rank)],
            "weights": pieces(3, rank),
        }
        for rank in range(2)
    ]
    return _content(ranks)


def _content(ranks: list[Any]) -> Content:
    records = [
        {
            "kind": "train",
            "step": step,
            "loss": 3.0 / step,
            "grad_norm": 1.5,
            "lr": 0.1,
            "consumed_tokens": 9 * step,
        }
        for step in (1, 2)
    ]
    records.append({"kind": "eval", "step": 2, "valid_loss": 2.5, "unigram_loss": 2.9})
    checkpoint = {**_whole(3), "optimizer.state.exp_avg.bias": torch.ones(5, dtype=torch.float64)}
    state = {
        "step": 2,
        "loop": {"evaluation": {"valid_loss": 2.5}, "ranking": {"2": 2.5}},
        "data": {"consumed_packs": 4, "consumed_samples": 24},
    }
    return {"ranks": ranks, "records": records, "checkpoint": checkpoint, "state": state}


def _outcome(content: Content, folder: Path, before: int = 0) -> Outcome:
    """As the processes of a run leave it; the checkpoint is put in without its files."""
    step = folder / "run" / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    for rank, seen in enumerate(content["ranks"]):
        torch.save(seen, folder / f"rank{rank}.pt")
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content["records"]))
    put_state(step, content["state"])
    outcome = Outcome(folder, folder / "run", before, STEPS)
    outcome.__dict__["checkpoint"] = content["checkpoint"]
    return outcome


def _worst(content: Content, folder: Path, before: int = 0) -> Difference:
    trial = _outcome(content, folder / "trial", before)
    return worst(differences(_outcome(_reference(), folder / "reference"), trial))


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    found = differences(_outcome(_reference(), tmp_path / "a"), _outcome(_two_ranks(), tmp_path / "b"))
    assert {difference.value for difference in found} == {0.0}
    gradients = [difference for difference in found if difference.kind == "gradient"]
    assert len(gradients) == STEPS * len(NAMES) * 2


def _values(content: Content, kind: str, rank: int, name: str) -> torch.Tensor:
    seen = content["ranks"][rank]
    tensor = (seen["weights"] if kind == "weight" else seen["gradients"][1])[name][3]
    assert isinstance(tensor, torch.Tensor)
    return tensor


@pytest.mark.parametrize("kind", ["gradient", "weight"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_changed_element_is_named(tmp_path: Path, kind: str, name: str, rank: int) -> None:
    content = _two_ranks()
    values = _values(content, kind, rank, name)
    values[-1] += 0.25
    found = _worst(content, tmp_path)
    assert (found.kind, found.name) == (kind, name)
    assert found.location == ("" if kind == "weight" else "step 2, ") + f"rank {rank}"
    scale = float(_whole(3 if kind == "weight" else 2)[name].abs().max())
    assert found.value == pytest.approx(0.25 / scale, abs=1e-15)


def test_swapped_slices_are_found(tmp_path: Path) -> None:
    content = _two_ranks()
    first, second = (_values(content, "weight", rank, "column") for rank in (0, 1))
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)
    assert _worst(content, tmp_path).name == "column"


def _drop_rows(content: Content) -> None:
    dimension, shape, _, values = content["ranks"][1]["weights"]["embedding"]
    content["ranks"][1]["weights"]["embedding"] = (dimension, shape, 2, values[2:])


def _no_bias(content: Content) -> None:
    for seen in content["ranks"]:
        del seen["weights"]["bias"]


def _unknown(content: Content) -> None:
    content["ranks"][0]["weights"]["other"] = (-1, (1,), 0, torch.ones(1))


def _other_shape(content: Content) -> None:
    content["ranks"][0]["weights"]["bias"] = (-1, (4,), 0, torch.ones(4))


def _lost_step(content: Content) -> None:
    content["ranks"][1]["gradients"].pop()


def _nan(content: Content) -> None:
    content["ranks"][0]["weights"]["bias"][3][2] = float("nan")


def _lost_record(content: Content) -> None:
    content["records"].pop(1)


def _lost_tensor(content: Content) -> None:
    del content["checkpoint"]["bias"]


def _more_tensors(content: Content) -> None:
    content["checkpoint"]["more"] = torch.ones(1)


def _other_place(content: Content) -> None:
    content["state"]["data"]["consumed_samples"] = 25


@pytest.mark.parametrize(
    ("damage", "kind", "name"),
    [
        (_drop_rows, "weight", "embedding"),
        (_no_bias, "weight", "bias"),
        (_unknown, "weight", "other"),
        (_other_shape, "weight", "bias"),
        (_lost_step, "gradient", "of every step"),
        (_nan, "weight", "bias"),
        (_lost_record, "state", "records of log.jsonl"),
        (_lost_tensor, "checkpoint", "bias"),
        (_more_tensors, "checkpoint", "more"),
        (_other_place, "state", "data.consumed_samples"),
    ],
)
def test_what_is_missing_or_too_many_is_infinitely_far(
    tmp_path: Path, damage: Callable[[Content], None], kind: str, name: str
) -> None:
    content = _two_ranks()
    damage(content)
    found = _worst(content, tmp_path)
    assert (found.value, found.kind, found.name) == (float("inf"), kind, name)


@pytest.mark.parametrize(
    ("record", "key", "kind"),
    [(0, "loss", "loss"), (1, "grad_norm", "gradient norm"), (1, "lr", "state"), (2, "valid_loss", "loss")],
)
def test_logged_numbers_are_compared(tmp_path: Path, record: int, key: str, kind: str) -> None:
    content = _two_ranks()
    content["records"][record][key] *= 1.0 + 1e-6
    found = _worst(content, tmp_path)
    assert (found.kind, found.name) == (kind, key)
    assert found.value == pytest.approx(1e-6, rel=1e-6)


def test_checkpoint_and_early_stopping_are_compared(tmp_path: Path) -> None:
    content = _two_ranks()
    content["checkpoint"]["optimizer.state.exp_avg.bias"][0] = 1.5
    content["state"]["loop"]["evaluation"]["valid_loss"] = 2.75
    content["state"]["loop"]["ranking"]["2"] = 2.75
    found = differences(_outcome(_reference(), tmp_path / "a"), _outcome(content, tmp_path / "b"))
    by_name = {difference.name: difference.value for difference in found if difference.value}
    assert by_name == {"optimizer.state.exp_avg.bias": 0.5, "valid_loss": pytest.approx(0.1)}


def test_number_of_micro_batches_is_the_layouts_own(tmp_path: Path) -> None:
    content = _two_ranks()
    content["state"]["data"]["consumed_packs"] = 8
    assert _worst(content, tmp_path).value == 0.0


def test_resumed_run_is_compared_from_its_first_own_step(tmp_path: Path) -> None:
    content = _two_ranks()
    for seen in content["ranks"]:
        seen["gradients"].pop(0)
    assert _worst(copy.deepcopy(content), tmp_path / "good", before=1).value == 0.0
    content["ranks"][1]["gradients"][0]["bias"][3][0] += 1.0
    assert _worst(content, tmp_path / "bad", before=1).location == "step 2, rank 1"
