"""The training log survives kills, full disks and resumes."""

import json
import logging
import os

import numpy as np
import pytest
import torch

from esm2mega import files
from esm2mega.errors import MachineError, UserError
from esm2mega.report import log as log_module
from esm2mega.report.log import JsonlLog, read_log, scan_log


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "log.jsonl"


def write_steps(path, *steps):
    with JsonlLog(path) as log:
        for step in steps:
            log.write({"kind": "train", "step": step, "loss": 3.0 - step / 100})


def steps_of(path):
    return [record["step"] for record in read_log(path)]


def test_records_come_back_in_order_one_per_line(path):
    write_steps(path, 1, 2, 3)
    assert steps_of(path) == [1, 2, 3]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_record_is_readable_before_close(path):
    log = JsonlLog(path)
    log.write({"kind": "train", "step": 7})
    assert steps_of(path) == [7]
    log.close()
    log.close()


def test_scalars_of_numpy_and_torch_become_numbers_and_non_finite_becomes_null(path):
    record = {"a": np.float32(0.5), "b": torch.tensor(3), "c": float("nan"), "d": [np.int64(1), float("inf")]}
    with JsonlLog(path) as log:
        log.write(record)
    assert path.read_text() == '{"a": 0.5, "b": 3, "c": null, "d": [1, null]}\n'


def test_a_half_written_last_line_is_dropped_with_a_warning(path, caplog):
    write_steps(path, 1, 2)
    with open(path, "a") as handle:
        handle.write('{"kind": "train", "st')
    with caplog.at_level(logging.WARNING):
        assert steps_of(path) == [1, 2]
    assert "dropped 1 half-written last line" in caplog.text
    assert scan_log(path).dropped_lines == 1


def test_opening_removes_a_half_written_last_line(path):
    write_steps(path, 1)
    with open(path, "a") as handle:
        handle.write('{"kind"')
    write_steps(path, 2)
    assert steps_of(path) == [1, 2]
    assert scan_log(path).dropped_lines == 0


def test_a_complete_record_without_its_newline_counts_as_half_written(path):
    """Its last digit could be missing: 12 cut from 123 is valid JSON, but wrong."""
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"step": 2}')
    assert scan_log(path) == ([{"step": 1}], 1)


@pytest.mark.parametrize("line", ["not json", "[1, 2]", "", "NaN"])
def test_damage_in_the_middle_names_file_and_line(path, line):
    path.parent.mkdir()
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"log\.jsonl:2: not a JSON object"):
        read_log(path)


@pytest.mark.parametrize(
    ("record", "key"),
    [
        *(
            ({"kind": "train", "step": step}, "step")
            for step in (None, "3", 1.5, True, -1, 10**400, [[]], {})
        ),
        *((record, "step") for record in ({"kind": "eval", "valid_loss": 2.0}, {"kind": "train"})),
        *(({"kind": kind, "step": 2}, "kind") for kind in (3, [], {})),
        ({"kind": "eval", "step": 2, "eval_recipe": ["x"]}, "eval_recipe"),
    ],
)
def test_a_value_that_no_run_writes_names_file_line_and_key(path, record, key):
    path.parent.mkdir()
    path.write_text(f'{{"step": 1}}\n{json.dumps(record)}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=rf"log\.jsonl:2: its '{key}' is not what a run writes"):
        read_log(path)


def test_missing_log(path):
    with pytest.raises(UserError, match="no log at"):
        read_log(path)


def test_truncate_after_drops_later_steps_only_and_appending_goes_on(path):
    write_steps(path, 1, 2)
    with JsonlLog(path) as log:
        log.write({"kind": "eval", "step": 2, "valid_loss": 2.5})
    write_steps(path, 3, 4)
    with JsonlLog(path) as log:
        log.write({"kind": "note"})
        log.write({"kind": "test", "step": 2, "test_loss": 2.5})  # of the best weights, at the end of the run
        assert log.truncate_after(2) == 3
        log.write({"kind": "train", "step": 3, "loss": 1.0})
    records = read_log(path)
    assert [record.get("step") for record in records] == [1, 2, 2, None, 3]
    assert records[-1]["loss"] == 1.0
    assert os.listdir(path.parent) == ["log.jsonl"]


def test_truncated_and_rewritten_log_equals_the_unbroken_one(path, tmp_path):
    """A resumed run must leave the log of a run that was never stopped, byte for byte."""
    write_steps(path, 1, 2, 3, 4, 5)
    with JsonlLog(path) as log:
        log.truncate_after(3)
    write_steps(path, 4, 5)
    write_steps(tmp_path / "straight.jsonl", 1, 2, 3, 4, 5)
    assert path.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_truncate_is_all_or_nothing(path, monkeypatch):
    write_steps(path, 1, 2, 3)
    before = path.read_bytes()
    log = JsonlLog(path)

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(MachineError, match="No space left"):
        log.truncate_after(1)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["log.jsonl"]


def test_a_full_disk_is_one_clear_line(path, monkeypatch):
    log = JsonlLog(path)

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_module.os, "write", full)
    with pytest.raises(
        MachineError, match=r"cannot write the log .*log\.jsonl: No space left on device; free space"
    ):
        log.write({"step": 1})


def test_evaluation_records_are_synced_and_training_records_are_not_each_time(path, monkeypatch):
    synced = []
    monkeypatch.setattr(log_module.os, "fsync", synced.append)
    log = JsonlLog(path)
    for step in range(20):
        log.write({"kind": "train", "step": step})
    assert not synced
    log.write({"kind": "eval", "step": 20})
    assert len(synced) == 1
    monkeypatch.setattr(log_module, "SYNC_SECONDS", 0.0)
    log.write({"kind": "train", "step": 21})
    assert len(synced) == 2


def test_a_log_with_records_is_set_aside_under_the_next_free_name(path):
    assert JsonlLog.set_aside(path) is None
    write_steps(path)
    assert JsonlLog.set_aside(path) is None, "an empty log holds nothing to keep"
    for number in (1, 2):
        write_steps(path, number)
        kept = JsonlLog.set_aside(path)
        assert kept == path.with_name(f"log.jsonl.{number}")
        assert steps_of(kept) == [number]
        assert not path.exists()
