"""The bytes that a training step sends between ranks, from the sizes alone.

A rank is a process or a device; W ranks share each batch, b pairs each. The learner's features have d numbers of s
bytes, those of the reference model r numbers; w bytes is the size of a number in which the loss computes, e that of an
inner estimate. A rank receives from every other rank, per own pair:

    reduce    d s + r s_r + p w                    features of texts; p = 1 if each anchor has a temperature, else 0
              (3 + m) w                            sums over negatives; m = 1 if there is a mask
              w + d w                              weights of the text anchors, and gradients of texts
    ring      2 (d s + r s_r + p w)                the features of the texts travel in both passes
              (3 + m) w + 3 w + d w                sums over negatives; two sums, a weight and the gradients of texts
    estimates 8 + 2 e                              every rank has all estimates: ids and new estimates
              2 e                                  the same, if every rank knows the ids of the whole batch
              8 + 4 e                              the estimates are split: ids, old and new estimates

With the form ring, the sums and the gradients of the texts make one more hop in each pass, back to the owner: (3 + m) w
+ d w per own pair. The gradients of P parameters are summed once per step, which brings 2 (W - 1) / W P w bytes to each
rank. `messages` lists every exchange of a step, also the small ones: the checks of arguments and the sums of scalars.
A test compares the list with the messages of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = ["Message", "SharedStep", "messages", "received_by_purpose", "received_bytes"]

_DIGEST: Final = 36
"""Bytes of the digest by which ranks compare their arguments."""

_ID: Final = 8
"""Bytes of a row id."""

_SMALL, _FIRST, _SECOND = "checks and scalars", "first pass of the loss", "second pass of the loss"

ALL_GATHER, ALL_SUM, ALL_TO_ALL, REDUCE_SCATTER, SHIFT = (
    "all_gather",
    "all_sum",
    "all_to_all",
    "reduce_scatter",
    "shift",
)


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


@dataclass(frozen=True)
class SharedStep:
    """The sizes of a step that several ranks share.

    Attributes
    ----------
    num_ranks : int
        W.
    num_local : int
        b, the own pairs of each rank.
    feature_dim, feature_bytes : int
        d, and the bytes of a number of the learner's features.
    work_bytes : int
        The bytes of a number in which the loss computes: 4, or 8 for float64.
    state_bytes : int
        The bytes of an inner estimate.
    form : {"reduce", "ring"}
        The way in which the ranks share the pairs; see `drrho_core.sharded_contrastive_step`.
    reference_dim, reference_bytes : int
        r, and the bytes of a number of the reference features; 0 without a reference model.
    per_anchor, masked : bool
        Each anchor has a temperature; a mask says which pairs are no negatives.
    with_ids : bool
        The step gets the row ids, which the ranks compare.
    checked : bool
        The ranks compare arguments before the step: True on the CPU, False on a GPU and in a compiled step.
    estimates : {"none", "all", "rows", "split"}
        none: no estimates are exchanged. all: every rank stores all estimates, and gets ids and new estimates of all
        pairs. rows: the same without the ids. split: each rank stores a part of the estimates.
    num_parameters, parameter_bytes : int
        P, and the bytes of a gradient of a parameter.
    """

    num_ranks: int
    num_local: int
    feature_dim: int
    feature_bytes: int = 4
    work_bytes: int = 4
    state_bytes: int = 4
    form: str = "reduce"
    reference_dim: int = 0
    reference_bytes: int = 4
    per_anchor: bool = False
    masked: bool = False
    with_ids: bool = False
    checked: bool = True
    estimates: str = "none"
    num_parameters: int = 0
    parameter_bytes: int = 4

    @property
    def text_bytes(self) -> int:
        """The bytes of the own texts as the loss sends them: features, reference features and temperatures."""
        numbers = self.feature_dim * self.feature_bytes + self.reference_dim * self.reference_bytes
        return self.num_local * (numbers + self.per_anchor * self.work_bytes)


def messages(step: SharedStep) -> list[Message]:
    """Return all exchanges of a step.

    Examples
    --------
    >>> step = SharedStep(num_ranks=4, num_local=8, feature_dim=16, checked=False)
    >>> for message in messages(step):
    ...     print(message.purpose, message.operation, message.num_bytes, message.times)
    first pass of the loss all_gather 512 1
    first pass of the loss all_to_all 384 1
    checks and scalars all_gather 4 1
    checks and scalars all_sum 12 1
    second pass of the loss all_to_all 128 1
    second pass of the loss reduce_scatter 2048 1
    """
    pass_of_form = _reduce if step.form == "reduce" else _ring
    before, after = pass_of_form(step)
    wide = max(step.work_bytes, step.state_bytes)
    num_scalars = 2 if step.per_anchor else 3
    scalars = [
        Message(_SMALL, ALL_GATHER, wide),
        Message(_SMALL, ALL_SUM, num_scalars * wide),
    ]
    return [*_estimates(step), *_checks(step), *before, *scalars, *after, *_parameters(step)]


def _checks(step: SharedStep) -> list[Message]:
    """Return the exchanges by which ranks compare arguments, and agree about the sizes of the features."""
    if not step.checked:
        return []
    ids = [Message(_SMALL, ALL_GATHER, _ID * step.num_local)] if step.with_ids else []
    num_sizes = 4 if step.reference_dim else 2
    return [
        Message(_SMALL, ALL_GATHER, _DIGEST),
        *ids,
        Message(_SMALL, ALL_GATHER, num_sizes * step.work_bytes),
    ]


def _reduce(step: SharedStep) -> tuple[list[Message], list[Message]]:
    """Return the exchanges of the first and of the second pass."""
    column = step.num_ranks * step.num_local * step.work_bytes
    before = [
        Message(_FIRST, ALL_GATHER, step.text_bytes),
        Message(_FIRST, ALL_TO_ALL, (3 + step.masked) * column),
    ]
    after = [
        Message(_SECOND, ALL_TO_ALL, column),
        Message(_SECOND, REDUCE_SCATTER, step.feature_dim * column),
    ]
    return before, after


def _ring(step: SharedStep) -> tuple[list[Message], list[Message]]:
    """Return the exchanges of the first and of the second pass; a single rank sends nothing."""
    num_hops, column = step.num_ranks - 1, step.num_local * step.work_bytes
    if num_hops == 0:
        return [], []
    sums, gradients = (3 + step.masked) * column, step.feature_dim * column
    # The second pass needs two sums and the weight of each text anchor.
    before = [
        Message(_FIRST, SHIFT, step.text_bytes + sums, num_hops),
        Message(_FIRST, SHIFT, sums),
    ]
    after = [
        Message(_SECOND, SHIFT, step.text_bytes + 3 * column + gradients, num_hops),
        Message(_SECOND, SHIFT, gradients),
    ]
    return before, after


def _estimates(step: SharedStep) -> list[Message]:
    """Return the exchanges of ids and inner estimates."""
    rows, ids = 2 * step.state_bytes * step.num_local, _ID * step.num_local
    if step.estimates == "none":
        return []
    if step.estimates in ("all", "rows"):
        return [Message("estimates", ALL_GATHER, ids * (step.estimates == "all") + rows)]
    # Reading and writing check their arguments; before writing, the ranks also agree that the ids are those just read.
    checks = [Message(_SMALL, ALL_GATHER, _DIGEST, 2), Message(_SMALL, ALL_GATHER, 1)] if step.checked else []
    # If ids cannot be compared, they are sent again.
    times = 1 if step.checked else 2
    return [
        *checks,
        Message("estimates", ALL_GATHER, ids, times),
        Message("estimates", ALL_TO_ALL, step.num_ranks * rows),
        Message("estimates", ALL_GATHER, rows),
    ]


def _parameters(step: SharedStep) -> list[Message]:
    """Return the sum of the parameters' gradients."""
    if not step.num_parameters:
        return []
    return [Message("gradients of parameters", ALL_SUM, step.num_parameters * step.parameter_bytes)]


def received_bytes(step: SharedStep) -> float:
    """Return the number of bytes that each rank receives in a step.

    Examples
    --------
    >>> received_bytes(SharedStep(num_ranks=1, num_local=8, feature_dim=16))
    0.0
    """
    return sum(message.received(step.num_ranks) for message in messages(step))


def received_by_purpose(listed: Iterable[Message], num_ranks: int) -> Mapping[str, float]:
    """Return the bytes that each rank receives by purpose, in the order of the first exchange."""
    received: dict[str, float] = {}
    for message in listed:
        received[message.purpose] = received.get(message.purpose, 0.0) + message.received(num_ranks)
    return received
