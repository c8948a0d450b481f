"""Old names: refused of a user with their successor, read in files that an earlier version wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.config.keys import known_keys
from esm2mega.config.load import load_run, load_run_over, run_from_yaml
from esm2mega.config.renamed import REMOVED, RENAMED, current_settings
from esm2mega.config.resolved import save_resolved
from esm2mega.config.schema import Run
from esm2mega.errors import UserError
from esm2mega.infer.work import differing
from esm2mega.report.run_records import read_config


def test_old_names_are_gone_and_new_ones_are_there() -> None:
    keys = {old: new for old, new in RENAMED.items() if not old.startswith("-")}
    assert not keys.keys() & known_keys().keys()
    assert set(keys.values()) <= known_keys().keys()
    assert not REMOVED.keys() & known_keys().keys()


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_key_is_refused_of_users_and_left_out_of_files(key: str, tmp_path: Path) -> None:
    only = REMOVED[key]
    with pytest.raises(UserError, match=f"override: {key}: removed, since {only} was its only value; leave"):
        load_run(None, [f"{key}={only}"])
    run = load_run(None, ["model.size=tiny"])
    file = tmp_path / "config.yaml"
    save_resolved(run, file)
    section, _, name = key.partition(".")
    file.write_text(file.read_text().replace(f"\n{section}:\n", f"\n{section}:\n  {name}: {only}\n"))
    assert f"  {name}: {only}\n" in file.read_text()
    assert run_from_yaml(file) == load_run(str(file)) == run
    assert key not in read_config(tmp_path)


@pytest.mark.parametrize("key", [key for key in RENAMED if not key.startswith("-")])
def test_an_old_key_is_refused_with_its_successor(key: str, tmp_path: Path) -> None:
    cure = f"{key}: renamed to {RENAMED[key]}; write {RENAMED[key]}=7"
    for load in (lambda: load_run(None, [f"{key}=7"]), lambda: load_run_over(Run(), [f"+{key}=7"])):
        with pytest.raises(UserError) as refused:
            load()
        assert str(refused.value) == f"override: {cure}"
    section, _, name = key.partition(".")
    file = tmp_path / "mine.yaml"
    file.write_text(f"seed: 3\n{section}:\n  {name}: 7\n")
    with pytest.raises(UserError) as refused:
        load_run(str(file))
    assert str(refused.value) == f"{file}:3: {cure}"


@pytest.mark.parametrize("command", ["embed", "predict"])
@pytest.mark.parametrize("words", [["--long", "crop"], ["--long=crop"]])
def test_an_old_option_is_refused_with_its_successor(
    command: str, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "run", "proteins.fasta", "--out", "x.h5", *words]) == 2
    assert capfd.readouterr().err == "esm2mega: error: --long: renamed to --too-long\n"


def test_a_command_that_never_had_the_option_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "run", "--out", "x.csv", "--long", "crop"]) == 2
    assert "No such option" in capfd.readouterr().err


def test_files_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    run = load_run(None, ["model.size=tiny", "infer.too_long=chunk", "infer.micro_batch_tokens=77"])
    file = tmp_path / "config.yaml"
    save_resolved(run, file)
    new = file.read_text()
    old = new.replace("  too_long: chunk", "  long: chunk").replace(
        "  micro_batch_tokens: 77", "  pack_tokens: 77"
    )
    assert old != new
    file.write_text(old)
    assert run_from_yaml(file) == run
    # The file of a run is also a configuration to start another one with.
    assert load_run(str(file)) == run
    shown = read_config(tmp_path)
    assert (shown["infer.too_long"], shown["infer.micro_batch_tokens"]) == ("chunk", "77")
    # As in checkpoints whose configuration was written again by other means.
    file.write_text(old.partition("\n")[2])
    assert run_from_yaml(file) == run


def test_noted_settings_are_compared_by_their_names_of_today() -> None:
    assert current_settings({"long": "crop", "overlap": 3}) == {"too_long": "crop", "overlap": 3}
    assert differing({"long": "crop"}, {"too_long": "crop"}) == ""
    assert differing({"long": "crop"}, {"too_long": "chunk"}) == "too_long was 'crop' and is 'chunk'"
