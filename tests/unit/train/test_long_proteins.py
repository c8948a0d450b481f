"""A protein as long as human titin is trained on and evaluated whole; memory does not follow its length."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from esm2mega.config.batches import resolve_batches
from esm2mega.config.load import load_run
from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.config.validate import validate
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.plan.stage import cost_of
from esm2mega.train.pretrain import pretrain
from tests.unit.runs import tiny_run

LENGTH = 34_350
LETTERS = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)


def write(path: Path, lengths: list[int]) -> Path:
    rng = np.random.default_rng(len(lengths))
    with StoreWriter(path) as writer:
        for number, length in enumerate(lengths):
            writer.append([f"p{number}"], [rng.choice(LETTERS, size=length).tobytes()])
    return path


def test_it_is_trained_on_and_evaluated_whole(tmp_path: Path) -> None:
    train = write(tmp_path / "train", [LENGTH, *[300] * 40])
    valid = write(tmp_path / "valid", [LENGTH, 50])
    assert TokenStore(train).lengths.max() == LENGTH
    shape = ("num_layers=1", "hidden_size=8", "num_attention_heads=1", "ffn_hidden_size=16", "precision=fp32")
    tokens = LENGTH + 2
    pretrain(
        tiny_run(
            *(f"model.{word}" for word in shape),
            f"data.train={train}",
            f"data.valid={valid}",
            f"data.max_seq_length={tokens}",
            f"train.micro_batch_tokens={tokens}",
            f"train.global_batch_tokens={2 * tokens}",
            "train.max_epochs=1",
            "train.max_steps=1",
            "train.eval_every=1",
            "logging.samples=true",
            run_dir=tmp_path / "run",
        )
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (step,) = (record for record in records if record["kind"] == "train")
    (evaluation,) = (record for record in records if record["kind"] == "eval")
    # 41 samples, each of which begins with its protein's first token: none was cut.
    assert sorted(step["samples"]) == [[number, 0] for number in range(41)]
    assert step["consumed_tokens"] == tokens + 40 * 302
    assert 2.5 < step["loss"] < 4.5 and 2.5 < evaluation["valid_loss"] < 4.5


def test_lengths_up_to_65536_are_taken() -> None:
    words = [
        "data.max_seq_length=65536",
        "train.micro_batch_tokens=65536",
        "train.global_batch_tokens=131072",
    ]
    run = load_run(None, ["model.size=tiny", "schedule.warmup_steps=10", *words])
    resolve_batches(run.train, run.data, run.parallel, 2)
    validate(run, 2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_activations_of_a_pack_do_not_follow_the_length(device: str) -> None:
    """16,384 tokens of one protein and of 32; the numbers that differ are borders and labels of segments."""
    model = ModelConfig(
        num_layers=2, hidden_size=320, ffn_hidden_size=1280, num_attention_heads=20, precision="bf16"
    )
    one, many = (
        cost_of(model, ParallelConfig(), "only", 2, 16_384, length, device)  # type: ignore[arg-type]
        for length in (16_384, 512)
    )
    assert one.peak == pytest.approx(many.peak, rel=0.01)
    assert one.held == pytest.approx(many.held, rel=0.01)
    if device == "cuda":  # the compiled kernel of a CPU has no formula
        assert one.flops > 2 * many.flops
