"""Downloads one file over HTTPS: at most so many bytes, and whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    UnknownHandler,
)

from esm2mega.errors import MachineError, UserError
from esm2mega.files import replacing
from esm2mega.report.progress import Progress
from esm2mega.version import __version__

SECONDS = 30.0
"""A server that is silent for so long is given up."""

_AT_ONCE = 1 << 20
_MOST_DIGITS = 18


def make_opener() -> OpenerDirector:
    """Make what opens addresses: by HTTPS alone, wherever a server sends us on to."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        HTTPSHandler(),
        HTTPRedirectHandler(),
        HTTPErrorProcessor(),
        HTTPDefaultErrorHandler(),
        UnknownHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", f"esm2mega/{__version__}")]
    return opener


def download(url: str, target: Path, limit: int, cure: str) -> str:
    """Download a file to `target`, which appears when it is whole, and show progress on stderr.

    Args:
        url: Address, which begins with ``https:``.
        target: File to make.
        limit: Most bytes that are taken.
        cure: What the user can do without a network.

    Returns:
        A line with the size and the SHA-256 of the file.

    Raises:
        MachineError: The server cannot be reached or does not send the file, or the file cannot be written.
        UserError: What it sends is another thing: a web page, or larger than `limit`.
    """
    digest, size = hashlib.sha256(), 0
    with replacing(target) as partial:
        response = _reached(lambda: make_opener().open(url, timeout=SECONDS), url, cure)
        with response, partial.open("wb") as file:
            expected = _announced(response, url, limit)
            with Progress(expected, f"download {target.name}", "byte") as shown:
                while piece := _reached(lambda: response.read(_AT_ONCE), url, cure):
                    size += len(piece)
                    if size > limit:
                        raise UserError(_too_large(url, limit))
                    digest.update(piece)
                    file.write(piece)
                    shown.update(len(piece))
        if expected is not None and size != expected:
            raise MachineError(f"{url}: only {size:,} of {expected:,} bytes came; start the command again")
    return f"{target}: {size:,} bytes from {url}, SHA-256 {digest.hexdigest()}"


def _reached(call: Callable[[], Any], url: str, cure: str) -> Any:
    """Return what `call` returns; an error of the network gets the address and the cure."""
    try:
        return call()
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error or type(error).__name__).split())
        code = f"{error.code} " if hasattr(error, "code") else ""
        raise MachineError(
            f"{url}: cannot be downloaded ({code}{reason}); is there a network? Without one, {cure}"
        ) from error


def _announced(response: Any, url: str, limit: int) -> int | None:
    """Return the number of bytes that a server announces, if it does; refuse what is no data file."""
    if response.headers.get_content_type() == "text/html":
        raise UserError(
            f"{url}: answers with a web page in place of the file; does the network ask for a login?"
        )
    announced = response.headers.get("Content-Length", "")
    if not announced.isdecimal() or len(announced) > _MOST_DIGITS:
        return None
    if int(announced) > limit:
        raise UserError(_too_large(url, limit))
    return int(announced)


def _too_large(url: str, limit: int) -> str:
    return f"{url}: refused: has more than {limit:,} bytes, which this file never had"
