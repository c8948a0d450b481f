"""Counts what a step costs while it runs on real or fake tensors: bytes that live, products, traffic."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_SHARES = {"allreduce_": 2.0, "_allgather_base_": 1.0, "_reduce_scatter_base_": 1.0, "alltoall_base_": 1.0}
"""Says how often each collective sends a rank's share of its largest tensor, as ring algorithms do."""

_ATTENTION: dict[str, Callable[..., float]] = {
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *rest, **_: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda grad, q, k, v, *rest, **_: (
        sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}
"""Counts the operations of kernels that PyTorch has no formula for."""


@dataclass(frozen=True)
class Cost:
    """Holds what one micro-batch costs a stage; every number is linear in the number of layers.

    Attributes:
        peak: Most bytes that activations of one micro-batch have at once.
        held: Bytes that wait for the backward pass when the forward pass is over.
        flops: Operations of matrix products and of attention, with those that are computed again.
        moved: Bytes that all other operations read and write.
        sent: Bytes that the rank sends to its tensor-parallel group.
        exchanged: Bytes that it sends to its context-parallel group.
    """

    peak: float
    held: float
    flops: float
    moved: float
    sent: float
    exchanged: float

    def extended(self, longer: Cost, layers: int) -> Cost:
        """Return the cost of `layers` more layers than this stage has, where `longer` has one more."""
        values = [getattr(self, f.name) + layers * longer.more_than(self, f.name) for f in fields(self)]
        return Cost(*values)

    def more_than(self, other: Cost, name: str) -> float:
        """Return by how much the number `name` is larger here."""
        return getattr(self, name) - getattr(other, name)


class StepCounter(TorchDispatchMode):
    """Counts storages from the operation that makes them until nothing refers to them, and what is computed.

    Views share the storage of what they are views of, and count once.

    Attributes:
        live: Bytes that live now, without those that were there before.
        peak: Most bytes that lived at once.
        flops: As in `Cost`, without the kernels of attention that PyTorch's formulas do not know.
        moved: As in `Cost`.
        sent: As in `Cost`, and all that is not `exchanged`.
        exchanged: As in `Cost`.
    """

    def __init__(self, present: Iterable[Tensor] = ()) -> None:
        """Start at 0.

        Args:
            present: Tensors that are there already and do not count, such as parameters and gradients.
        """
        super().__init__()
        self.live = self.peak = 0
        self.flops = self.moved = self.sent = self.exchanged = 0.0
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in present:
            self._keep(tensor.untyped_storage(), 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            storage = tensor.untyped_storage()
            if id(storage) not in self._known:
                self._keep(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        self._count(func, args, kwargs, result, made)
        return result

    def _count(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, made: list[Tensor]
    ) -> None:
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet.__name__ in _ATTENTION:
            self.flops += _ATTENTION[packet.__name__](*args, **kwargs)
        elif func.namespace == "c10d":
            self._count_collective(packet.__name__, args)
        # Questions of fake tensors, such as where they are, come as operations of their own (prim) too.
        elif func.namespace != "prim" and not func.is_view and "empty" not in packet.__name__:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.nbytes for tensor in (*read, *made))

    def _count_collective(self, name: str, args: tuple[Any, ...]) -> None:
        leaves = tree_leaves(args)
        boxed = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
        (group,) = (
            ProcessGroup.unbox(leaf)
            for leaf in boxed
            if leaf._type().annotation_str.endswith(".ProcessGroup")
        )
        largest = max((leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)), default=0)
        share = (group.size() - 1) / group.size()
        if name == "alltoall_base_" and (counts := args[4]):
            # Of what it gives, a rank keeps the part for itself.
            largest, share = args[1].nbytes, 1.0 - counts[group.rank()] / sum(counts)
        count = _SHARES.get(name, 0.0) * share * largest
        if group.group_name == parallel_state.get_context_parallel_group().group_name and group.size() > 1:
            self.exchanged += count
        else:
            self.sent += count

    def _keep(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)

        def freed(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
