"""What `esm2mega inspect` tells of a store, a run and a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esm2mega.checkpoint import layout
from esm2mega.data.benchmarks.flip import prepare_flip
from esm2mega.errors import UserError
from esm2mega.finetune.api import train_model
from esm2mega.inspect import inspect_path
from tests.unit.checkpoint.test_digests import flip
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS


def _checksums(text: str) -> dict[str, str]:
    """Name of a tensor -> its checksum."""
    lines = [line.split() for line in text.splitlines() if line.startswith("  ")]
    return {line[0]: line[-1] for line in lines}


def _whole(text: str) -> str:
    found = re.search(r"^weights sha256 ([0-9a-f]{64})$", text, re.MULTILINE)
    assert found
    return found[1]


def test_checkpoint(finished: TinyRun) -> None:
    text = inspect_path(finished.run_dir)
    assert f"checkpoint {layout.step_dir(finished.run_dir, 4)} (format 1, esm2mega " in text
    assert "2 layers, hidden 24, 3 heads, FFN 56, fp64" in text
    assert "step 4, " in text
    assert re.search(r"validation loss \d\.\d{4}$", text, re.MULTILINE)
    assert "checkpoints of the run: step_00000002, step_00000004" in text
    assert re.search(
        r"  embedding.word_embeddings.weight +float64 +\[40, 24\] +[0-9a-f]{16}$", text, re.MULTILINE
    )
    assert "optimizer: " in text
    assert not any(name.startswith("optimizer") for name in _checksums(text))


def test_verify_lists_every_file(finished: TinyRun) -> None:
    checkpoint = layout.step_dir(finished.run_dir, 4)
    for path in (checkpoint, finished.valid):
        plain, verified = inspect_path(path).splitlines(), inspect_path(path, verify=True).splitlines()
        assert verified[: len(plain)] == plain and len(verified) > len(plain)
        files = json.loads((path / ("digests.json" if path == checkpoint else "manifest.json")).read_text())[
            "files"
        ]
        for line, (name, entry) in zip(verified[len(plain) :], files.items(), strict=False):
            assert line.split()[1:3] == [name, f"{entry['bytes']:,}"] and line.endswith(entry["sha256"][:16])
        assert len(verified) - len(plain) == len(files) + (path == checkpoint)


def test_verify_takes_no_older_checkpoint_for_a_damaged_one(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    flip(layout.step_dir(run_dir, 4) / "model" / "__0_0.distcp", 4000)
    assert f"checkpoint {layout.step_dir(run_dir, 2)} " in inspect_path(run_dir)
    assert "step_00000004 is passed over" in capsys.readouterr().err
    with pytest.raises(UserError, match="__0_0.distcp: is damaged"):
        inspect_path(run_dir, verify=True)


def test_verify_says_so_where_there_are_no_digests(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "step_00000004"
    shutil.copytree(layout.step_dir(finished.run_dir, 4), old)
    (old / "digests.json").unlink()
    (old / "COMPLETE").write_text("")
    assert inspect_path(old, verify=True).endswith("\nnothing verified: no digests")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError):
        inspect_path(tmp_path / "model.safetensors", verify=True)


def test_run_directory_means_its_newest_checkpoint(finished: TinyRun) -> None:
    assert inspect_path(finished.run_dir) == inspect_path(layout.step_dir(finished.run_dir, 4))


def test_checksums_are_repeatable_and_change_with_a_weight(finished: TinyRun) -> None:
    first, second = (inspect_path(layout.step_dir(finished.run_dir, step)) for step in (2, 4))
    assert _whole(second) == _whole(inspect_path(finished.run_dir))
    assert _whole(first) != _whole(second)
    old, new = _checksums(first), _checksums(second)
    assert old.keys() == new.keys()
    assert [name for name in old if old[name] == new[name]] == ["rotary.inv_freq"], (
        "training moved all others"
    )


def test_token_store(finished: TinyRun) -> None:
    text = inspect_path(finished.valid)
    assert f"token store {finished.valid} (format 1, checksums hold)" in text
    assert "15 sequences" in text


def test_tables_of_a_benchmark(tmp_path: Path) -> None:
    (tmp_path / "mixed.fasta").write_text(
        ">a TARGET=True SET=train VALIDATION=False\nMKT\n>b TARGET=False SET=test VALIDATION=False\nLL\n"
    )
    out = tmp_path / "sav"
    prepare_flip("sav", tmp_path, out, other_sizes=True)
    lines = [" ".join(line.split()) for line in inspect_path(out).splitlines()]
    assert lines[:4] == [
        f"tables {out} of FLIP (format 1, checksums hold)",
        "task sav",
        "split mixed",
        "kind classification",
    ]
    assert {"train 1 proteins, 3 residues, longest 3", "True 1 100.00 %", "False 1 100.00 %"} <= set(lines)
    with (out / "test.csv").open("a") as file:
        file.write("c,MK,True\n")
    with pytest.raises(UserError, match="test.csv: is missing or was changed"):
        inspect_path(out)
    manifest = json.loads((out / "manifest.json").read_text())
    entry = manifest["splits"]["train"]
    for splits in (
        [],
        {"train": 3},
        {"train": {**entry, "file": 3}},
        {"train": {**entry, "file": "../train.csv"}},
        {"train": {**entry, "longest": None}},
        {"train": {key: value for key, value in entry.items() if key != "sha256"}},
    ):
        (out / "manifest.json").write_text(json.dumps({**manifest, "splits": splits}))
        with pytest.raises(UserError, match="manifest.json: is damaged, it does not describe the splits"):
            inspect_path(out)


def test_the_task_of_a_fine_tuned_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
    settings = [*SETTINGS, f"run_dir={tmp_path}", "train.max_steps=1"]
    train_model([*settings, "task.kind=regression"], train=[("MKT", 1.0), ("LAGV", 4.0)])
    text = inspect_path(tmp_path)
    assert "\ntask regression, head mlp mean, 1 outputs\n" in text
    assert "\noutput 0 target, 2 training labels, mean 2.5, std 1.5\n" in text


def test_damaged_store_is_an_error(finished: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(finished.valid, tmp_path / "store")
    tokens = tmp_path / "store" / "tokens.bin"
    content = bytearray(tokens.read_bytes())
    content[3] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(UserError, match="tokens.bin"):
        inspect_path(tmp_path / "store")


def test_nothing_to_inspect_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such path"):
        inspect_path(tmp_path / "absent")
    with pytest.raises(UserError, match="no complete checkpoint"):
        inspect_path(tmp_path)


def test_a_directory_of_stores_names_them(finished: TinyRun) -> None:
    with pytest.raises(UserError, match=f"did you mean {finished.train} or {finished.valid}[?]"):
        inspect_path(finished.train.parent)
