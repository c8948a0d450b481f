"""Takes single members out of tar archives after checking every member, or out of an unpacked archive."""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from esm2mega.errors import UserError

# Weights hardly compress, and the zero rows of a padded vocabulary are few.
_LARGEST_RATIO = 50
_COPY_BYTES = 1 << 24
_LONGEST_TEXT = 1 << 24


class TarFile:
    """Reads a tar archive, plain or gzip, and extracts only members that are asked for by name."""

    def __init__(self, path: Path) -> None:
        """Open an archive and check all its members.

        Raises:
            UserError: It is not a tar archive, or a member points outside, is a link or a device, or claims a
                size that the file cannot hold.
        """
        self.path = path
        self.members: dict[str, tarfile.TarInfo] = {}
        limit = path.stat().st_size * _LARGEST_RATIO
        total = 0
        try:
            with self._open() as archive:
                for member in archive:
                    self._check(member)
                    total += member.size
                    if total > limit:
                        raise UserError(
                            f"{path}: refused: its members claim more than {_LARGEST_RATIO} times the size "
                            "of the file"
                        )
                    if member.isfile():
                        self.members[str(PurePosixPath(member.name))] = member
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
            raise UserError(f"{path}: not a readable tar archive ({error}); copy it again") from error

    def _open(self) -> tarfile.TarFile:
        with self.path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        return tarfile.open(self.path, "r:gz") if zipped else tarfile.open(self.path, "r:")

    def _check(self, member: tarfile.TarInfo) -> None:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{self.path}: refused: member {member.name!r} points outside the archive")
        if not (member.isfile() or member.isdir()):
            raise UserError(f"{self.path}: refused: member {member.name!r} is a link or a device")

    def read_text(self, name: str) -> str:
        """Return the text of a small member; a large one is refused."""
        member = self._member(name)
        if member.size > _LONGEST_TEXT:
            raise UserError(f"{self.path}: refused: {name} claims {member.size:,} bytes")
        with self._open() as archive:
            source = archive.extractfile(member)
            assert source is not None
            return source.read(_LONGEST_TEXT).decode("utf-8", errors="replace")

    def copy(self, name: str, target: Path) -> None:
        """Copy the bytes of a member to the file `target`, whatever name it has in the archive."""
        member = self._member(name)
        with self._open() as archive, target.open("wb") as out:
            source = archive.extractfile(member)
            assert source is not None
            while block := source.read(_COPY_BYTES):
                out.write(block)
        if target.stat().st_size != member.size:
            raise UserError(f"{self.path}: {name} is cut short; the archive is damaged")

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Yield a temporary file with the bytes of a member, under a name of our own.

        Errors of the block name the member in the place of the file. What is mapped into memory from the file
        outlives its name, so that nothing is left behind, whatever happens next.
        """
        with tempfile.TemporaryDirectory(prefix="esm2mega-") as folder:
            target = Path(folder) / "member"
            self.copy(name, target)
            try:
                yield target
            except UserError as error:
                raise UserError(str(error).replace(str(target), f"{self.path}: {name}")) from error

    def _member(self, name: str) -> tarfile.TarInfo:
        if name not in self.members:
            raise UserError(f"{self.path}: has no member {name}")
        return self.members[name]


class UnpackedArchive:
    """Reads the files of a directory by the names that they have in the archive which it was."""

    def __init__(self, path: Path) -> None:
        """List the files of the directory, and of those in it."""
        self.path = path
        self.members: dict[str, Any] = {
            file.relative_to(path).as_posix(): file
            for pattern in ("*", "*/*")
            for file in path.glob(pattern)
            if file.is_file()
        }

    def read_text(self, name: str) -> str:
        """Return the text of a small file; a large one is refused."""
        try:
            if (size := (self.path / name).stat().st_size) > _LONGEST_TEXT:
                raise UserError(f"{self.path / name}: refused: has {size:,} bytes")
            return (self.path / name).read_text(errors="replace")
        except OSError as error:
            raise UserError(f"{self.path / name}: cannot be read ({error.strerror or error})") from error

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Yield a file by its name in the archive."""
        yield self.path / name
