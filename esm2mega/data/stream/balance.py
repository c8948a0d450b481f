"""Divides packs among data-parallel ranks so that attention costs each of them about as much.

Packs have about T tokens each, but the work of attention grows with the square of a protein's length: a pack
of one protein of 16,384 tokens costs 49 times as much there as one of proteins of 335. The ranks wait for
each other at the end of a step, and so for the one whose packs cost most. Which packs a step takes is not
changed, only which rank takes them, so its result is the same sum in another order.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def share_out(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Divide packs among ranks: the costliest first, each to the rank that has least and still has room.

    It is a pure function, so all ranks and all their workers find the same shares. Of equal packs the one
    with the smaller number comes first, and of equal ranks the lower one. Where no rank gets a second pack,
    nothing can be balanced, and they are dealt in their order.

    Args:
        costs: Cost of each pack.
        ranks: Number of ranks.

    Returns:
        The numbers of the packs of each rank, ascending: for every rank as many as for the others, or fewer
        where the packs cannot be divided evenly.
    """
    rounds = -(-len(costs) // ranks)
    if rounds <= 1:
        return [[rank] if rank < len(costs) else [] for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    by_load = [(0, rank) for rank in range(ranks)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, rank = heapq.heappop(by_load)
        shares[rank].append(number)
        if len(shares[rank]) < rounds:
            heapq.heappush(by_load, (load + costs[number], rank))
    return [sorted(share) for share in shares]
