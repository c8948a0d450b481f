"""A pack in parts as a program: each rank writes what it computed of the whole pack, and its gradients.

``context_checks FILE DTYPE SIZE``: with SIZE context-parallel ranks; FILE gets an entry for each exchange and
each way to place the labels.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import cross_entropy

from esm2mega.model.build import build_model
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.initialize import process_groups
from tests.unit.runs import tiny_run

LENGTHS = [7, 301, 2, 64, 1, 150, 3, 2, 190]
"""The second lies in three of four parts, the borders of the parts in the middle of others."""

NAMES = ["heads", "needed", "gather"]

PLACES = {
    "everywhere": torch.arange(2, 720, 13),
    # The ranks between the first quarter and the last have no token to predict.
    "ends": torch.cat([torch.arange(0, 170, 7), torch.arange(600, 720, 11)]),
}


def computed(dtype: str, size: int, exchange: str, labels_at: str) -> dict[str, Tensor]:
    """Logits of some tokens, their loss, and the gradient of every parameter, summed over the ranks."""
    run = tiny_run(
        f"model.precision={dtype}",
        "model.num_layers=3",
        "model.hidden_size=96",
        "model.num_attention_heads=12",
        f"parallel.context_parallel_size={size}",
        f"parallel.context_parallel_exchange={exchange}",
    )
    with process_groups(run.parallel, 1) as ranks:
        (model,) = build_model(run.model, run.parallel, torch.device("cpu"), seed=5)
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (0.1 * noise).to(parameter.dtype)
        ids = torch.randint(4, 24, (sum(LENGTHS),), generator=generator)
        places = PLACES[labels_at]
        labels = torch.randint(4, 24, places.shape, generator=generator)
        counts = [int(((places >= a) & (places < b)).sum()) for a, b in _spans()]
        packed = PackedSequences.from_lengths(LENGTHS, row_counts=counts, host_rows=places.numpy())
        logits: Tensor = model(ids, packed, places)
        loss = cross_entropy(logits, labels, reduction="sum")
        loss.backward()
        found: dict[str, Tensor] = {"logits": logits.detach(), "loss": loss.detach()}
        for name, parameter in model.named_parameters():
            gradient: Any = parameter.grad
            if size > 1:
                # As the data-parallel wrapper does; each label counts once for each rank.
                dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
            found[name] = gradient / size
        assert ranks.cp_size == size
    return found


def _spans() -> list[tuple[int, int]]:
    borders = [sum(LENGTHS[:n]) for n in range(len(LENGTHS) + 1)]
    return list(zip(borders[:-1], borders[1:], strict=True))


def main(file: str, dtype: str, size: int) -> None:
    found = {f"{name} {at}": computed(dtype, size, name, at) for name in NAMES for at in PLACES}
    torch.save(found, Path(file).with_suffix(f".{os.environ.get('RANK', '0')}"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
