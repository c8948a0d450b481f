"""Lets Megatron-Core's optimizers hold fp64, which they cast to fp32 in several places.

The distributed optimizer casts gradients and saved state to fp32, and every optimizer takes the norm of no
gradients in fp32.

This is for proofs on a CPU: an arithmetic error stands out from rounding of 1e-15, but can hide in 1e-7. The
type check of the distributed optimizer's constructor is adapted in `esm2mega.parallel.cpu`; on a GPU the
distributed optimizer refuses fp64.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# The gradients that the update reads, and the buffers that a checkpoint is gathered in.
_METHODS = ("_copy_model_grads_to_main_grads", "get_parameter_state_dp_zero")
_NORMS = ("get_grad_norm", "clip_grad_norm")
_NAMES = {"float": "double", "float32": "float64"}


def keep_fp64(optimizer: MegatronOptimizer) -> None:
    """Make the optimizers within `optimizer` compute and save in fp64."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for method in _NORMS:
            setattr(part, method, types.MethodType(_with_norm(getattr(type(part), method)), part))
        if isinstance(part, DistributedOptimizer):
            for method in _METHODS:
                setattr(part, method, types.MethodType(_in_double(getattr(type(part), method)), part))


def _with_norm(function: Any) -> types.FunctionType:
    """Return a copy of `function` that calls `_norm` instead of Megatron-Core's norm."""
    function = inspect.unwrap(function)  # it may be under torch.no_grad
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, "get_grad_norm_fp32": _norm},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _norm(grads_for_norm: Any, *args: Any, **kwargs: Any) -> float:
    """Compute the gradient norm; a process without gradients adds a zero of the type that the others reduce.

    A process has no gradients if all of its weights are frozen, or copies.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        grads = grads_for_norm or [torch.zeros(1, dtype=torch.float64, device=device)]
        return get_grad_norm_fp32(grads, *args, **kwargs)


def _in_double(function: Any) -> types.FunctionType:
    """Return a copy of `function` with ``double`` and ``float64`` instead of ``float`` and ``float32``."""
    code = function.__code__
    copied = types.FunctionType(
        _exchange_names(code), function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _exchange_names(code: types.CodeType) -> types.CodeType:
    constants = (_exchange_names(c) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    names = (_NAMES.get(name, name) for name in code.co_names)
    return code.replace(co_consts=tuple(constants), co_names=tuple(names))
