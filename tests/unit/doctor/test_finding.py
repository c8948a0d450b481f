"""A line of the report."""

from esm2mega.doctor.finding import MISSING, OK, WARNING, Finding


def test_a_line_has_state_subject_and_cure():
    assert str(Finding(OK, "torch 2.13")) == "ok       torch 2.13"
    assert str(Finding(MISSING, "flash", "build it")) == "missing  flash; build it"
    assert str(Finding(WARNING, "core files", "ulimit -c 0")) == "warning  core files; ulimit -c 0"
