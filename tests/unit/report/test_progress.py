"""Progress is a bar on a terminal, sparse lines in a file, and nothing on other ranks."""

import io

import pytest

from esm2mega.report import progress as progress_module
from esm2mega.report.progress import Progress, duration


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self):
        return True


class Clock:
    """A clock that moves only when told."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", clock.monotonic)
    return clock


def test_lines_are_at_least_ten_seconds_apart_plus_first_and_last(clock):
    stream = io.StringIO()
    with Progress(100, "pretrain", stream=stream) as progress:
        for _ in range(100):
            clock.now += 0.25
            progress.update(loss=2.5)
    assert stream.getvalue().splitlines() == [
        "pretrain: step 0 of 100 (0 %)",
        "pretrain: step 40 of 100 (40 %), 4.0 step/s, 15 s left, loss 2.5",
        "pretrain: step 80 of 100 (80 %), 4.0 step/s, 5 s left, loss 2.5",
        "pretrain: step 100 of 100 (100 %), 4.0 step/s, loss 2.5",
    ]


def test_resumed_units_are_not_counted_in_the_rate(clock):
    stream = io.StringIO()
    with Progress(100, "pretrain", stream=stream, initial=90) as progress:
        clock.now += 20
        progress.update(5)
    assert stream.getvalue().splitlines()[1] == "pretrain: step 95 of 100 (95 %), 4.0 s/step, 20 s left"


def test_an_unknown_total_shows_no_share_and_no_time_left(clock):
    stream = io.StringIO()
    with Progress(None, "prepare", unit="sequence", stream=stream) as progress:
        clock.now += 10
        progress.update(5000)
    assert stream.getvalue().splitlines() == [
        "prepare: sequence 0",
        "prepare: sequence 5,000, 500 sequence/s",
    ]


def test_disabled_is_silent(clock):
    stream = io.StringIO()
    with Progress(10, "pretrain", enabled=False, stream=stream) as progress:
        clock.now += 100
        progress.update(10)
        progress.message("evaluated")
    assert stream.getvalue() == ""


def test_messages_come_between_lines(clock):
    stream = io.StringIO()
    with Progress(10, "pretrain", stream=stream) as progress:
        progress.message("evaluated [bold]")
    assert stream.getvalue().splitlines()[1] == "evaluated [bold]"


def test_a_terminal_gets_a_bar_with_the_fields(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(10, "pretrain", stream=stream) as progress:
        progress.update(4, loss=2.25)
        progress.message("evaluated [bold]")
        progress.update(6, loss=2.0)
    shown = stream.getvalue()
    assert "10/10" in shown
    assert "loss 2" in shown
    assert "evaluated [bold]" in shown
    assert "pretrain: step" not in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
        (97200, "1 d 03 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
