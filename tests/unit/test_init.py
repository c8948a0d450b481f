"""The package and its folder of fine-tuning export their Python interface and import nothing heavy for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import esm2mega
import esm2mega.finetune
import esm2mega.finetune.api
import esm2mega.infer.api


@pytest.mark.parametrize("module", ["esm2mega", "esm2mega.finetune"])
def test_importing_brings_neither_torch_nor_numpy(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'numpy'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_names_are_those_of_the_modules_that_define_them() -> None:
    for name in ("load", "Model"):
        assert getattr(esm2mega, name) is getattr(esm2mega.infer.api, name)
    for name in ("train_model", "infer_model"):
        assert getattr(esm2mega, name) is getattr(esm2mega.finetune.api, name)
    for name in esm2mega.finetune.__all__:
        assert getattr(esm2mega.finetune, name) is getattr(esm2mega.finetune.api, name)


def test_other_names_are_refused() -> None:
    for module in (esm2mega, esm2mega.finetune):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'lod'"):
            module.lod  # noqa: B018
