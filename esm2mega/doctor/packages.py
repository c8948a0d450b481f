"""Checks the versions of Python, of the required packages and of the optional ones, without importing any."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement

from esm2mega.doctor.finding import FAILED, MISSING, OK, Finding

OPTIONAL = {
    "scipy": ("metrics of esm2mega finetune", "finetune"),
    "scikit-learn": ("metrics of esm2mega finetune", "finetune"),
    "pyarrow": ("Parquet", "parquet"),
    "openpyxl": ("Excel", "excel"),
    "onnx": ("esm2mega export --to onnx", "onnx"),
    "onnxscript": ("esm2mega export --to onnx", "onnx"),
    "onnxruntime": ("esm2mega export --to onnx", "onnx"),
    "lmdb": ("TAPE's LMDB files", "tape"),
    "tensorboard": ("logging.tensorboard", "logging"),
    "wandb": ("logging.wandb", "logging"),
}
"""Gives what each package is for, and the extra that installs it; `kernels.py` tries those with kernels."""


def check_packages() -> Iterator[Finding]:
    """Yield Python, the required packages and the optional ones with their versions."""
    yield Finding(OK, f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from check_requirements()
    for name, (use, extra) in OPTIONAL.items():
        found = installed_version(name)
        if found is None:
            yield Finding(MISSING, f"{name} ({use})", f"pip install 'esm2mega[{extra}]'")
        else:
            yield Finding(OK, f"{name} {found} ({use})")


def check_requirements() -> Iterator[Finding]:
    """Compare every package that the installed esm2mega requires here with the versions that it allows."""
    try:
        lines = importlib.metadata.requires("esm2mega") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            MISSING,
            "requirements of esm2mega: not known, since it runs without being installed",
            "pip install --editable . in its folder",
        )
        return
    # With an empty extra, the markers of all extras are false.
    requirements = [
        r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})
    ]
    for requirement in requirements:
        found, needs = installed_version(requirement.name), f"{requirement.name}{requirement.specifier}"
        if found is None:
            yield Finding(FAILED, f"{requirement.name} is not installed", f"pip install '{needs}'")
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Finding(FAILED, f"{requirement.name} {found} is not supported", f"pip install '{needs}'")
        else:
            yield Finding(OK, f"{requirement.name} {found}")


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
