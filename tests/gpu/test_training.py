"""The same training steps on CUDA and on the CPU, in processes of their own: results are near."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="benchmarks/ compares with it: pip install esm2mega[dev]")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Distances over the norm of what is compared with. Sums in another order are some hundred fp32 epsilons; bf16
# is as far off on a CPU. Adam divides by the size of a gradient, so weights whose gradient is rounding alone
# may move either way: 3 steps of 1e-4, beside weights of 0.02.
BOUNDS = {"fp32": (1e-4, 1e-2), "bf16": (0.1, 0.1)}


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Measure a line of `benchmarks/gpu.py`, reduced where there is no GPU."""
    folder, reduced = tmp_path_factory.mktemp("gpu"), not torch.cuda.is_available()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        gpu = importlib.import_module("gpu")
        lines = {line.name: line for line in importlib.import_module("gpu_lines").LINES}
        names = set()

        def measured(name: str) -> dict[str, Any]:
            line = lines[name]
            if line.reference is not None and line.reference not in names:
                measured(line.reference)
            entry = gpu.measured(name, 300, folder, reduced, on_cpu=reduced or line.on_cpu)
            assert "failed" not in entry, entry
            names.add(name)
            return entry["rows"][0]

        yield measured


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("parity-fp32-sdpa", marks=pytest.mark.gpu),
        pytest.param("parity-bf16-sdpa", marks=pytest.mark.gpu),
        pytest.param("parity-bf16-varlen", marks=pytest.mark.gpu),
        pytest.param("parity-cpu-bf16-sdpa", marks=pytest.mark.slow),
    ],
)
def test_gradients_and_weights_are_near_those_of_the_cpu(name: str, measure: Any) -> None:
    if "cpu" not in name and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    row = measure(name)
    gradients, weights = BOUNDS[row["precision"]]
    assert row["device"] == ("cpu" if "cpu" in name else "cuda")
    assert float(row["gradients differ"]) < gradients
    assert float(row["weights differ"]) < weights


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["twice-fp32-sdpa", "twice-bf16-sdpa", "twice-bf16-varlen"])
def test_the_same_steps_twice_have_the_same_bits(name: str, measure: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    assert measure(name)["bits equal"]
