"""Adapts Megatron-Core to run without a GPU; one table lists every adaptation.

Megatron-Core assumes CUDA in a few dozen places: it asks ``torch.cuda`` for the current device, creates small
tensors on ``"cuda"``, compares ``Tensor.type()`` with ``"torch.cuda.FloatTensor"`` and keeps CUDA generator
states. `ROWS` names each place, why it matters, and which of four adaptations it gets:

* `Namespace`: the module's global name ``torch`` becomes a proxy that forwards everything to the real torch
  except ``torch.cuda``, which answers for the CPU. Only that module sees the proxy.
* `Constant`: literals such as ``"cuda"`` in the functions of a module are replaced in their code objects.
* `Attribute`: an attribute name in one function is replaced (``weight.cuda()`` becomes ``weight.cpu()``).
* `Replace`: a function or method is bound to ours.

Nothing outside ``megatron.core`` changes: user code keeps the real torch, and ``tensor.cuda()`` still raises
there. `install` runs once, only when CUDA is absent, and fails with the row's name when a Megatron-Core
version no longer has the place (the row must then be revised, see ``tests/unit/parallel/test_cpu.py``).
"""

from __future__ import annotations

import contextlib
import importlib
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from esm2mega.errors import MachineError


class _OneOf(str):
    """Equals any of several names; it replaces a literal that is compared with ``==``."""

    names: frozenset[str]

    def __new__(cls, *names: str) -> _OneOf:
        text = super().__new__(cls, names[0])
        text.names = frozenset(names)
        return text

    def __eq__(self, other: object) -> bool:
        return other in self.names

    def __ne__(self, other: object) -> bool:
        return other not in self.names

    def __hash__(self) -> int:
        return super().__hash__()


class _Stream:
    """Stands for a CUDA stream; a CPU runs its work in order, so there is never anything to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        pass


class _Event(_Stream):
    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


class CudaOnCpu:
    """Answers for ``torch.cuda`` in Megatron-Core's modules when there is no GPU."""

    Stream = _Stream
    Event = _Event

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def current_stream(device: Any = None) -> _Stream:
        return _Stream()

    @staticmethod
    def default_stream(device: Any = None) -> _Stream:
        return _Stream()

    @staticmethod
    def stream(stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _TorchOnCpu(types.ModuleType):
    """Forwards to the real torch, except for ``cuda``, which is `CudaOnCpu`."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = CudaOnCpu()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_TORCH_ON_CPU = _TorchOnCpu()


def _get_cpu_rng_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """Return the CPU generator's state where the RNG tracker and recomputation ask for CUDA's."""
    return torch.get_rng_state()


def _set_cpu_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _load_loss_scale(scaler: Any, state_dict: dict[str, Any]) -> None:
    """Restore what ``state_dict`` of the scaler returned."""
    scaler._scale = state_dict["scale"].cpu()
    scaler._growth_tracker = state_dict["growth_tracker"]
    scaler._hysteresis_tracker = state_dict["hysteresis_tracker"]


@dataclass(frozen=True)
class CudaAssumption(ABC):
    """Describes one assumption: the Megatron-Core module that makes it, why it matters, how to adapt it."""

    module: str
    why: str

    @property
    def name(self) -> str:
        return f"{type(self).__name__} {self.module}"

    @abstractmethod
    def find(self, module: types.ModuleType) -> bool:
        """Return whether this Megatron-Core still makes the assumption (before adaptation)."""

    @abstractmethod
    def adapt(self, module: types.ModuleType) -> None:
        """Make the assumption hold without CUDA."""


@dataclass(frozen=True)
class Namespace(CudaAssumption):
    """Gives the module a ``torch`` whose ``cuda`` namespace answers for the CPU."""

    def find(self, module: types.ModuleType) -> bool:
        return vars(module).get("torch") is torch and any(
            "cuda" in f.__code__.co_names for f in _functions(module)
        )

    def adapt(self, module: types.ModuleType) -> None:
        module.torch = _TORCH_ON_CPU  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Constant(CudaAssumption):
    """Replaces the literal `old` by `new` in every function of the module."""

    old: str
    new: str

    @property
    def name(self) -> str:
        return f"Constant {self.module} {self.old}"

    def find(self, module: types.ModuleType) -> bool:
        return any(_holds(f.__code__, self.old) for f in _functions(module))

    def adapt(self, module: types.ModuleType) -> None:
        for function in _functions(module):
            if _holds(function.__code__, self.old):
                function.__code__ = _exchange(function.__code__, self.old, self.new)


@dataclass(frozen=True)
class Attribute(CudaAssumption):
    """Replaces the attribute name `old` by `new` in one function (``Class.method`` or a function name)."""

    function: str
    old: str
    new: str

    @property
    def name(self) -> str:
        return f"Attribute {self.module}.{self.function} .{self.old}"

    def _function(self, module: types.ModuleType) -> Any:
        owner: Any = module
        for part in self.function.split("."):
            owner = getattr(owner, part, None)
        return owner

    def find(self, module: types.ModuleType) -> bool:
        function = self._function(module)
        return function is not None and self.old in function.__code__.co_names

    def adapt(self, module: types.ModuleType) -> None:
        function = self._function(module)
        names = tuple(self.new if name == self.old else name for name in function.__code__.co_names)
        function.__code__ = function.__code__.replace(co_names=names)


@dataclass(frozen=True)
class Replace(CudaAssumption):
    """Binds the function or method `symbol` (``Class.method``) to `ours`."""

    symbol: str
    ours: Callable[..., Any]

    @property
    def name(self) -> str:
        return f"Replace {self.module}.{self.symbol}"

    def find(self, module: types.ModuleType) -> bool:
        owner, name = self._place(module)
        return callable(getattr(owner, name, None))

    def adapt(self, module: types.ModuleType) -> None:
        owner, name = self._place(module)
        setattr(owner, name, self.ours)

    def _place(self, module: types.ModuleType) -> tuple[Any, str]:
        owner, _, name = self.symbol.rpartition(".")
        return getattr(module, owner, None) if owner else module, name


_FLOAT = _OneOf("torch.FloatTensor", "torch.DoubleTensor")
"""Accepts fp64 too, for the proofs; gradient clipping and the distributed optimizer expect fp32 alone."""

ROWS: tuple[CudaAssumption, ...] = (
    Constant("megatron.core.pipeline_parallel.schedules", "token counter of every schedule", "cuda", "cpu"),
    Namespace(
        "megatron.core.pipeline_parallel.p2p_communication", "receive buffers, synchronize after batched p2p"
    ),
    Namespace("megatron.core.utils", "buffer that sequence parallelism gathers into"),
    Namespace("megatron.core.tensor_parallel.layers", "weight allocation, sequence-parallel gather buffers"),
    Namespace("megatron.core.tensor_parallel.mappings", "buffers of gather and reduce-scatter"),
    Namespace("megatron.core.tensor_parallel.random", "seeding and states of the RNG tracker"),
    Replace(
        "megatron.core.tensor_parallel.random",
        "RNG tracker and recomputation store generator states",
        "_get_cuda_rng_state",
        _get_cpu_rng_state,
    ),
    Replace(
        "megatron.core.tensor_parallel.random",
        "RNG tracker and recomputation restore generator states",
        "_set_cuda_rng_state",
        _set_cpu_rng_state,
    ),
    Attribute(
        "megatron.core.models.common.language_module.language_module",
        "tied embedding of the last pipeline stage is moved to the GPU before its all-reduce",
        "LanguageModule.setup_embeddings_and_output_layer",
        "cuda",
        "cpu",
    ),
    Namespace(
        "megatron.core.distributed.param_and_grad_buffer", "parameter and gradient buffers, streams (0.19)"
    ),
    Constant("megatron.core.optimizer.optimizer", "found-inf flag, loss scale", "cuda", "cpu"),
    Constant(
        "megatron.core.optimizer.optimizer",
        "bf16 parameters get fp32 copies",
        "torch.cuda.BFloat16Tensor",
        "torch.BFloat16Tensor",
    ),
    Constant(
        "megatron.core.optimizer.optimizer",
        "fp16 parameters get fp32 copies",
        "torch.cuda.HalfTensor",
        "torch.HalfTensor",
    ),
    Constant(
        "megatron.core.optimizer.optimizer",
        "fp32 parameters in a bf16 model",
        "torch.cuda.FloatTensor",
        "torch.FloatTensor",
    ),
    Namespace("megatron.core.optimizer.optimizer", "loss scale of chained optimizers"),
    Constant("megatron.core.optimizer.grad_scaler", "loss scale and its factors", "cuda", "cpu"),
    Replace(
        "megatron.core.optimizer.grad_scaler",
        "loss scale of a checkpoint is moved to the GPU",
        "DynamicGradScaler.load_state_dict",
        _load_loss_scale,
    ),
    Constant("megatron.core.optimizer.clip_grads", "norm and overflow buffers", "cuda", "cpu"),
    Constant(
        "megatron.core.optimizer.clip_grads",
        "clipping asserts the gradient's type",
        "torch.cuda.FloatTensor",
        _FLOAT,
    ),
    Constant(
        "megatron.core.optimizer.distrib_optimizer",
        "bf16 shards get fp32 copies",
        "torch.cuda.BFloat16Tensor",
        "torch.BFloat16Tensor",
    ),
    Constant(
        "megatron.core.optimizer.distrib_optimizer",
        "fp16 shards get fp32 copies",
        "torch.cuda.HalfTensor",
        "torch.HalfTensor",
    ),
    Constant(
        "megatron.core.optimizer.distrib_optimizer",
        "fp32 shards are views",
        "torch.cuda.FloatTensor",
        _FLOAT,
    ),
    Namespace("megatron.core.optimizer.distrib_optimizer", "gather buffers of reshardable checkpoints"),
    Namespace("megatron.core.dist_checkpointing.strategies.filesystem_async", "synchronize before writing"),
    Constant(
        "megatron.core.dist_checkpointing.strategies.state_dict_saver",
        "agreement on a cached plan",
        "cuda",
        "cpu",
    ),
    Namespace(
        "megatron.core.dist_checkpointing.strategies.state_dict_saver", "all ranks learn of a failed write"
    ),
    Namespace(
        "megatron.core.dist_checkpointing.strategies.async_utils", "all ranks learn of a finished write"
    ),
)

_installed = False


def install() -> None:
    """Adapt every row of `ROWS`, once per process.

    Raises:
        MachineError: The installed Megatron-Core lacks what a row adapts.
    """
    global _installed
    if _installed:
        return
    modules = [importlib.import_module(row.module) for row in ROWS]
    missing = [row.name for row, module in zip(ROWS, modules, strict=True) if not row.find(module)]
    if missing:
        import megatron.core

        raise MachineError(
            f"megatron-core {megatron.core.__version__} lacks what esm2mega adapts to run without a GPU: "
            f"{'; '.join(missing)}. Use megatron-core 0.16.1 (Python < 3.12) or 0.19.x (Python >= 3.12)"
        )
    for row, module in zip(ROWS, modules, strict=True):
        row.adapt(module)
    _installed = True


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Yield every function defined in `module`: at top level, as methods, and under decorators."""
    seen: set[int] = set()
    pending: list[Any] = list(vars(module).values())
    while pending:
        item = pending.pop()
        if isinstance(item, (staticmethod, classmethod)):
            item = item.__func__
        if isinstance(item, property):
            pending += [f for f in (item.fget, item.fset) if f is not None]
            continue
        if id(item) in seen or getattr(item, "__module__", None) != module.__name__:
            continue
        seen.add(id(item))
        if isinstance(item, type):
            pending += list(vars(item).values())
        elif isinstance(item, types.FunctionType):
            if hasattr(item, "__wrapped__"):
                pending.append(item.__wrapped__)
            yield item


def _holds(code: types.CodeType, value: str) -> bool:
    def within(constant: Any) -> bool:
        if isinstance(constant, types.CodeType):
            return _holds(constant, value)
        return (
            any(within(c) for c in constant)
            if isinstance(constant, (tuple, frozenset))
            else constant == value
        )

    return any(within(constant) for constant in code.co_consts)


def _exchange(code: types.CodeType, old: str, new: str) -> types.CodeType:
    def exchanged(constant: Any) -> Any:
        if isinstance(constant, types.CodeType):
            return _exchange(constant, old, new)
        if isinstance(constant, (tuple, frozenset)):
            return type(constant)(exchanged(c) for c in constant)
        return new if isinstance(constant, str) and constant == old else constant

    return code.replace(co_consts=tuple(exchanged(constant) for constant in code.co_consts))
