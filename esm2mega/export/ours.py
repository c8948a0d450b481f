"""Computes with this package what an exported program should compute, one protein after the other.

Legend: ``s`` tokens and ``l`` residues of a protein, ``h`` hidden size, ``v`` vocabulary (33), ``k`` outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esm2mega.batch import Segments
from esm2mega.checkpoint.tensor_filter import ALL
from esm2mega.config.infer import inference_run
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import ParallelConfig, Run
from esm2mega.convert.into_model import fill_model
from esm2mega.convert.start_point import StartPoint
from esm2mega.export.padded import CONTACTS, HEAD
from esm2mega.infer.engine import Engine, OutputRequest, WindowPack, load_model
from esm2mega.infer.maps import in_memory
from esm2mega.infer.source import source_of
from esm2mega.infer.windows import whole
from esm2mega.lora import checkpoint as own
from esm2mega.model.build import build_model
from esm2mega.model.heads import head_of_task
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.initialize import Ranks, process_groups

Outputs = list[dict[str, Tensor]]
"""Outputs of each protein, by the names that the program gives them."""


def expected(start: StartPoint, outputs: Sequence[str], ids: Sequence[Tensor]) -> Outputs:
    """Run the model in fp32, in this process alone.

    Args:
        start: An open checkpoint; one of adapters comes with its base.
        outputs: Which of encoder, head and contacts are wanted.
        ids: Token ids of each protein, int64 ``[s]``.

    Returns:
        For each protein ``last_hidden_state [s, h]``; as far as wanted, ``contacts [s, s]`` and ``logits``:
        ``[s, v]`` of masked language modelling, else ``[k]`` of the protein or ``[s, k]`` of its residues,
        with 0 at ``<cls>`` and ``<eos>``, as in the contacts.

    Raises:
        UserError: Adapters belong to other weights than those of the base.
    """
    run = inference_run(start.run, ["infer.precision=fp32"])
    with process_groups(ParallelConfig(), seed=1) as ranks:
        results = _of_model(start, run, outputs, ids, ranks)
        if HEAD in outputs and start.task is not None:
            for result, logits in zip(results, _of_task(start, run, ids, ranks), strict=True):
                result["logits"] = logits
    return results


def _of_model(
    start: StartPoint, run: Run, outputs: Sequence[str], ids: Sequence[Tensor], ranks: Ranks
) -> Outputs:
    source, last = source_of(start), shape_of(run.model).num_layers
    request = OutputRequest(
        (last,), HEAD in outputs and source.has_lm_head, source.contact_head if CONTACTS in outputs else None
    )
    engine = Engine(load_model(source, run, ranks), ranks, request, max(map(len, ids)))
    packs = [WindowPack([whole(len(x) - 2)], x.numpy().astype("uint8")) for x in ids]
    results: Outputs = []
    for x, pack in zip(ids, engine.run(packs), strict=True):
        result = {"last_hidden_state": pack.hidden[last][: len(x)]}
        if pack.logits is not None:
            result["logits"] = pack.logits[: len(x)]
        if pack.contacts:
            result["contacts"] = torch.nn.functional.pad(in_memory(pack.contacts[0]), (1, 1, 1, 1))
        # Copies: a view would keep the whole pack in memory.
        results.append({name: value.float().cpu().clone() for name, value in result.items()})
    return results


@torch.no_grad()
def _of_task(start: StartPoint, run: Run, ids: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Return the outputs of the head of the task, numbers in the units of the labels."""
    assert start.task is not None
    info = start.task.info
    head, has_lora = head_of_task(start.task.task, info.num_outputs), run.lora.rank is not None
    (model,) = build_model(run.model, run.parallel, ranks.device, run.seed, head, has_lora)
    if start.is_own:
        own.load_model(start, run, [model])
    else:
        fill_model(start.weights, [model], ALL)
    model.eval()
    results = []
    for x in ids:
        packed = PackedSequences.from_lengths([len(x)], ranks.device)
        found = model(x.to(ranks.device), packed, Segments.of_protein(x).to(ranks.device)).cpu()
        if info.std:
            found = found * torch.tensor(info.std) + torch.tensor(info.mean)
        results.append(torch.nn.functional.pad(found, (0, 0, 1, 1)) if info.per_residue else found[0])
    return results
