"""Files of ``torch.save`` whose content is not what was written are refused."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import pytest
import torch

from esm2mega.convert.files import pickles
from esm2mega.convert.files.pickles import load_pickle
from esm2mega.errors import MachineError, UserError


def save(path: Path) -> dict[str, torch.Tensor]:
    content = {"weight": torch.arange(3000.0).reshape(30, 100), "bias": torch.ones(100)}
    torch.save(content, path)
    return content


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Half of them in the tensors, where PyTorch alone takes every one; the padding between may change."""
    path = tmp_path / "weights.pt"
    expected = save(path)
    whole, draw = path.read_bytes(), random.Random(5)
    with zipfile.ZipFile(path) as archive:
        tensors = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    start = whole.index(expected["weight"].numpy().tobytes())
    for number in range(60):
        changed = bytearray(whole)
        place = start + draw.randrange(tensors.file_size) if number % 2 else draw.randrange(len(whole))
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        if number % 2:
            assert not torch.equal(torch.load(path, weights_only=True)["weight"], expected["weight"])
            with pytest.raises(UserError, match="weights.pt: is damaged: its entry .*data/0' is not"):
                load_pickle(path)
            continue
        try:
            found = load_pickle(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_end_of_an_archive_in_several_files(tmp_path: Path) -> None:
    """Python's own test whether a file is an archive raises for it."""
    path = tmp_path / "weights.pt"
    save(path)
    content = path.read_bytes()
    locator = content.rindex(b"PK\x06\x07")
    path.write_bytes(content[: locator + 16] + b"\x02" + content[locator + 17 :])
    with pytest.raises(UserError, match=r"weights.pt: not a readable file of PyTorch \(zipfiles that span"):
        load_pickle(path)


def test_a_file_that_was_written_without_crcs_is_read(tmp_path: Path) -> None:
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this PyTorch always writes CRCs")
    torch.serialization.set_crc32_options(False)
    try:
        expected = save(tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_pickle(tmp_path / "weights.pt")["weight"], expected["weight"])


def test_an_error_of_reading_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "weights.pt")

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", broken)
    with pytest.raises(MachineError, match="weights.pt: cannot be read: Input/output error; this "):
        pickles.load_pickle(tmp_path / "weights.pt")
