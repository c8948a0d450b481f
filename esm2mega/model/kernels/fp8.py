"""Lets Transformer Engine's linears multiply in FP8, whatever the number of tokens that they get.

Its products take no matrix whose rows are not a multiple of 16, or of 32 in blocks of MXFP8. A pack can have
any number of tokens, and the last layer computes as many as have labels.

Legend: ``T`` tokens that a linear gets, ``i`` and ``o`` its inputs and outputs on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.utils import is_te_min_version
from torch import Tensor
from torch.nn.functional import pad

from esm2mega.config.model import FP8_MULTIPLES
from esm2mega.config.schema import ModelConfig
from esm2mega.errors import UserError

CAPABILITIES = {"tensorwise": (8, 9), "mxfp8": (10, 0)}
"""Gives the first compute capability that has the products of each recipe."""

VERSIONS = {"tensorwise": "2.2.0", "mxfp8": "2.1.0"}
"""Gives the first version of Transformer Engine that has each recipe."""


def check_fp8(model: ModelConfig, layer_spec: str, device: torch.device) -> None:
    """Check that this machine has the products that `model.fp8` asks for.

    Args:
        model: Shape and numerics.
        layer_spec: ``local`` or ``te``, as it was chosen for this machine.
        device: Where the model lives.

    Raises:
        UserError: It has not.
    """
    if model.fp8 is None:
        return
    keys = f"model.fp8={model.fp8} with model.fp8_recipe={model.fp8_recipe}"
    if layer_spec != "te":
        raise UserError(
            f"{keys} needs CUDA and Transformer Engine (pip install 'esm2mega[te]'); set model.fp8=null"
        )
    version = VERSIONS[model.fp8_recipe]
    if not is_te_min_version(version):
        raise UserError(
            f"{keys} needs Transformer Engine {version} or later; update it, or set model.fp8=null"
        )
    needed = CAPABILITIES[model.fp8_recipe]
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < needed:
        other = (
            "set model.fp8_recipe=tensorwise" if found >= CAPABILITIES["tensorwise"] else "set model.fp8=null"
        )
        raise UserError(
            f"{keys} needs compute capability {needed[0]}.{needed[1]}, and this GPU has "
            f"{found[0]}.{found[1]}; {other}"
        )


def whole_blocks(linear: Any, recipe: str) -> Any:
    """Return a class as `linear`, one of Megatron-Core's wrappers, that adds rows of 0 and takes them away.

    They change no other row and no gradient. Under sequence parallelism there is nothing to add, which
    `esm2mega.config.model.check_layers` sees to.

    Args:
        linear: The class to derive from.
        recipe: The value of `model.fp8_recipe`.
    """
    multiple = FP8_MULTIPLES[recipe]

    class WholeBlocks(linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            """Return the output, ``[T, 1, o]`` of ``[T, 1, i]``, and the bias that the caller adds."""
            rows = x.shape[0]
            if rows % multiple == 0:
                return super().forward(x)
            output, bias = super().forward(pad(x, (0, 0, 0, 0, 0, -rows % multiple)))
            return output[:rows], bias

    return WholeBlocks
