"""Lets Megatron-Core's distributed optimizer hold fp64, which it casts to fp32 in several places.

The distributed optimizer casts gradients and saved state to fp32.

This is for proofs on a CPU: an arithmetic error stands out from rounding of 1e-15, but can hide in 1e-7. The
type check of the distributed optimizer's constructor is adapted in `esm2mega.parallel.cpu`; on a GPU the
distributed optimizer refuses fp64.
"""

from __future__ import annotations

import types
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# The gradients that the update reads, and the buffers that a checkpoint is gathered in.
_METHODS = ("_copy_model_grads_to_main_grads", "get_parameter_state_dp_zero")
_NAMES = {"float": "double", "float32": "float64"}


def keep_fp64(optimizer: MegatronOptimizer) -> None:
    """Make the optimizers within `optimizer` compute and save in fp64."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            for method in _METHODS:
                setattr(part, method, types.MethodType(_in_double(getattr(type(part), method)), part))


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
