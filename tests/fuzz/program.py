"""Runs one command on a changed input, within limits, and writes down what it left; started by the harness.

``python -m tests.fuzz.program REQUEST.json``
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

from esm2mega.cli.app import main
from tests.fuzz import witnesses

_STATUS = Path("/proc/self/status")


def _status(name: str) -> int:
    """Return a size of this process in bytes."""
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


def describe(out: Path) -> dict[str, Any]:
    """Return what a folder of results holds: names and values without what measures time or the machine."""
    found: dict[str, Any] = {}
    special = [*_runs(out, found), *_checkpoints(out, found)]
    for path in sorted(out.rglob("*")):
        if path.is_file() and not any(folder in path.parents for folder in special):
            # HDF5 leaves bytes unused between what it holds.
            held = repr(witnesses.content(path)).encode() if path.suffix == ".h5" else path.read_bytes()
            if path.name == "results.json":
                # A probe notes the checksum of the whole file of embeddings, of such bytes too.
                held = repr({**json.loads(held), "embeddings": None}).encode()
            found[path.relative_to(out).as_posix()] = hashlib.sha256(held).hexdigest()
    return found


def _runs(out: Path, found: dict[str, Any]) -> list[Path]:
    from esm2mega.drill.compare import Remains

    runs = sorted(path.parent for path in [*out.glob("log.jsonl"), *out.glob("*/log.jsonl")])
    for folder in runs:
        if not (folder / "checkpoints").is_dir():
            continue
        remains = Remains(folder)
        name = folder.relative_to(out).as_posix()
        state = {key: value for key, value in remains.state.items() if key != "sha256"}
        found[name] = [remains.digests, state, remains.records]
    return runs


def _checkpoints(out: Path, found: dict[str, Any]) -> list[Path]:
    from esm2mega.checkpoint.tensors import TensorReader, tensor_sha256

    checkpoints = sorted(path.parent for path in out.glob("*/COMPLETE"))
    for folder in checkpoints:
        reader = TensorReader(folder)
        name = folder.relative_to(out).as_posix()
        found[name] = {tensor: tensor_sha256(reader.read(tensor)) for tensor in reader.index}
        found[f"{name}/config.yaml"] = (folder / "config.yaml").read_text()
    return checkpoints


def run(request: dict[str, Any]) -> int:
    """Run a command, describe its results, ask the witness, and write all of it to the report.

    Args:
        request: ``words`` of the command, ``it``, ``out``, ``witness`` or null, ``report``, and ``bytes``, by
            which the memory of this process may grow.
    """
    limit = _status("VmData") + request["bytes"]
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    before = _status("VmRSS")
    code = main(request["words"])
    sys.stdout.flush()
    report: dict[str, Any] = {"grown": max(0, _status("VmHWM") - before), "result": None, "witness": []}
    if code == 0:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        report["result"] = json.loads(json.dumps(describe(Path(request["out"]))))
        if request["witness"]:
            witness = getattr(witnesses, request["witness"])
            report["witness"] = list(witness(Path(request["it"]), Path(request["out"]), request["words"]))
    Path(request["report"]).write_text(json.dumps(report))
    return code


if __name__ == "__main__":
    sys.exit(run(json.loads(Path(sys.argv[1]).read_text())))
