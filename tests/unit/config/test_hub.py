"""Names of the Hugging Face Hub: its local cache serves every command, and messages say how to fill it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esm2mega.cli.app import main
from esm2mega.config.hub import cached, how_to_fetch, shared_name
from tests import foreign

NAME = "facebook/esm2_t6_8M_UR50D"
REVISION = "c731040fcd8d73dceaa04b0a8e6329b345b0f5df"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as `huggingface_hub` lays it out: links to files that have the names of their contents."""
    model = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot, blobs = model / "snapshots" / REVISION, model / "blobs"
    for folder in (snapshot, blobs, model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    (tmp_path / "source").mkdir()
    source = foreign.write_hf(foreign.truth(torch.float32), tmp_path / "source")
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_commands_take_a_name_that_is_in_the_cache(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.fasta").write_text(">a\nMKT\n")
    for arguments in (
        ["embed", NAME, "x.fasta", "--out", "x.h5"],
        ["convert", NAME, "own", "--to", "esm2mega"],
    ):
        assert main(arguments) == 0
        assert f"{NAME}: taken from the cache of the Hub, {hub}" in capsys.readouterr().err
    assert main(["inspect", NAME]) == 0
    assert str(hub) in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed", NAME, "x.fasta", "--out", "x.h5"],
        ["convert", NAME, "own", "--to", "hf"],
        ["convert", NAME, "own", "--to", "hf", "--from", "hf"],
        ["predict", NAME, "x.fasta", "--out", "x.csv"],
        ["inspect", NAME],
        [
            "pretrain",
            "--config",
            "pretrain_esm2_tiny",
            f"init_from={NAME}",
            "data.train=x.fasta",
            "train.eval_every=0",
        ],
        ["finetune", f"init_from={NAME}", "task.kind=regression", "data.train=x.fasta"],
        ["export", NAME, "--to", "torch", "--out", "x.pt2"],
    ],
    ids=lambda arguments: " ".join(arguments[:1]),
)
def test_a_name_that_is_nowhere_prints_the_command(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    Path("x.fasta").write_text(">a y=1\nMKT\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().rpartition("\n")[2]
    assert f"`hf download {NAME} --local-dir esm2_t6_8M_UR50D`, and name that directory" in error


def test_only_whole_models_of_names_are_taken(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached(NAME) == hub
    for text in ("esm2_t6_8M_UR50D", f"{NAME}/x", "../x", "facebook/other", str(tmp_path / NAME)):
        assert cached(text) is None, text
    revision = hub.parents[1] / "refs" / "main"
    for content in ("../..", "", "0" * 40):
        revision.write_text(content)
        assert cached(NAME) is None, content
    revision.write_text(REVISION)
    for variable, value in (("HF_HOME", tmp_path), ("XDG_CACHE_HOME", tmp_path / "cache")):
        monkeypatch.delenv("HF_HUB_CACHE", raising=False)
        monkeypatch.delenv("HF_HOME", raising=False)
        monkeypatch.setenv(variable, str(value))
        if variable == "XDG_CACHE_HOME":
            (tmp_path / "cache").mkdir()
            (tmp_path / "cache" / "huggingface").symlink_to(tmp_path)
        assert cached(NAME) is not None, variable
    # What lies at that path comes first, and a folder of that name means that a file of it is missing.
    Path("facebook").mkdir()
    assert how_to_fetch(NAME) is None and cached(NAME) is not None
    Path(NAME).mkdir()
    assert cached(NAME) is None
    (hub / "model.safetensors").unlink()
    Path(NAME).rmdir()
    assert cached(NAME) is None, "a configuration alone is no model"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (
            "/home/me/.cache/huggingface/hub/models--facebook--esm2_t6_8M_UR50D/snapshots/c731",
            "facebook/esm2_t6_8M_UR50D",
        ),
        ("/scratch/runs/mine/checkpoints/step_00000900", "mine@step_00000900"),
        ("runs/mine", "mine"),
        ("mine", "mine"),
        (".", Path.cwd().name),
    ],
)
def test_a_shared_name_holds_no_path_of_this_machine(path: str, name: str) -> None:
    assert shared_name(path) == name
