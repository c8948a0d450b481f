"""A damaged token store through the commands that read one: a line that names the file, and no output."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.data.store import verification
from tests.unit.conftest import TinyRun
from tests.unit.data.damage import flip
from tests.unit.runs import SETTINGS


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("command", ["evaluate", "embed", "compare", "inspect", "pretrain"])
def test_a_flipped_bit_is_one_line(
    finished: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    size: str,
) -> None:
    """Whether a file is small, and compared when the store is opened, or large, and compared after that."""
    if size == "large":
        monkeypatch.setattr(verification, "SMALL_BYTES", 0)
    run_dir, store, out = str(finished.run_dir), tmp_path / "store", tmp_path / "out.h5"
    arguments = {
        "evaluate": [run_dir, "--data", str(store), "--out", str(out)],
        "embed": [run_dir, str(store), "--out", str(out)],
        "compare": [run_dir, run_dir, "--data", str(store), "--out", str(out)],
        "inspect": [str(store)],
        "pretrain": [*SETTINGS, f"data.train={store}", f"run_dir={out}"],
    }[command]
    for name in ("tokens.bin", "tokens.idx", "ids.bin", "ids.offsets.npy", "manifest.json"):
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(finished.train, store)
        flip(store / name, 8 * ((store / name).stat().st_size - 9))
        capsys.readouterr()
        assert main([command, *arguments]) == 2
        said = capsys.readouterr().err.splitlines()
        (error,) = [line for line in said if "error" in line]
        assert f"{store / name}: " in error and "the token store is damaged; make it again" in error
        assert not out.exists() or not list(out.glob("checkpoints/*"))
        assert "Traceback" not in "".join(said)


def test_a_store_of_an_earlier_version_is_used_with_a_line(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its manifest has no checksum of itself; the line says what is compared."""
    shutil.copytree(finished.train, tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    lines = manifest.read_text().splitlines()
    assert lines[-2].startswith(' "sha256": ')
    manifest.write_text("\n".join([*lines[:-3], lines[-3].removesuffix(","), lines[-1]]))
    assert main(["evaluate", str(finished.run_dir), "--data", str(tmp_path / "store")]) == 0
    said = capsys.readouterr().err
    assert (
        f"--data: the manifest of {tmp_path / 'store'} is of an earlier version and has no checksum" in said
    )
