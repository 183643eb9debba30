"""The exchanges between ranks: how many bytes each rank receives in an operation of `drrho_core.Ranks`.

A rank is a process or a device; W ranks share each batch. `drrho_clip.plan.traffic` lists the exchanges of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

__all__ = ["Message", "received_by_purpose", "received_share"]

ALL_GATHER, ALL_SUM, ALL_TO_ALL, REDUCE_SCATTER, SHIFT = OPERATIONS = (
    "all_gather",
    "all_sum",
    "all_to_all",
    "reduce_scatter",
    "shift",
)
"""The operations of `drrho_core.Ranks`."""

SMALL = "checks and scalars"
"""The purpose of exchanges whose size does not depend on the batch."""


class Message(NamedTuple):
    """An exchange of all ranks, which happens `times` times in a step.

    Attributes
    ----------
    purpose : str
        The content, in words.
    operation : str
        An operation of `drrho_core.Ranks`.
    num_bytes : int
        The size of the argument of each rank.
    times : int
        Number of exchanges of this size.
    """

    purpose: str
    operation: str
    num_bytes: int
    times: int = 1

    def received(self, num_ranks: int) -> float:
        """Return the number of bytes that each rank receives from other ranks.

        Examples
        --------
        >>> Message("gradients of parameters", "all_sum", 100).received(4)
        150.0
        """
        return self.num_bytes * self.times * received_share(self.operation, num_ranks)

    def hops(self, num_ranks: int) -> int:
        """Return how often a rank waits for data of another rank, if the data travel around a ring."""
        around = {ALL_SUM: 2 * (num_ranks - 1), SHIFT: min(1, num_ranks - 1)}
        return self.times * around.get(self.operation, num_ranks - 1)


def received_share(operation: str, num_ranks: int) -> float:
    """Return the bytes that a rank receives in an operation, divided by the bytes of the rank's own argument."""
    others = num_ranks - 1
    if operation == ALL_GATHER:
        return float(others)
    # A sum over all ranks is a reduce-scatter followed by an all-gather of the parts.
    if operation == ALL_SUM:
        return 2.0 * others / num_ranks
    # The arguments of these operations hold a part for each rank; the own part does not travel.
    if operation in (ALL_TO_ALL, REDUCE_SCATTER):
        return others / num_ranks
    return float(others > 0)


def received_by_purpose(listed: Iterable[Message], num_ranks: int) -> Mapping[str, float]:
    """Return the bytes that each rank receives by purpose, in the order of the first exchange."""
    received: dict[str, float] = {}
    for message in listed:
        received[message.purpose] = received.get(message.purpose, 0.0) + message.received(num_ranks)
    return received
