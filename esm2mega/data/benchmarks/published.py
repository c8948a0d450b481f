"""Downloads the published files of DeepLoc 2, FLIP and TAPE, where they are not there yet.

Each function returns lines that say what was downloaded, and leaves files that are there as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from esm2mega.archives import TarFile
from esm2mega.data.benchmarks.download import download
from esm2mega.data.benchmarks.flip import find_file, sequence_files
from esm2mega.data.benchmarks.names import FLIP_TASKS, TAPE_TASKS
from esm2mega.data.benchmarks.tape import find_split
from esm2mega.data.readers.tape import require_lmdb
from esm2mega.errors import UserError
from esm2mega.files import user_cache

DEEPLOC2 = (
    "https://services.healthtech.dtu.dk/services/DeepLoc-2.0/data/Swissprot_Train_Validation_dataset.csv"
)
FLIP = "https://data.bioembeddings.com/public/FLIP/fasta/"
TAPE = "https://s3.amazonaws.com/songlabdata/proteindata/data_pytorch/"
"""These are the addresses that the three projects publish."""

_LARGEST_TABLE = 2 << 30
_LARGEST_ARCHIVE = 16 << 30


def download_deeploc2(source: Path) -> list[str]:
    """Download DeepLoc 2's table to the file `source`."""
    if source.is_file():
        return [f"{source}: is there already, and is not downloaded"]
    cure = "get that file elsewhere and name it with --source"
    return [download(DEEPLOC2, source, _LARGEST_TABLE, cure)]


def download_flip(task_name: str, split: str | None, folder: Path) -> list[str]:
    """Download the files of one split of a FLIP task, a name in `FLIP_TASKS`, to the directory `folder`."""
    lines = []
    cure = f"get the files of {FLIP}{task_name}/ elsewhere and name their directory with --source"
    for stems in sequence_files(FLIP_TASKS[task_name], split):
        if folder.is_dir() and (found := find_file(folder, stems)) is not None:
            lines.append(f"{found}: is there already, and is not downloaded")
            continue
        url = f"{FLIP}{task_name}/{stems[0]}.fasta"
        lines.append(download(url, folder / f"{stems[0]}.fasta", _LARGEST_TABLE, cure))
    return lines


def download_tape(task_name: str, folder: Path) -> list[str]:
    """Download the archive of a TAPE task, a name in `TAPE_TASKS`, and take its files out to `folder`.

    Raises:
        UserError: The archive does not hold the files of the task, or the package that reads them is missing.
    """
    task = TAPE_TASKS[task_name]
    require_lmdb(folder)  # before gigabytes that could not be read
    if (found := find_split(folder, task, "train")) is not None:
        return [f"{found}: is there already, and is not downloaded"]
    url = f"{TAPE}{task.folder}.tar.gz"
    cure = "get that archive elsewhere, unpack it, and name its directory with --source"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        packed = Path(temporary) / f"{task.folder}.tar.gz"
        line = download(url, packed, _LARGEST_ARCHIVE, cure)
        archive = TarFile(packed)
        names = [f"{task.folder}_{split}.lmdb" for split in task.splits]
        members = {name: _member(archive.members, name) for name in names}
        if members[names[0]] is None:
            raise UserError(f"{url}: holds no {names[0]}; {cure}")
        for name, member in members.items():
            if member is not None:
                # A name of its own, whatever the archive calls it.
                (Path(temporary) / name).mkdir()
                archive.copy(member, Path(temporary) / name / "data.mdb")
        # The training split last: where it is, all are.
        for name in reversed([name for name, member in members.items() if member is not None]):
            (Path(temporary) / name).rename(folder / name)
    return [line.replace(str(packed), f"{folder} (unpacked)")]


def _member(members: Iterable[str], name: str) -> str | None:
    """Return the member that is the database `name`, a file or a directory that holds ``data.mdb``."""
    for member in members:
        parts = PurePosixPath(member).parts
        if parts[-1] == name or parts[-2:] == (name, "data.mdb"):
            return member
    return None


def place_of(benchmark: str, source: str | None, download: bool, file_name: str = "") -> Path:
    """Return where the published files are, or are downloaded to.

    Args:
        benchmark: Name of the folder among those of all benchmarks.
        source: The option ``--source``; None for a place in the user's cache.
        download: The option ``--download``.
        file_name: Name of the file, if the source is one.

    Raises:
        UserError: Neither option is given.
    """
    if source is not None:
        return Path(source)
    if not download:
        what = "file" if file_name else "directory"
        raise UserError(f"give --source with the {what} as it is published, or --download to fetch it")
    return user_cache() / "downloads" / benchmark / file_name
