"""Writes files and directories whole or not at all, hashes files, and shortens what messages show."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import reprlib
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esm2mega.errors import MachineError, UserError

OTHER_OUT = "choose another --out"
"""This tells the user what to do about a result that cannot be written."""

_HASHED_AT_ONCE = 1 << 20

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


@contextmanager
def replacing(path: Path, cure: str = "", durable: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which replaces `path` in one step when the block ends without an error.

    A kill at any moment leaves the old file or the new one. After an error nothing of the new one remains.

    Args:
        path: The file to replace. The directories above it are made.
        cure: What the user can do about an error, for the message.
        durable: Return only when the file is on the disk under its name, so that a power cut loses nothing.

    Raises:
        MachineError: The file cannot be written. An error that names another file stays an OSError.
    """
    with _growing(path, cure) as partial:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)


_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")


def real_path(path: str | Path) -> Path:
    """Return the absolute path without symbolic links; of links that form a loop, the path as it stands.

    Before Python 3.13 `Path.resolve` raises RuntimeError for a loop; opening the file says what is wrong.
    """
    return Path(os.path.realpath(path))


def refuse_compressed(path: Path) -> None:
    """Refuse the name of a compressed file for one that is plain, which other programs could not read.

    Raises:
        UserError: The name ends so.
    """
    if path.suffix.lower() in _COMPRESSED:
        raise UserError(
            f"{path}: is written without compression; name it {path.stem}, and compress it afterwards"
        )


def check_writable(path: Path) -> None:
    """Make the directories above a result file and try to write there, before the work starts.

    For a command of one process that begins its work now: only the attempt finds a full disk or a file system
    that cannot be written to. Where every rank checks, or the command may still be refused, take `check_out`.

    Raises:
        UserError: It has the name of a compressed file.
        MachineError: The file could not be written.
    """
    refuse_compressed(path)
    with _growing(path, OTHER_OUT) as partial:
        partial.touch()


@contextmanager
def _growing(path: Path, cure: str) -> Iterator[Path]:
    begin = f".{path.name}.{os.uname().nodename}."
    partial = path.with_name(f"{begin}{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # tidying up is no reason to fail
            _remove_left(path.parent, begin)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield partial
    except OSError as error:
        # An error of an open file names none.
        if error.filename is not None and str(error.filename) not in map(str, (path, partial, *path.parents)):
            raise
        reason = f"{path}: cannot be written: {error.strerror or error}"
        raise MachineError(f"{reason}; {cure}" if cure else reason) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _remove_left(folder: Path, begin: str) -> None:
    """Remove what processes of this machine that were killed have left; their number ends the name."""
    for name in os.listdir(folder):
        number = name[len(begin) : -len(".partial")]
        if not (name.startswith(begin) and name.endswith(".partial") and number.isdecimal()):
            continue
        try:
            os.kill(int(number), 0)  # sends nothing
        except (ProcessLookupError, OverflowError):
            (folder / name).unlink(missing_ok=True)
        except PermissionError:
            pass  # it runs, for another user


@contextmanager
def appearing(target: Path, is_directory: bool = True) -> Iterator[Path]:
    """Yield a path to write to, the empty directory or the file that is `target` when the block ends well.

    A kill or an error leaves no `target`, a power cut none that is not whole. Files that the block writes
    beside the file appear beside `target`, before it.

    Raises:
        UserError: It exists.
    """
    refuse_existing(target)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial if is_directory else partial / target.name
        _put_in_place(partial, target, is_directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Refuse to write where something lies already, be it a link to nothing.

    Raises:
        UserError: Something is there.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists; choose another name or remove it")


def _put_in_place(partial: Path, target: Path, is_directory: bool) -> None:
    """Flush what was written to the disk and give it its name."""
    sync_tree(partial)
    if is_directory:
        partial.rename(target)
        return
    files = [path for path in partial.rglob("*") if path.is_file()]
    for path in files:
        if (other := target.with_name(path.name)).exists():
            raise UserError(f"{other}: exists; choose another name or remove it")
    for path in sorted(files, key=lambda path: path.name == target.name):
        path.rename(target.with_name(path.name))


def write_json(path: Path, content: Any, cure: str = "") -> None:
    """Replace a JSON file in one step; see `replacing` for the arguments and errors."""
    with replacing(path, cure) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from a file that may hold anything.

    Raises:
        ValueError: It is not JSON, not UTF-8, or nested so deeply that the parser gives up.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """Read a JSON object that an earlier start of a command wrote; `cure` says what to do without it.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {cure}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no JSON object; {cure}")
    return content


def user_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/esm2mega``, which is ``~/.cache/esm2mega`` where the variable is not set.

    Raises:
        UserError: The user has no home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A relative path is to be ignored, says the specification of the variable.
        caches = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        raise UserError("no home directory is known; set HOME or XDG_CACHE_HOME") from None
    return caches / "esm2mega"


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file below a directory, and the directory's own entries, to the disk."""
    for path in [path for path in folder.rglob("*") if path.is_file()] + [folder]:
        sync(path)


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, which is read in pieces.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        return content_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def content_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file as `file_sha256` does; an error of reading stays an OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(_HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def json_sha256(content: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of a JSON object, whatever the order of its keys and its white space."""
    # Through text and back: keys that are numbers become text before they are sorted.
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_out(path: Path) -> None:
    """Refuse a result file that could not be written, before the work starts; nothing is created.

    For a check that every rank does, or that comes before other reasons to refuse the command. It looks at
    permissions only; `check_writable` tries.

    Raises:
        UserError: The path is a directory, lies where nothing can be written, or names a compressed file.
    """
    refuse_compressed(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        reason = "is a directory"
    elif not folder.is_dir():
        reason = f"{folder} is not a directory"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"{folder} is not writable"
    else:
        return
    raise UserError(f"--out {path}: {reason}; name a file in a directory that can be written to")


STANDARD_INPUT = "-"
"""Commands that read a stream take this as the name of their standard input."""


def split_sheet(path: str | Path) -> tuple[Path, str | None]:
    """Return the file that a path names and, of ``FILE.xlsx#SHEET``, the sheet of the workbook."""
    text = str(path)
    place = text.lower().rfind(".xlsx#")
    if place < 0 or Path(text).exists():
        return Path(text), None
    place += len(".xlsx")
    return Path(text[:place]), text[place + 1 :]


def is_stream(path: str | Path) -> bool:
    """Tell whether a path is standard input, a pipe or a device, whose content can be read only once."""
    if str(path) == STANDARD_INPUT:
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def refuse_stream(path: str | Path, named: str | None = None) -> None:
    """Refuse a stream where a file is read several times, or by several processes.

    Args:
        path: What the user gave.
        named: The path with its option or key, for the message; None for the path alone.

    Raises:
        UserError: It is a stream.
    """
    if is_stream(path):
        raise UserError(
            f"{named or path}: is a stream, and this input is read more than once; write it to a file first"
        )


def first_of(names: Sequence[str], most: int = 8) -> str:
    """Join the first names for a message, and say how many more there are."""
    rest = f", … {len(names) - most} more" if len(names) > most else ""
    shown = [name if name.strip() else repr(name) for name in names[:most]]
    return ", ".join(shown) + rest if names else "none"


def shortened(value: object) -> str:
    """Show a value for a message: a few entries of a list, both ends of a long text."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"{type(value).__name__} with too many digits to be shown"
