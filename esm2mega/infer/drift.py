"""Compares a model that multiplies in int8 with itself in fp32, on some of the proteins that it is used for.

Legend: ``L`` residues of a protein, ``h`` hidden size, ``v`` vocabulary (33).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from esm2mega.infer.correlation import spearman
from esm2mega.infer.engine import RunsPacks, WindowPack
from esm2mega.infer.windows import whole
from esm2mega.vocabulary import MASK, STANDARD_RESIDUES

SAMPLED_PROTEINS = 8
"""Limits how many proteins are compared, evenly spaced over the input."""

SAMPLED_RESIDUES = 2048
"""Limits how many residues are compared: each passes through the model twice in fp32 and twice in int8."""

MASKED_EACH = 7
"""Masks every seventh residue for the perplexity, about as many as in training."""

Residues = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Outputs:
    """Holds what is compared of a protein.

    Attributes:
        states: Hidden states of all layers that are asked for, one below the other, ``[layers * L, h]``.
        scan: Log-odds of all standard residues against the one that is there, ``[L, 20]``; None without head.
        masked: -log p(residue) at the masked residues; None without head.
    """

    states: Tensor
    scan: Tensor | None = None
    masked: Tensor | None = None


@dataclass(frozen=True)
class Drift:
    """Says how far int8 is from fp32.

    Attributes:
        proteins: Number of proteins compared.
        residues: Number of their residues.
        cosine: Least cosine between the two vectors of a residue.
        difference: Largest difference of a value of these vectors.
        largest: Largest value of those in fp32.
        perplexity: Perplexity of masked residues in int8 and in fp32; None without a language-model head.
        spearman: Least correlation of the scores of a protein's single substitutions; None without a head.
    """

    proteins: int
    residues: int
    cosine: float
    difference: float
    largest: float
    perplexity: tuple[float, float] | None
    spearman: float | None

    @property
    def parts(self) -> dict[str, float]:
        """Return what `infer.max_drift` bounds, each 0 for equal numbers: how, and how much."""
        parts = {"the cosine of a residue": 1 - self.cosine}
        if self.perplexity is not None:
            parts["the perplexity, relative"] = abs(self.perplexity[0] / self.perplexity[1] - 1)
        if self.spearman is not None:
            parts["Spearman's correlation of a scan"] = 1 - self.spearman
        return parts

    def check(self, bound: float) -> None:
        """Raise `UserError` unless each of `parts` is at most `bound`."""
        name, value = max(self.parts.items(), key=lambda part: math.inf if math.isnan(part[1]) else part[1])
        if not value <= bound:
            raise UserError(
                f"int8 drifts from fp32 by {value:.4f} in {name}, more than --max-drift {bound:g} "
                f"({self}); give --overwrite and --precision fp32 or bf16, or a greater --max-drift"
            )

    def __str__(self) -> str:
        said = [
            f"{self.proteins:,} proteins with {self.residues:,} residues",
            f"cosine at least {self.cosine:.5f}",
            f"largest difference {self.difference:.3g} of values up to {self.largest:.3g}",
        ]
        if self.perplexity is not None:
            said.append("perplexity {:.4f} in int8 and {:.4f} in fp32".format(*self.perplexity))
        if self.spearman is not None:
            said.append(f"Spearman of a scan at least {self.spearman:.5f}")
        return ", ".join(said)


def sample(store: TokenStore, most_residues: int) -> list[Residues]:
    """Choose the proteins that are compared, the same for every number of processes.

    Args:
        store: The proteins at hand.
        most_residues: What the model sees of a protein at once; longer ones are cropped.

    Returns:
        Their residues, uint8 ``[L]`` each.
    """
    if not len(store):
        return []
    chosen: list[Residues] = []
    for number in np.unique(np.linspace(0, len(store) - 1, SAMPLED_PROTEINS).astype(int)).tolist():
        residues = store.residues(number)[: min(most_residues, SAMPLED_RESIDUES)]
        if chosen and sum(map(len, chosen)) + len(residues) > SAMPLED_RESIDUES:
            continue
        chosen.append(residues)
    return chosen


def outputs_of(engine: RunsPacks, proteins: Sequence[Residues], has_lm_head: bool) -> list[Outputs]:
    """Compute what is compared of each protein.

    Args:
        engine: Gives hidden states, and logits if there is a head.
        proteins: Token ids of their residues, uint8 ``[L]`` each.
        has_lm_head: Whether there are logits.
    """
    found = []
    for residues in proteins:
        window = whole(len(residues))
        inside = window.residue_tokens
        plain = window.tokens(residues)
        masked = plain.copy()
        places = np.arange(inside.start, inside.stop, MASKED_EACH)
        masked[places] = MASK
        packs = [WindowPack([window], tokens) for tokens in ([plain, masked] if has_lm_head else [plain])]
        seen, *hidden = engine.run(packs)
        states = torch.cat([layer[inside].double() for _, layer in sorted(seen.hidden.items())])
        if not has_lm_head:
            found.append(Outputs(states))
            continue
        assert seen.logits is not None and hidden[0].logits is not None
        own = torch.from_numpy(residues.astype(np.int64))
        logs = seen.logits[inside].double().log_softmax(-1)
        scan = logs[:, list(STANDARD_RESIDUES)] - logs.gather(1, own[:, None])
        rows = torch.from_numpy(places)
        losses = -hidden[0].logits[rows].double().log_softmax(-1).gather(1, own[rows - inside.start, None])
        found.append(Outputs(states, scan, losses))
    return found


def compare(exact: Sequence[Outputs], other: Sequence[Outputs], residues: int) -> Drift:
    """Compare the outputs of the same proteins, of so many residues, in fp32 and in int8."""
    pairs = list(zip(exact, other, strict=True))
    cosines = [torch.cosine_similarity(a.states, b.states, dim=1).min() for a, b in pairs]
    perplexity, correlation = None, None
    if all(outputs.scan is not None for outputs in exact):
        losses = [torch.cat([o.masked for o in side if o.masked is not None]) for side in (other, exact)]
        perplexity = (float(losses[0].mean().exp()), float(losses[1].mean().exp()))
        correlation = min(_correlation(a.scan, b.scan) for a, b in pairs)
    return Drift(
        proteins=len(pairs),
        residues=residues,
        cosine=float(torch.stack(cosines).min()),
        difference=max(float((a.states - b.states).abs().max()) for a, b in pairs),
        largest=max(float(a.states.abs().max()) for a, _ in pairs),
        perplexity=perplexity,
        spearman=correlation,
    )


def _correlation(exact: Tensor | None, other: Tensor | None) -> float:
    assert exact is not None and other is not None
    return spearman(exact.flatten().numpy(), other.flatten().numpy())


def measured(
    engine: RunsPacks, proteins: Sequence[Residues], has_lm_head: bool, change: Callable[[], None]
) -> Drift | None:
    """Compute in fp32, change the model, compute again, and compare; None without proteins.

    Args:
        engine: Gives hidden states, and logits if there is a head.
        proteins: As for `outputs_of`.
        has_lm_head: Whether there are logits.
        change: Makes the model multiply in int8.
    """
    exact = outputs_of(engine, proteins, has_lm_head)
    change()
    other = outputs_of(engine, proteins, has_lm_head)
    return compare(exact, other, sum(map(len, proteins))) if proteins else None
