"""Every row of the CPU table is needed, does its job, and touches nothing outside Megatron-Core."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable

import pytest
import torch

from esm2mega.config.schema import ParallelConfig
from esm2mega.errors import MachineError
from esm2mega.parallel import cpu
from esm2mega.parallel.initialize import process_groups
from tests.ranks import run_ranks
from tests.unit.parallel.cpu_checks import CHECKS
from tests.unit.parallel.cpu_trials import Finding

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is adapted")


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    folder = tmp_path_factory.mktemp("checks")
    run_ranks(["-m", "tests.unit.parallel.cpu_trials", str(folder / "findings.json")], 1, folder)
    content = json.loads((folder / "findings.json").read_text())
    return {name: Finding(**finding) for name, finding in content.items()}


@pytest.fixture
def adapted() -> None:
    """This process as the command line has it."""
    with process_groups(ParallelConfig(), seed=1):
        pass
    assert cpu._installed


def _name(row: cpu.Row) -> str:
    return row.name


def test_each_row_has_one_check() -> None:
    names = [row.name for row in cpu.ROWS]
    assert len(set(names)) == len(names)
    assert set(CHECKS) == set(names)


@pytest.mark.parametrize("row", cpu.ROWS, ids=_name)
def test_row_finds_its_place(row: cpu.Row, findings: dict[str, Finding]) -> None:
    """Otherwise this Megatron-Core no longer makes the assumption: take the row out of the table."""
    assert findings[row.name].found


@pytest.mark.parametrize("row", cpu.ROWS, ids=_name)
def test_row_does_its_job(row: cpu.Row, findings: dict[str, Finding]) -> None:
    assert findings[row.name].with_row is None


@pytest.mark.parametrize("row", cpu.ROWS, ids=_name)
def test_row_is_needed(row: cpu.Row, findings: dict[str, Finding]) -> None:
    """All other rows without this one fail its check: neither the row nor the check is idle."""
    assert findings[row.name].without_row not in (None, "did not end")


def test_user_code_keeps_the_real_torch(adapted: None) -> None:
    assert torch is sys.modules["torch"]
    assert torch is importlib.import_module("torch")
    for use_gpu in (
        lambda: torch.zeros(1).cuda(),
        lambda: torch.zeros(1, device="cuda"),
        torch.cuda.current_device,
        torch.cuda.synchronize,
    ):
        with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
            use_gpu()


def test_only_listed_modules_see_the_proxy(adapted: None) -> None:
    seen = {
        name for name, module in sys.modules.items() if isinstance(vars(module).get("torch"), cpu._TorchOnCpu)
    }
    assert seen == {row.module for row in cpu.ROWS if isinstance(row, cpu.Namespace)}


def test_proxy_forwards_everything_else(adapted: None) -> None:
    proxy = cpu._TORCH_ON_CPU
    assert proxy.Tensor is torch.Tensor
    assert proxy.distributed is torch.distributed
    assert proxy.cuda.is_available is torch.cuda.is_available
    assert proxy.cuda.current_device() == torch.device("cpu")
    with pytest.raises(AttributeError):
        _ = proxy.cuda.no_such_name


def _fake_module(text: str) -> types.ModuleType:
    module = types.ModuleType("fake_megatron")
    exec(text, vars(module))
    return module


@pytest.fixture
def install_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[types.ModuleType, cpu.Row], None]:
    """`install` with one row for a made-up module."""

    def install(module: types.ModuleType, row: cpu.Row) -> None:
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cpu, "ROWS", (row,))
        monkeypatch.setattr(cpu, "_installed", False)
        cpu.install()

    return install


@pytest.mark.parametrize(
    "row",
    [
        cpu.Replace("fake_megatron", "why", "no_such_function", print),
        cpu.Constant("fake_megatron", "why", "no such literal", "cpu"),
        cpu.Attribute("fake_megatron", "why", "Absent.method", "cuda", "cpu"),
        cpu.Attribute("fake_megatron", "why", "use", "no_such_attribute", "cpu"),
        cpu.Namespace("fake_megatron", "why"),
    ],
    ids=_name,
)
def test_missing_place_is_an_error_with_the_rows_name(
    row: cpu.Row, install_rows: Callable[[types.ModuleType, cpu.Row], None]
) -> None:
    module = _fake_module("def use(x):\n    return x.cuda()")
    with pytest.raises(MachineError) as error:
        install_rows(module, row)
    assert row.name in str(error.value)
    assert "megatron-core" in str(error.value)
    assert "\n" not in str(error.value)


def test_constant_reaches_nested_and_decorated_functions(
    install_rows: Callable[[types.ModuleType, cpu.Row], None],
) -> None:
    module = _fake_module(
        "import functools\n"
        "def decorate(f):\n"
        "    @functools.wraps(f)\n"
        "    def wrapper(*a):\n"
        "        return f(*a)\n"
        "    return wrapper\n"
        "@decorate\n"
        "def decorated():\n"
        "    return 'cuda'\n"
        "def nested():\n"
        "    return (lambda: 'cuda')()\n"
        "def within(x):\n"
        "    return x in ('cuda', 'meta')\n"
        "class Thing:\n"
        "    @staticmethod\n"
        "    def static():\n"
        "        return 'cuda'\n"
        "    @property\n"
        "    def name(self):\n"
        "        return 'cuda'\n"
        "def other():\n"
        "    return 'cuda:0'\n"
    )
    install_rows(module, cpu.Constant("fake_megatron", "why", "cuda", "cpu"))
    assert module.decorated() == module.nested() == module.Thing.static() == module.Thing().name == "cpu"
    assert (module.within("cpu"), module.within("cuda"), module.within("meta")) == (True, False, True)
    assert module.other() == "cuda:0"


def test_install_adapts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second adaptation would not find the places, since they have been exchanged."""
    monkeypatch.setattr(cpu, "ROWS", (cpu.Replace("fake_megatron", "why", "absent", print),))
    monkeypatch.setattr(cpu, "_installed", True)
    cpu.install()


def test_one_of_equals_each_of_its_names() -> None:
    either = cpu._OneOf("a", "b")
    assert either == "a"
    assert either == "b"
    assert either == "b"
    assert either != "c"
    assert (either != "b") is False  # what `!=` itself says
