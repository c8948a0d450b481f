"""Evaluation: the loss of a split does not depend on how it was cut into packs and dealt to ranks."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esm2mega.checkpoint import layout
from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, EvalConfig
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.masking import mask_tokens
from esm2mega.data.stream.recipe import masks_recipe
from esm2mega.errors import UserError
from esm2mega.train import evaluate as module
from esm2mega.train.evaluate import (
    evaluate_checkpoint,
    evaluation_record,
    perplexity,
    unigram_log_probabilities,
)
from tests.ranks import run_ranks
from tests.unit.conftest import TinyRun
from tests.unit.runs import packed_batch, unmasked_store

SAME = ("loss", "unigram_loss")


@pytest.fixture(scope="module")
def result(finished: TinyRun) -> dict[str, Any]:
    return evaluate_checkpoint(finished.run_dir, finished.valid)


def test_unigram_is_over_the_tokens_that_can_be_labels() -> None:
    """27 letters have one more of each; what masking never selects takes no probability, <unk> neither."""
    counts = np.zeros(33, dtype=np.int64)
    counts[[3, 4, 7]] = 1000, 3, 5  # <unk>, L, V
    probabilities = unigram_log_probabilities(counts, torch.device("cpu")).exp()
    assert probabilities.dtype == torch.float64
    masked = mask_tokens(
        np.repeat(np.arange(33, dtype=np.uint8), 300),
        np.zeros(1, dtype=np.int64),
        np.array([33 * 300]),
        seed=1,
        config=DataConfig(mlm_probability=0.5),
    )
    labels = set(masked.labels.tolist())
    assert len(labels) == 27
    expected = [(counts[token] + 1) / 35 if token in labels else 0.0 for token in range(33)]
    assert probabilities.tolist() == pytest.approx(expected, rel=1e-14)


def test_result_is_that_of_the_training_log(finished: TinyRun, result: dict[str, Any]) -> None:
    lines = (finished.run_dir / "log.jsonl").read_text().splitlines()
    logged = [record for line in lines if (record := json.loads(line))["kind"] == "eval"][-1]
    assert logged["step"] == result["step"] == 4
    assert result["loss"] == pytest.approx(logged["valid_loss"], rel=1e-12)
    assert result["unigram_loss"] == pytest.approx(logged["unigram_loss"], rel=1e-12)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]), rel=1e-14)
    assert result["num_sequences"] == len(TokenStore(finished.valid)) == 15
    assert (
        result["eval_recipe"]
        == logged["eval_recipe"]
        == layout.read_state(layout.step_dir(finished.run_dir, 4))["loop"]["eval_recipe"]
    )
    assert result["checkpoint"] == str(layout.step_dir(finished.run_dir, 4))


@pytest.mark.parametrize("micro_batch_tokens", [64, 200, 4096])
def test_packs_do_not_matter(finished: TinyRun, result: dict[str, Any], micro_batch_tokens: int) -> None:
    other = evaluate_checkpoint(finished.run_dir, finished.valid, micro_batch_tokens=micro_batch_tokens)
    assert other["num_labels"] == result["num_labels"] > 20
    for name in SAME:
        assert other[name] == pytest.approx(result[name], rel=1e-12)


@pytest.mark.parametrize("micro_batch_tokens", [64, 300])
def test_padded_batches_do_not_matter(
    finished: TinyRun, result: dict[str, Any], micro_batch_tokens: int
) -> None:
    other = evaluate_checkpoint(
        finished.run_dir, finished.valid, None, None, micro_batch_tokens, ["data.packing=bucket"]
    )
    assert other["num_labels"] == result["num_labels"]
    for name in SAME:
        assert other[name] == pytest.approx(result[name], rel=1e-12)


def test_group_size_does_not_matter(
    finished: TinyRun, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GROUP", 2)
    assert evaluate_checkpoint(finished.run_dir, finished.valid)["loss"] == pytest.approx(
        result["loss"], rel=1e-12
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout_change", [(), ("parallel.pipeline_model_parallel_size=2",)], ids=["DP2", "PP2"]
)
def test_ranks_do_not_matter(
    finished: TinyRun, result: dict[str, Any], tmp_path: Path, layout_change: tuple[str, ...]
) -> None:
    out = tmp_path / "result.json"
    arguments = [str(finished.run_dir), "--data", str(finished.valid), "--out", str(out)]
    ranks = run_ranks(["-m", "esm2mega", "evaluate", *arguments, *layout_change], 2, tmp_path)
    assert re.search(r"evaluate: pack (\d+) of \1 \(100 %\)", ranks[0].stderr), ranks[0].stderr
    other = json.loads(out.read_text())
    assert other["num_labels"] == result["num_labels"]
    for name in SAME:
        assert other[name] == pytest.approx(result[name], rel=1e-12)


def test_a_limit_takes_fewer_labels(finished: TinyRun, result: dict[str, Any]) -> None:
    part = evaluate_checkpoint(finished.run_dir, finished.valid, max_batches=1)
    assert 0 < part["num_labels"] < result["num_labels"]


def test_another_checkpoint_has_another_loss(finished: TinyRun, result: dict[str, Any]) -> None:
    earlier = evaluate_checkpoint(layout.step_dir(finished.run_dir, 2), finished.valid)
    assert earlier["step"] == 2
    assert earlier["loss"] != result["loss"]
    assert earlier["unigram_loss"] == pytest.approx(result["unigram_loss"], rel=1e-14)


def test_result_is_written_whole(finished: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    result = evaluate_checkpoint(finished.run_dir, finished.valid, out)
    assert json.loads(out.read_text()) == result
    assert list(out.parent.iterdir()) == [out]


def test_out_that_cannot_be_written_is_one_line(finished: TinyRun, tmp_path: Path) -> None:
    """Before anything is evaluated: the checkpoint of these calls does not even exist."""
    (tmp_path / "file").write_text("")
    for out, reason in (
        (tmp_path / "file" / "deeper" / "result.json", "file is not a directory"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(UserError, match=rf"--out .*: .*{reason}"):
            evaluate_checkpoint(tmp_path / "absent", finished.valid, out)


def test_no_checkpoint_is_an_error(finished: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        evaluate_checkpoint(tmp_path / "absent", finished.valid)


def test_groups_are_filled_with_packs_without_labels() -> None:
    batches = [packed_batch([[0, 32, 2]], {1: token}) for token in (5, 6, 7, 8, 9)]
    groups = [module._filled(group, 4) for group in module._groups(iter(batches), 4)]
    assert [len(group) for group in groups] == [4, 4]
    assert [batch.labels.tolist() for group in groups for batch in group] == [
        [5],
        [6],
        [7],
        [8],
        [9],
        [],
        [],
        [],
    ]
    filling = groups[1][-1]
    assert filling.label_positions.tolist() == []
    assert torch.equal(filling.input_ids, batches[4].input_ids)
    assert [len(group) for group in module._groups(iter(batches), 2)] == [2, 2, 1]
    assert list(module._groups(iter([]), 4)) == []


@pytest.mark.parametrize(
    ("value", "multiple", "expected"), [(16, 1, 16), (16, 3, 18), (16, 8, 16), (16, 32, 32)]
)
def test_group_size_is_a_multiple(value: int, multiple: int, expected: int) -> None:
    assert module._round_up(value, multiple) == expected


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(2.0) == pytest.approx(math.exp(2))
    assert perplexity(1e4) == math.inf
    record = evaluation_record({"loss": 1.0, "unigram_loss": 2.5, "count": 3.0}, "abc")
    expected = {"valid_loss": 1.0, "valid_perplexity": math.e, "unigram_loss": 2.5, "eval_recipe": "abc"}
    assert record == expected


def test_the_recipe_is_pinned_whatever_the_training_masks(finished: TinyRun, result: dict[str, Any]) -> None:
    """Also the order of the packs, of which a limit takes the first, does not follow the seed of the run."""
    of_training = ("data.mlm_probability=0.5", "data.random_fraction=0", "data.crop=start", "seed=99")
    other = evaluate_checkpoint(finished.run_dir, finished.valid, overrides=of_training)
    assert other == result
    assert result["eval_recipe"] == masks_recipe(EvalConfig(), 64)
    part, same_part = (
        evaluate_checkpoint(finished.run_dir, finished.valid, max_batches=2, overrides=changes)
        for changes in ((), of_training)
    )
    assert part == same_part
    more = evaluate_checkpoint(finished.run_dir, finished.valid, overrides=["eval.mlm_probability=0.5"])
    assert more["num_labels"] > 2 * result["num_labels"]
    assert more["eval_recipe"] == masks_recipe(EvalConfig(0.5), 64) != result["eval_recipe"]
    assert more["eval_masks"].startswith("0.5 of the residues") and "0.15 of" in result["eval_masks"]


def test_nothing_to_predict_is_null(
    finished: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    store = unmasked_store(tmp_path / "store")
    assert main(["evaluate", str(finished.run_dir), "--data", str(store), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [found[name] for name in ("loss", "perplexity", "unigram_loss")] == [None] * 3
    assert (found["num_labels"], found["num_sequences"]) == (0, 1)
    assert {"loss: null", "perplexity: null", "unigram_loss: null"} <= set(
        capfd.readouterr().out.splitlines()
    )
