"""One checkpoint for all tests of inference."""

from __future__ import annotations

import pytest

from tests.infer_models import Reference, make_reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    return make_reference(tmp_path_factory.mktemp("reference"))
