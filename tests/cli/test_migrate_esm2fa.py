"""`examples/migrate/esm2fa.sh` on small data in ESM2-FA's published layout, and the commands of its page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from esm2mega.convert.formats.registry import open_weights
from esm2mega.data.store.token_store import TokenStore
from tests.cli.pages import ROOT, commands
from tests.cli.scripts import records, run, warm_python
from tests.cli.test_page_commands import check
from tests.esm2fa import shard

PAGE = ROOT / "docs" / "migrate" / "esm2fa.md"
RNG = np.random.default_rng(11)
SMALL = (
    *("model.precision=fp32", "train.micro_batch_tokens=1026", "train.global_batch_tokens=1026"),
    *("train.max_steps=3", "train.eval_every=2", "checkpoint.save_every=2", "schedule.warmup_steps=1"),
    *("schedule.decay_steps=3", "train.log_every=1"),
)
CONFIG = {
    "model_type": "esm",
    **{"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    **{"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "layer_norm_eps": 1e-5},
    **{"position_embedding_type": "rotary", "token_dropout": True, "emb_layer_norm_before": False},
}


@pytest.fixture(autouse=True)
def _warm_python(tmp_path: Path) -> Iterator[None]:
    with warm_python(tmp_path):
        yield


def residues(length: int) -> str:
    return "".join(RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), size=length))


def test_the_example_goes_from_shards_to_a_model_of_hugging_face(tmp_path: Path) -> None:
    pieces = [(">long/1-1000 x", residues(1000)), (">long/1001-end x", residues(999))]
    shard(tmp_path / "shards" / "shard-00000", [(f">p{n} words", residues(40)) for n in range(12)])
    shard(tmp_path / "shards" / "shard-00001", pieces)
    whole = residues(2050)
    (tmp_path / "valid.fasta").write_text(f">v1\n{residues(60)}\n>v2 words\n{whole}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    done = run(
        "migrate/esm2fa.sh",
        *SMALL,
        cwd=tmp_path,
        TRAIN="shards",
        VALID="valid.fasta",
        MODEL="model",
        OUT="out",
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert len(TokenStore(out / "train" / "train")) == 14
    refined = (out / "train_refined.fasta").read_text().splitlines()
    assert refined[-4:] == [">long/1-1000", pieces[0][1], ">long/1001-end", pieces[1][1]]
    assert [r["step"] for r in records(out / "run") if r["kind"] == "train"] == [1, 2, 3]
    assert json.loads((out / "evaluation.json").read_text())["num_sequences"] == 2
    assert open_weights(out / "hf").description.shape == (1, 16, 32, 2)


def test_the_commands_of_the_page_exist_and_are_those_of_the_script() -> None:
    found = commands(PAGE.read_text())
    assert [command.words[:2] for command in found if command.words[0] == "esm2mega"] == [
        ["esm2mega", verb] for verb in ("prepare", "prepare", "pretrain", "evaluate", "convert")
    ]
    for command in found:
        check(command)
    (pretrain,) = (command.words for command in found if command.words[:2] == ["esm2mega", "pretrain"])
    script = (ROOT / "examples" / "migrate" / "esm2fa.sh").read_text().replace("'", "")
    for override in pretrain[4:]:
        key, _, value = override.partition("=")
        if key not in ("run_dir", "model.from", "model.precision", "data.train", "data.valid"):
            assert f"{key}={value}" in script or key == "train.global_batch_tokens", override
