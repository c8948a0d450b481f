"""Finds models of the Hugging Face Hub in its local cache, and says how one that is not there is fetched.

Nothing here uses a network.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"(?P<owner>\w[\w.-]*)/(?P<name>\w[\w.-]*)", re.ASCII)
_REVISION = re.compile(r"\w[\w.-]*", re.ASCII)
_MAIN = "main"
_CACHED = "models--"
_WEIGHTS = ("*.safetensors", "*.bin")


def cached(named: str | os.PathLike[str]) -> Path | None:
    """Return the directory in the cache of the Hub that holds a model, of its branch ``main``.

    Args:
        named: The name of a model, ``owner/name``.

    Returns:
        The directory; None where something is at that path, or the cache has no weights of such a model.
    """
    text = os.fspath(named)
    if not _NAME.fullmatch(text) or os.path.exists(text):
        return None
    folder = _cache() / f"{_CACHED}{text.replace('/', '--')}"
    try:
        revision = (folder / "refs" / _MAIN).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    if not _REVISION.fullmatch(revision):
        return None
    snapshot = folder / "snapshots" / revision
    has_weights = any(path.exists() for pattern in _WEIGHTS for path in snapshot.glob(pattern))
    return snapshot if has_weights else None


def how_to_fetch(named: str | os.PathLike[str]) -> str | None:
    """Return the command that fetches a model, where a path that does not exist may be the name of one.

    It is none if the folder before the name exists: then a file in that folder is meant.
    """
    text = os.fspath(named)
    found = _NAME.fullmatch(text)
    if found is None or os.path.exists(found["owner"]):
        return None
    return (
        f"if it is a model of the Hugging Face Hub, fetch it with `hf download {text} --local-dir "
        f"{found['name']}`, and name that directory"
    )


def shared_name(path: str | os.PathLike[str]) -> str:
    """Return a name for a model that means something elsewhere, in place of a path of this machine.

    A directory in the cache of the Hub has its ``owner/name``, a checkpoint of a run is ``RUN@step_N``.
    """
    *above, name = Path(os.path.abspath(path)).parts
    for part in reversed(above):
        if part.startswith(_CACHED):
            return part.removeprefix(_CACHED).replace("--", "/", 1)
    return f"{above[-2]}@{name}" if above[-1:] == ["checkpoints"] and len(above) > 1 else name


def _cache() -> Path:
    """Return where the Hub's own programs keep what they have fetched."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(caches)) / "huggingface" / "hub"
