"""Downloads: from a server of this process, over HTTPS alone, bounded, whole or not at all."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import build_opener

import pytest

from esm2mega.data.benchmarks import download as module
from esm2mega.data.benchmarks.download import download, make_opener
from esm2mega.errors import MachineError, UserError
from tests.ranks import free_port

CONTENT = bytes(range(256)) * 20
Served = Callable[[dict[str, tuple[str, bytes, int | None]]], str]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Serve contents by path: their type, bytes, and the length that is announced; without HTTPS."""
    files: dict[str, tuple[str, bytes, int | None]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in files:
                self.send_error(404)
                return
            kind, content, length = files[self.path]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(module, "make_opener", build_opener)

        def add(content: dict[str, tuple[str, bytes, int | None]]) -> str:
            files.update(content)
            return f"http://127.0.0.1:{server.server_port}"

        yield add
        server.shutdown()


def test_a_file_comes_whole_and_its_checksum_is_told(serve: Served, tmp_path: Path) -> None:
    address = serve({"/x": ("text/csv", CONTENT, len(CONTENT)), "/y": ("text/csv", CONTENT, None)})
    for name in ("x", "y"):
        line = download(f"{address}/{name}", tmp_path / "new" / name, len(CONTENT), "wait")
        assert (tmp_path / "new" / name).read_bytes() == CONTENT
        assert f"5,120 bytes from {address}/{name}, SHA-256 {hashlib.sha256(CONTENT).hexdigest()}" in line
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x", "y"]


@pytest.mark.parametrize(
    ("served", "error", "message"),
    [
        (("text/csv", CONTENT[1:], 5120), MachineError, "only 5,119 of 5,120 bytes came"),
        (("text/csv", CONTENT + b"1", 5121), UserError, "refused: has more than 5,120 bytes"),
        (("text/csv", CONTENT + b"1", None), UserError, "refused: has more than 5,120 bytes"),
        (("text/html", b"<html>", 6), UserError, "answers with a web page in place of the file"),
        (
            None,
            MachineError,
            r"cannot be downloaded \(404 Not Found\); is there a network\? Without one, wait",
        ),
    ],
)
def test_what_is_not_the_file(
    served: tuple[str, bytes, int] | None,
    error: type[UserError],
    message: str,
    serve: Served,
    tmp_path: Path,
) -> None:
    address = serve({} if served is None else {"/x": served})
    with pytest.raises(error, match=message):
        download(f"{address}/x", tmp_path / "x", 5120, "wait")
    assert list(tmp_path.iterdir()) == []


def test_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot be downloaded \(.*refused\); is there a network\?"):
        download(f"https://127.0.0.1:{free_port()}/x", tmp_path / "x", 10, "wait")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/x", "file:///etc/passwd", "ftp://127.0.0.1/x", "x"])
def test_nothing_but_https(address: str, tmp_path: Path) -> None:
    """An address that a server sends us on to is opened by the same opener."""
    with pytest.raises(MachineError, match="unknown url type"):
        download(address, tmp_path / "x", 10, "wait")
    names = {type(handler).__name__ for handler in make_opener().handlers}
    assert "HTTPSHandler" in names and not names & {"HTTPHandler", "FTPHandler", "FileHandler", "DataHandler"}
