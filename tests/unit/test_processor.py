"""What a processor says of itself, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega import processor

EPYC = "processor : 0\nmodel name : AMD EPYC\nflags : fpu avx512_vnni avx512_bf16\n" * 2
ARM = "processor : 0\nFeatures : fp asimd bf16\nCPU part : 0xd40\n"


def _written(text: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        (folder / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "CPU_INFO", folder / "cpuinfo")


@pytest.mark.parametrize(
    ("text", "bf16", "int8"),
    [(EPYC, ["avx512_bf16"], ["avx512_vnni"]), (ARM, ["bf16"], []), ("flags : fpu", [], []), (None, [], [])],
)
def test_instructions(
    text: str | None, bf16: list[str], int8: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _written(text, tmp_path, monkeypatch)
    assert processor.instructions(processor.BF16) == bf16
    assert processor.instructions(processor.INT8) == int8


def test_processors_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for text in (EPYC, ARM, EPYC.replace(" avx512_bf16", ""), None):
        (tmp_path / "cpuinfo").unlink(missing_ok=True)
        _written(text, tmp_path, monkeypatch)
        found.append(processor.identity())
        assert processor.model_name() == "AMD EPYC" if text and "EPYC" in text else processor.model_name()
    assert len(set(found)) == 4
    # All cores of one processor are the same.
    assert found[0].count("flags") == 1
