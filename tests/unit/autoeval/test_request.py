"""What an earlier start of a suite left behind: it is the same suite wherever its files lie now."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from esm2mega.autoeval import request as module
from esm2mega.autoeval.eval_model import EvalModel
from esm2mega.autoeval.request import SuiteRequest, begin
from esm2mega.autoeval.tasks import parse_tasks
from esm2mega.errors import UserError
from tests.flip_files import write_gb1, write_secondary_structure


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SuiteRequest:
    """A request whose models have the name of their path for weights, and relative paths."""

    def open_models(checkpoints: list[str], with_contact_head: bool) -> list[EvalModel]:
        names = [Path(path).name for path in checkpoints]
        paths = [os.path.abspath(path) for path in checkpoints]
        return [
            EvalModel(name.partition(".")[0], given, path, name.rpartition(".")[2], 10, 4)
            for name, given, path in zip(names, checkpoints, paths, strict=True)
        ]

    monkeypatch.setattr(module, "open_models", open_models)
    monkeypatch.chdir(tmp_path)
    write_gb1(tmp_path / "flip" / "gb1")
    write_secondary_structure(tmp_path / "flip" / "secondary_structure")
    return SuiteRequest(["runs/m.abc"], parse_tasks(["quick"], "flip"), ["probe"], "flip", "out", {})


def test_a_kill_while_the_request_is_written(asked: SuiteRequest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".request.json.host.1.partial").write_text('{"req')
    models, _ = begin(asked, out)
    assert begin(asked, out)[0] == models
    with pytest.raises(UserError, match="another request: seeds was 1 and is 2; choose another --out"):
        begin(replace(asked, seeds=2), out)
    (out / "request.json").rename(out / "notes.json")
    with pytest.raises(UserError, match=r"holds other files, and no request.json"):
        begin(asked, out)


def test_a_suite_whose_files_have_moved_is_the_same(
    asked: SuiteRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other spellings, other folders, and another name of the model; commands name the places of today."""
    (first,), places = begin(asked, Path("out"))
    noted = places.noted(["embed", first.path, "out/data/t.csv", "--out=x", f"init_from={first.path}"])
    assert noted == [
        "embed",
        str(tmp_path / "runs/m.abc"),
        "data/t.csv",
        "--out=x",
        f"init_from={first.path}",
    ]
    assert places.shown(noted) == noted
    spelled = replace(asked, checkpoints=[first.path], source=str(tmp_path / "flip"))
    assert begin(spelled, tmp_path / "out")[0] == [first]

    (tmp_path / "new").mkdir()
    for name in ("out", "flip"):
        shutil.move(tmp_path / name, tmp_path / "new" / name)
    monkeypatch.chdir(tmp_path / "new")
    (moved,), places = begin(replace(asked, checkpoints=["renamed.abc"]), Path("out"))
    path = str(tmp_path / "new/renamed.abc")
    assert moved == replace(first, path=path), "its name and files of results stay"
    assert places.shown(noted) == ["embed", path, "data/t.csv", "--out=x", f"init_from={path}"]
    assert places.noted(["embed", path, f"run_dir={Path('out/work/run')}"]) == [
        *noted[:2],
        "run_dir=work/run",
    ], "a later start notes the same"


def test_other_weights_or_data_are_refused(asked: SuiteRequest, tmp_path: Path) -> None:
    out = Path("out")
    begin(asked, out)
    with pytest.raises(UserError, match="another request: weights was {'m': 'abc'} and is {'m': 'def'}"):
        begin(replace(asked, checkpoints=["runs/m.def"]), out)
    with pytest.raises(UserError, match="another request: weights"):
        begin(replace(asked, checkpoints=["runs/m.abc", "runs/n.abc"]), out)
    mask = tmp_path / "flip" / "secondary_structure" / "mask.fasta"
    mask.write_text(mask.read_text().replace("0", "1", 1))
    expected = (
        "--source flip: has other data of flip/secondary_structure:sampled than out was begun with: "
        "flip/secondary_structure/mask.fasta has other content; give those, or choose another --out"
    )
    with pytest.raises(UserError) as refused:
        begin(asked, out)
    assert str(refused.value) == expected
    (tmp_path / "flip" / "gb1" / "notes.txt").write_text("what no task reads changes nothing")
    begin(replace(asked, out="other"), Path("other"))
