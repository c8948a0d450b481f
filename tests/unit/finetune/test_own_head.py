"""Modules of PyTorch in a head of one's own: their dtype, and dropout that is the same at every layout."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from esm2mega.batch import Segments
from esm2mega.errors import UserError
from esm2mega.finetune.own_head import OwnHead
from esm2mega.model.dropout import KeyedDropout
from tests.own_code import MeanHead
from tests.task_batches import one_pack, proteins_of

CPU = torch.device("cpu")
SEGMENTS = one_pack(proteins_of(["MKTAYIAK", "LAGV", "SERTIDPKQNFY"])).head_inputs


class Dropped(MeanHead):
    """Two dropouts, the second in a sequence of modules, of what `predict` is asked for."""

    dropped: Any = torch.nn.Dropout

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.drop = self.dropped(0.5)
        self.more = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Dropout(0.25))

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return self.more[1](self.drop(features))


class Whole(Dropped):
    dropped = torch.nn.AlphaDropout


def made(cls: Any) -> Any:
    config = SimpleNamespace(hidden_size=16, params_dtype=torch.float64)
    return OwnHead(cls, lambda *_: None)(config, CPU)


@pytest.mark.parametrize("shape", [(3, 64), (24, 64), (3, 4, 16)], ids=["proteins", "residues", "3-d"])
def test_dropout_of_pytorch_drops_by_sample(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    head, ones = made(Dropped), torch.ones(shape, dtype=torch.float64)
    assert head.more[0].weight.dtype == torch.float64
    found = head.predict(ones, SEGMENTS)
    torch.manual_seed(2)
    assert torch.equal(head.predict(ones, SEGMENTS), found)
    rows = ones.flatten(1)
    keys, places = (
        (SEGMENTS.keys, torch.zeros_like(SEGMENTS.keys))
        if shape[0] == 3
        else (SEGMENTS.keys[SEGMENTS.owners], SEGMENTS.numbers)
    )
    expected = KeyedDropout(0.25, 1)(KeyedDropout(0.5, 0)(rows, keys, places), keys, places)
    assert torch.equal(found.flatten(1), expected) and 0.1 < float((found == 0).double().mean()) < 0.95
    assert torch.equal(head.eval().predict(ones, SEGMENTS), ones)


@pytest.mark.parametrize("per_residue", [False, True], ids=["proteins", "residues"])
def test_what_is_dropped_does_not_follow_from_the_pack(per_residue: bool) -> None:
    """Rows of proteins and of residues, also where each protein has one residue, a later one by a crop."""
    whole = one_pack(proteins_of(["M", "LAGV", "S"])).head_inputs
    whole = replace(whole, keys=torch.tensor([5, -6, 7]), numbers=torch.tensor([0, 3, 4, 5, 6, 9]))
    short = replace(
        whole,
        num_proteins=2,
        owners=torch.tensor([0, 1]),
        numbers=whole.numbers[[0, -1]],
        keys=whole.keys[[0, 2]],
    )
    head = made(Dropped)
    rows = [torch.ones(6 if per_residue else 3, 64), torch.ones(2, 64)]
    found = [head.predict(*pack) for pack in zip(rows, (whole, short), strict=True)]
    assert torch.equal(found[0][[0, -1]], found[1]) and 0.1 < float((found[1] == 0).double().mean()) < 0.95


def test_dropouts_that_would_differ_between_processes_are_refused() -> None:
    with pytest.raises(UserError, match="Whole has a torch.nn.AlphaDropout, which would drop other elements"):
        made(Whole)
    with pytest.raises(
        UserError, match=r"got \[5, 64\]; it needs a row for each of 3 proteins or of 24 resi"
    ):
        made(Dropped).predict(torch.ones(5, 64), SEGMENTS)
