"""Malicious files end in one line and exit code 2, and leave nothing behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from esm2mega.cli.app import main
from tests.foreign import add_member


class _Attack:
    """Makes a file when it is unpickled without an allow-list."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.victim),)


def tar_with(folder: Path, change: Callable[[tarfile.TarFile], None]) -> Path:
    path = folder / "x.nemo"
    with tarfile.open(path, "w") as archive:
        add_member(archive, "./model_config.yaml", b"num_layers: 1\n")
        change(archive)
    return path


def absolute_path(folder: Path) -> Path:
    return tar_with(folder, lambda archive: add_member(archive, f"{folder}/victim", b"x"))


def parent_directory(folder: Path) -> Path:
    return tar_with(folder, lambda archive: add_member(archive, "a/../../victim", b"x"))


def symbolic_link(folder: Path) -> Path:
    def link(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("./model_weights.ckpt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)

    return tar_with(folder, link)


def huge_member(folder: Path) -> Path:
    """A header that claims a terabyte, in front of nothing."""
    path = tar_with(folder, lambda archive: None)
    info = tarfile.TarInfo("./model_weights.ckpt")
    info.size = 1 << 40
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content + b"\0" * (-len(content) % 512) + info.tobuf(tarfile.GNU_FORMAT))
    return path


def reducing_pickle(folder: Path) -> Path:
    path = folder / "esm2_x.pt"
    torch.save({"cfg": {"model": Namespace()}, "model": _Attack(folder / "victim")}, path)
    return path


def reducing_old_pickle(folder: Path) -> Path:
    path = folder / "x.mdl"
    path.write_bytes(pickle.dumps({"model": _Attack(folder / "victim")}))
    (folder / "x.yaml").write_text(
        "model: {num_hidden_layers: 1, hidden_size: 8, filter_size: 8, num_heads: 2, token_dropout: true}\n"
    )
    return path


def reducing_nemo(folder: Path) -> Path:
    def member(archive: tarfile.TarFile) -> None:
        buffer = io.BytesIO()
        torch.save({"a": _Attack(folder / "victim")}, buffer)
        add_member(archive, "./model_weights.ckpt", buffer.getvalue())

    path = folder / "x.nemo"
    with tarfile.open(path, "w") as archive:
        config = b"num_layers: 1\nhidden_size: 8\nffn_hidden_size: 8\nnum_attention_heads: 2\n"
        add_member(archive, "./model_config.yaml", config)
        member(archive)
    return path


def reducing_unpacked_nemo(folder: Path) -> Path:
    path = folder / "unpacked"
    path.mkdir()
    config = "num_layers: 1\nhidden_size: 8\nffn_hidden_size: 8\nnum_attention_heads: 2\n"
    (path / "model_config.yaml").write_text(config)
    torch.save({"a": _Attack(folder / "victim")}, path / "model_weights.ckpt")
    return path


def reducing_tape(folder: Path) -> Path:
    """Found out while the format is looked for, which opens the file."""
    path = folder / "tape"
    path.mkdir()
    (path / "config.json").write_text("{}")
    torch.save({"bert.a": _Attack(folder / "victim")}, path / "pytorch_model.bin")
    return path


def reducing_megatron(folder: Path) -> Path:
    """Beside the arguments and generator states that are allowed there."""
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir()
    torch.save({"args": Namespace(), "model": {}, "optimizer": _Attack(folder / "victim")}, path)
    return folder


def compressed_entries(folder: Path) -> Path:
    """A ZIP bomb under the name of a PyTorch file."""
    path = folder / "esm2_x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 20))
    return path


def lying_entry(folder: Path) -> Path:
    """An uncompressed entry whose headers claim a terabyte, as a ZIP bomb of overlapping entries has them."""
    path = folder / "esm2_x.pt"
    torch.save({"cfg": {"model": Namespace()}, "model": {"a": torch.zeros(4)}}, path)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    struct.pack_into("<II", content, at + 20, 0xF0000000, 0xF0000000)
    path.write_bytes(content)
    return path


def expanded_tensor(folder: Path) -> Path:
    """4 TB out of four bytes, by strides of 0."""
    path = folder / "esm2_x.pt"
    torch.save({"cfg": {"model": Namespace()}, "model": {"a": torch.zeros(1).expand(1 << 40)}}, path)
    return path


def huge_safetensors_header(folder: Path) -> Path:
    from tests.foreign import HF_CONFIG

    path = folder / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(HF_CONFIG))
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return path


def shard_elsewhere(folder: Path) -> Path:
    from tests.foreign import HF_CONFIG

    path = folder / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(HF_CONFIG))
    index = {"weight_map": {"a": "../victim.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


ATTACKS = {
    absolute_path: "points outside the archive",
    parent_directory: "points outside the archive",
    symbolic_link: "is a link or a device",
    huge_member: "claim more than 50 times the size of the file",
    reducing_pickle: "refused: it would load posix.mkdir",
    reducing_old_pickle: "only tensors and plain values are read",
    reducing_nemo: "model_weights.ckpt: refused: it would load posix.mkdir",
    reducing_unpacked_nemo: "model_weights.ckpt: refused: it would load posix.mkdir",
    reducing_tape: "pytorch_model.bin: refused: it would load posix.mkdir",
    reducing_megatron: "model_optim_rng.pt: refused: it would load posix.mkdir",
    compressed_entries: "is compressed",
    lying_entry: "claim more bytes than the file has",
    expanded_tensor: "holds a tensor larger than its data",
    huge_safetensors_header: "not a readable safetensors file",
    shard_elsewhere: "names a file outside its directory",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_refused_in_one_line(
    attack: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = attack(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code = main(["convert", str(source), str(tmp_path / "target"), "--to", "esm2mega"])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert ATTACKS[attack] in error
    assert sorted(tmp_path.rglob("*")) == before
