"""Makes a token store, once, when a configuration names a file of sequences in place of a store.

The store goes into the user's cache, or where `data.cache_dir` says, under a name that follows from what
decides its content: the file's bytes, how they are read, and the tokenizer. Of several processes that need
it, one makes it under a lock and the others wait.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock

from esm2mega import vocabulary
from esm2mega.config.schema import DataConfig
from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.readers.columns import TableReader
from esm2mega.data.readers.settings import options_of
from esm2mega.data.readers.sources import format_of, open_source
from esm2mega.data.store.manifest import FORMAT_VERSION, cache_lock
from esm2mega.data.store.prepare import OpenProgress, PrepareOptions, prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import MachineError
from esm2mega.files import file_sha256, refuse_stream, split_sheet, user_cache

DIRECTORY = "prepared"
"""The cache has this name, below the user's cache; earlier versions had it beside the run directories."""

_ELSEWHERE = "name a place for it with data.cache_dir=DIR"


def open_store(
    path: str,
    data: DataConfig,
    run_dir: str | None,
    key: str,
    open_progress: OpenProgress | None = None,
    allow_unknown: bool = False,
    shown: Callable[[str], str] = str,
) -> TokenStore:
    """Open the token store at `path`, or the store made of the file there.

    Args:
        path: a token store, or a file in any format of `sources`.
        data: section with the columns of tables, and the cache.
        run_dir: run directory of a training, beside which earlier versions had the cache: a store that is
            there is used. None for other commands.
        key: name of `path` for the user, such as `data.train`.
        open_progress: shows the progress of preparing, in the process that does it.
        allow_unknown: whether a protein may have unknown residues alone.
        shown: puts names that the user knows into a line that is printed.

    Raises:
        UserError: The path is neither of them, or the file is refused.
        MachineError: The cache cannot be written to.
    """
    refuse_stream(path, f"{key}={path}")
    if not is_sequence_file(path):
        store = TokenStore(path)
        if not store.is_sealed and os.environ.get("RANK", "0") == "0":
            _say(
                shown(
                    f"{key}: the manifest of {path} is of an earlier version and has no checksum of its own; "
                    "the other files are compared with theirs"
                )
            )
        return store
    options = options_of(data)
    out = _directory(_store_name(path, options, allow_unknown), data.cache_dir, run_dir)
    if not out.is_dir():
        _make(out.parent)
        with filelock.FileLock(cache_lock(out)):
            if not out.is_dir():
                _say(shown(f"{key}: {path} is prepared, once, into {out}"))
                how = PrepareOptions(options, allow_unknown=allow_unknown)
                report = prepare_fasta([path], out, options=how, open_progress=open_progress)
                for line in report.lines():
                    _say(shown(line))
                return TokenStore(out / "train")
    if os.environ.get("RANK", "0") == "0":
        _say(shown(f"{key}: {path} was prepared before, into {out}"))
    return TokenStore(out / "train")


def _directory(name: str, cache_dir: str | None, run_dir: str | None) -> Path:
    """Return where the store of this name is, or will be."""
    if cache_dir is not None:
        return Path(cache_dir) / name
    if run_dir is not None and (earlier := Path(run_dir).parent / DIRECTORY / name).is_dir():
        return earlier
    return user_cache() / DIRECTORY / name


def _make(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{cache}: cannot be written: {error.strerror or error}; {_ELSEWHERE}") from error


def check_heads(paths: Iterable[str], data: DataConfig) -> None:
    """Open inputs of a run before the first of them is prepared, which may take long.

    The rows of a file are checked when it is prepared: reading a large file twice would take as long.

    Args:
        paths: token stores, or files in any format of `sources`.
        data: section with the columns of tables.

    Raises:
        UserError: A path is neither of them, or the first lines of a file or its columns do not fit.
    """
    options = options_of(data)
    for path in paths:
        if is_sequence_file(path):
            open_source(path, options)
        else:
            TokenStore(path)


def is_sequence_file(path: str) -> bool:
    """Return whether `prepare` can read a path: a file, or a directory of TAPE's or ESM2-FA's data."""
    return split_sheet(path)[0].is_file() or (
        os.path.isdir(path) and format_of(Path(path)) in ("tape", "esm2fa")
    )


def _store_name(path: str, options: SourceOptions, allow_unknown: bool) -> str:
    """Name a store by the file's stem, which people can read, and a hash over all that decides the store."""
    source = open_source(path, options)
    if isinstance(source, TableReader):
        options = source.options  # of a table without a column of variants, others than were given
    content = [file_sha256(file) for file in source.files()]
    parts: tuple[object, ...] = (
        type(source).__name__,
        options,
        content,
        vocabulary.TOKENIZER_HASH,
        FORMAT_VERSION,
    )
    # Not in every name, as below.
    parts += tuple(part for part in (options.of_variants or None, split_sheet(path)[1]) if part is not None)
    if allow_unknown:
        # Not in every name: caches that earlier versions made are found again.
        parts += ("allow_unknown",)
    return f"{Path(path).name.split('.')[0]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
