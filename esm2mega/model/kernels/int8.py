"""Multiplies in int8 in the layers of a loaded model: one scale for each token, one for each output channel.

The products are oneDNN's, which comes with PyTorch. Weights are quantised once, activations as they come
("vector-wise" quantization: Dettmers et al. 2022, LLM.int8(), https://arxiv.org/abs/2208.07339, section 2.2;
"token-wise" in Yao et al. 2022, ZeroQuant, https://arxiv.org/abs/2206.01861, section 4.1). A linear
y = x W^T + b becomes, for token t and output channel o,

    w_o = max_k |W_ok| / 127        Q_ok = round(W_ok / w_o)           in -127 to 127, once
    s_t = max_k |x_tk| / 127        q_tk = round(x_tk / s_t)           in -127 to 127
    y_to = s_t w_o (sum_k q_tk Q_ok) + b_o

After a GELU, which is never below -0.171, half of these levels would be empty, so there x + 0.171 takes all
255 of them, and what it adds is taken off with the bias:

    s_t = max_k (x_tk + 0.171) / 255        q_tk = round((x_tk + 0.171) / s_t)        in 0 to 255
    y_to = s_t w_o (sum_k q_tk Q_ok) + (b_o - 0.171 w_o sum_k Q_ok)

Sums of integers are exact in any order, and scales are of one token alone. So the bits of a token depend
neither on the other tokens nor on their number, nor on the number of threads.

Legend: ``T`` tokens of a pack, ``h`` hidden size, ``k`` inputs of a linear, ``o`` outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esm2mega import processor
from esm2mega.errors import MachineError, UserError

GELU_SHIFT = 0.171
"""Is added to what comes from a GELU: the least value is -0.16998, and -0.17005 by the tanh approximation."""

ROWS = 256
"""Sets how many tokens are computed at once, so that what is between two operations stays in the cache."""

_TINY = torch.finfo(torch.float32).tiny


def check_products() -> None:
    """Refuse a machine without fast and exact products of int8.

    Older processors add two products in 16 bits, which overflow; others get a kernel of some hundred times
    the time. So the instructions are asked for, and the largest values multiplied.

    Raises:
        MachineError: The processor or PyTorch has no such products.
    """
    if not processor.instructions(processor.INT8):
        raise MachineError(
            "--precision int8 needs a processor with AVX-512 VNNI, AVX-VNNI or AMX, and this one names "
            "none of them; use --precision fp32"
        )
    k = 256
    activations = torch.full((64, k), 255, dtype=torch.uint8)
    weight = torch.tensor([127, -127], dtype=torch.int8)[:, None].expand(2, k).repeat(32, 1).contiguous()
    try:
        found = _products(activations, 0, _packed(weight), torch.ones(64), _zeros(64))
    except (AttributeError, RuntimeError) as error:
        raise MachineError(
            f"--precision int8 needs a PyTorch with oneDNN's int8 linears, and this is {torch.__version__} "
            f"({str(error).partition(chr(10))[0]}); use --precision fp32"
        ) from None
    if not torch.equal(found, (activations.long() @ weight.long().t()).float()):
        raise MachineError(
            "--precision int8: products of int8 overflow on this processor; use --precision fp32"
        )


def int8_defect() -> str | None:
    """Return why `check_products` refuses this machine, or None if it does not."""
    try:
        check_products()
    except MachineError as error:
        return str(error)
    return None


def quantize(model: Any) -> None:
    """Let the layers of a model multiply in int8; embedding, LayerNorms, attention and head stay as they are.

    Args:
        model: Weights in fp32 on a CPU, whole (neither tensor-parallel nor with adapters), not trained any
            more. Weights of the layers' linears are freed.

    Raises:
        UserError: A weight is not finite.
    """
    for layer in model.encoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        attention.linear_qkv = Int8Linear(attention.linear_qkv)
        attention.linear_proj = Int8Linear(attention.linear_proj)
        fc1, fc2 = Int8Linear(mlp.linear_fc1), Int8Linear(mlp.linear_fc2, GELU_SHIFT)
        layer.mlp = Int8MLP(fc1, mlp.activation_func, fc2)


class Int8Linear(nn.Module):
    """Stands in for a linear of Megatron-Core: ``[T, 1, k] -> [T, 1, o]``."""

    bias: Tensor
    packed: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, linear: Any, shift: float | None = None) -> None:
        """Quantise the weight.

        Args:
            linear: Has ``weight`` ``[o, k]`` and ``bias`` ``[o]`` in fp32.
            shift: What makes all inputs positive when it is added; None for inputs of either sign.

        Raises:
            UserError: The weight is not finite.
        """
        super().__init__()
        weight = linear.weight.detach()
        scales = (weight.abs().amax(dim=1) / 127).clamp_min_(_TINY)
        if not bool(scales.isfinite().all()):
            raise UserError(
                "a weight is not finite (NaN or infinity), so it has no scale in int8; "
                "`esm2mega inspect` names it"
            )
        quantised = (weight / scales[:, None]).round_().to(torch.int8)
        bias = linear.bias.detach().clone()
        if shift is not None:
            bias -= shift * scales * quantised.sum(dim=1)
        self.shift = shift
        self.register_buffer("packed", _packed(quantised))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", _zeros(len(scales)))
        self.register_buffer("bias", bias)

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        """Compute the linear with its bias; the second value says that none is left to be added."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        outputs = rows.new_empty(len(rows), len(self.scales))
        for some, place in zip(rows.split(ROWS), outputs.split(ROWS), strict=True):
            self.write(some, place)
        return outputs.view(*inputs.shape[:-1], -1), None

    def write(self, rows: Tensor, outputs: Tensor) -> None:
        """Multiply ``[T, k]`` to ``[T, o]``, add the bias, and write that to `outputs`.

        A number in fp32 that 1.5 * 2^23 was added to is rounded to an integer, which its lowest bits are: so
        a level is its lowest byte. PyTorch converts int32 to uint8 many times as fast as fp32.
        """
        if self.shift is None:
            scale, zero = rows.abs().amax(dim=1, keepdim=True) / 127, 128
        else:
            rows = rows + self.shift
            scale, zero = rows.amax(dim=1, keepdim=True) / 255, 0
        scale.clamp_min_(_TINY)  # a token of zeros has no other scale
        magic = torch.full((1, 1), 1.5 * 2**23 + zero)
        levels = torch.addcmul(magic, rows, scale.reciprocal()).view(torch.int32).to(torch.uint8)
        sums = _products(levels, zero, self.packed, self.scales, self.zeros)
        torch.addcmul(self.bias, sums, scale, out=outputs)


class Int8MLP(nn.Module):
    """Stands in for the MLP of a layer: some tokens at once pass through all of it."""

    def __init__(
        self, linear_fc1: Int8Linear, activation: Callable[[Tensor], Tensor], linear_fc2: Int8Linear
    ) -> None:
        """Set the parts.

        Args:
            linear_fc1: From h to the inner channels.
            activation: A GELU.
            linear_fc2: Back to h, of inputs that are shifted.
        """
        super().__init__()
        self.linear_fc1, self.activation, self.linear_fc2 = linear_fc1, activation, linear_fc2

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """Compute ``[T, 1, h] -> [T, 1, h]``; the second value says that no bias is left to be added."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        outputs = torch.empty_like(rows)
        for some, place in zip(rows.split(ROWS), outputs.split(ROWS), strict=True):
            inner = rows.new_empty(len(some), len(fc1.scales))
            fc1.write(some, inner)
            fc2.write(self.activation(inner), place)
        return outputs.view_as(hidden_states), None


def _zeros(count: int) -> Tensor:
    """Return the zero points of a weight: weights are symmetric."""
    return torch.zeros(count, dtype=torch.int64)


def _packed(weight: Tensor) -> Tensor:
    """Arrange an int8 weight ``[o, k]`` as the kernel reads it."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def _products(activations: Tensor, zero: int, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return ``scales_o * sum_k (activations_tk - zero) Q_ok`` in fp32, ``[T, o]``; activations are uint8.

    Of oneDNN's kernels only the one for uint8 is fast with AVX-512 VNNI: int8 gets one without vectors.
    """
    return torch.ops.onednn.qlinear_pointwise(
        activations, 1.0, zero, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
