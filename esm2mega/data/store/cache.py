"""Makes the token store when a configuration names a file of sequences in its place, once.

The store is made once, in a directory named by what decides its content: the file's bytes, how they are read,
and the tokenizer. Of several processes that want it, one makes it under a lock and the others wait.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import filelock

from esm2mega import vocabulary
from esm2mega.config.schema import DataConfig
from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.readers.sources import format_of, open_source
from esm2mega.data.store.manifest import FORMAT_VERSION
from esm2mega.data.store.prepare import OpenProgress, PrepareOptions, prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.files import file_sha256

DIRECTORY = "prepared"
"""Name of the cache beside the run directories, where `data.cache_dir` is null."""


def open_store(
    path: str, data: DataConfig, run_dir: str, key: str, open_progress: OpenProgress | None = None
) -> TokenStore:
    """Open the store that `path` is, or the one made of it.

    Args:
        path: a token store, or a file in any format of `sources`.
        data: for the columns of tables, and the cache.
        run_dir: beside which the cache is where `data` names none.
        key: name of `path` for the user, such as `data.train`.
        open_progress: shows how far preparing is, in the process that does it.

    Raises:
        UserError: It is neither, or the file is refused.
    """
    if not is_sequence_file(path):
        return TokenStore(path)
    options = SourceOptions(sequence_column=data.sequence_column, id_column=data.id_column)
    cache = Path(data.cache_dir) if data.cache_dir else Path(run_dir).parent / DIRECTORY
    out = cache / _store_name(path, options)
    if not out.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f".{out.name}.lock"):
            if not out.is_dir():
                _say(f"{key}: {path} is prepared, once, into {out}")
                report = prepare_fasta(
                    [path], out, options=PrepareOptions(options), open_progress=open_progress
                )
                for line in report.lines():
                    _say(line)
                return TokenStore(out / "train")
    if os.environ.get("RANK", "0") == "0":
        _say(f"{key}: {path} was prepared before, into {out}")
    return TokenStore(out / "train")


def is_sequence_file(path: str) -> bool:
    """Whether a path is for `prepare` to read: a file, or a directory with a data base of TAPE."""
    return os.path.isfile(path) or (os.path.isdir(path) and format_of(Path(path)) == "tape")


def _store_name(path: str, options: SourceOptions) -> str:
    """The stem of the file, for a reader, and a hash over all that decides the store."""
    source = open_source(path, options)
    content = [file_sha256(file) for file in source.files()]
    parts = (type(source).__name__, options, content, vocabulary.TOKENIZER_HASH, FORMAT_VERSION)
    return f"{Path(path).name.split('.')[0]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
