"""The bytes that a training step sends between ranks, from the sizes alone.

A rank is a process or a device; W ranks share each batch, b pairs each. The learner's features have d numbers of s
bytes, those of the reference model r numbers; w bytes is the size of a number in which the loss computes, e that of an
inner estimate. A rank receives from every other rank, per own pair:

    reduce    d s + r s_r + p w                    features of texts; p = 1 if each anchor has a temperature, else 0
              (3 + m) w                            sums over negatives; m = 1 if there is a mask
              w + d w                              weights of the text anchors, and gradients of texts
    ring      2 (d s + r s_r + p w)                the features of the texts travel in both passes
              (3 + m) w + 3 w + d w                sums over negatives; two sums, a weight and the gradients of texts
    sigmoid   d s + d w                            features of texts, and their gradients; no sums over negatives
    distill   d s + r s_r + 6 w                    features of texts, and sums over negatives for both models
              4 w + (d + 2) w                      peaks and factors of both models; gradients of texts, and two sums
    estimates 8 + 2 e                              every rank has all estimates: ids and new estimates
              2 e                                  the same, if every rank knows the ids of the whole batch
              8 + 4 e                              the estimates are split: ids, old and new estimates
    temperatures per sample, which a run keeps
              2 w                                  every rank has all of them: gradients
              8 + 8 e                              they are split: ids; temperatures and momenta, old and new

With the form ring, the distillation loss sends the features twice, and the sums and the gradients of the texts make one
more hop in each pass, back to the owner: (3 + m) w + d w per own pair. The gradients of P parameters are summed once
per step, which brings 2 (W - 1) / W P w bytes to each rank. A method that selects its pairs sends more, see
`drrho_clip.plan.selection_traffic`. `messages` lists every exchange of a step, also the small ones: the checks of
arguments and the sums of scalars. Tests compare the list with the messages of a step, and with those of training runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from drrho_clip.plan.exchanges import ALL_GATHER, ALL_SUM, ALL_TO_ALL, REDUCE_SCATTER, SHIFT, SMALL, Message
from drrho_clip.plan.selection_traffic import Selection, selection_messages

__all__ = ["SharedStep", "messages", "received_bytes"]

_DIGEST: Final = 36
"""Bytes of the digest by which ranks compare their arguments."""

_ID: Final = 8
"""Bytes of a row id."""

_FIRST, _SECOND, _TEACHER = "first pass of the loss", "second pass of the loss", "distillation"
_ESTIMATES, _TEMPERATURES = "estimates", "temperatures"


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
        r, and the bytes of a number of the reference features; r is 0 if the loss reads no reference features.
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
    loss : {"contrastive", "info_nce", "sigmoid"}
        The objective of the step.
    teacher_dim : int
        Number of features of a reference text that the distillation loss reads; 0 without this loss.
    temperatures : bool
        The temperatures per sample are stored where the estimates are.
    selection : Selection, optional
        The sizes of the super-batch from which the ranks select the pairs of the step.
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
    loss: str = "contrastive"
    teacher_dim: int = 0
    temperatures: bool = False
    selection: Selection | None = None

    @property
    def text_bytes(self) -> int:
        """The bytes of the own texts as the loss sends them: features, reference features and temperatures."""
        numbers = self.feature_dim * self.feature_bytes + self.reference_dim * self.reference_bytes
        return self.num_local * (numbers + self.per_anchor * self.work_bytes)

    @property
    def column(self) -> int:
        """The bytes of a number for each own text."""
        return self.num_local * self.work_bytes


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
    chosen = [] if step.selection is None else selection_messages(step.selection, step.num_ranks)
    loss = _sigmoid(step) if step.loss == "sigmoid" else _two_passes(step)
    return [*_estimates(step), *chosen, *loss, *_distillation(step), *_parameters(step)]


def _two_passes(step: SharedStep) -> list[Message]:
    """Return the exchanges of the global contrastive loss or of InfoNCE."""
    before, after = (_reduce if step.form == "reduce" else _ring)(step)
    # The scalars of InfoNCE are loss and gradient of the temperature; the other loss also has a surrogate.
    size, number = step.work_bytes, 2
    if step.loss == "contrastive":
        size, number = max(step.work_bytes, step.state_bytes), 2 if step.per_anchor else 3
    scalars = [Message(SMALL, ALL_GATHER, size), Message(SMALL, ALL_SUM, number * size)]
    return [*_checks(step, 4 if step.reference_dim else 2), *before, *scalars, *after]


def _sigmoid(step: SharedStep) -> list[Message]:
    """Return the exchanges of the sigmoid loss, whose single pass needs no sums over negatives."""
    gradients = step.feature_dim * step.column
    pulled = _pulled(step, _FIRST, step.num_local * step.feature_dim * step.feature_bytes, gradients)
    return [*_checks(step, 2), *pulled, Message(SMALL, ALL_SUM, 3 * step.work_bytes)]


def _distillation(step: SharedStep) -> list[Message]:
    """Return the exchanges of the distillation loss, which the ranks compute after the loss of the method."""
    if not step.teacher_dim:
        return []
    texts = [
        step.num_local * dim * size
        for dim, size in ((step.feature_dim, step.feature_bytes), (step.teacher_dim, step.reference_bytes))
    ]
    # Each model has a pass of its own: peak, sum and mean over the negatives of each text anchor. Then peak and factor
    # of both models travel to the images, and two sums beside the gradients travel back.
    sums = [message for size in texts for message in _summed(step, _TEACHER, size, 3 * step.column)]
    arriving = 4 * step.column + (sum(texts) if step.form == "ring" else 0)
    pulled = _pulled(step, _TEACHER, arriving, (step.feature_dim + 2) * step.column)
    return [*_checks(step, 2, 2), *sums, *pulled, Message(SMALL, ALL_SUM, 2 * step.work_bytes)]


def _checks(step: SharedStep, *num_sizes: int) -> list[Message]:
    """Return the exchanges by which ranks compare arguments, and agree about the sizes of the features."""
    ids = [Message(SMALL, ALL_GATHER, _ID * step.num_local)] if step.with_ids else []
    # Without the comparison the ranks find out on the device whether an id occurs twice.
    if not step.checked:
        return ids
    sizes = [Message(SMALL, ALL_GATHER, number * step.work_bytes) for number in num_sizes]
    return [Message(SMALL, ALL_GATHER, _DIGEST), *ids, *sizes]


def _summed(step: SharedStep, purpose: str, text_bytes: int, sum_bytes: int) -> list[Message]:
    """Return the exchanges of a pass that sums over negatives: texts travel to the images, sums travel back."""
    if step.form == "reduce":
        return [Message(purpose, ALL_GATHER, text_bytes), Message(purpose, ALL_TO_ALL, step.num_ranks * sum_bytes)]
    return _around(step, purpose, text_bytes, sum_bytes)


def _pulled(step: SharedStep, purpose: str, text_bytes: int, result_bytes: int) -> list[Message]:
    """Return the exchanges of a pass whose results for a text are sums over the ranks."""
    if step.form == "reduce":
        scattered = Message(purpose, REDUCE_SCATTER, step.num_ranks * result_bytes)
        return [Message(purpose, ALL_GATHER, text_bytes), scattered]
    return _around(step, purpose, text_bytes, result_bytes)


def _around(step: SharedStep, purpose: str, text_bytes: int, result_bytes: int) -> list[Message]:
    """Return the exchanges of a ring: results travel with their texts, then home; a single rank sends nothing."""
    num_hops = step.num_ranks - 1
    if num_hops == 0:
        return []
    return [Message(purpose, SHIFT, text_bytes + result_bytes, num_hops), Message(purpose, SHIFT, result_bytes)]


def _reduce(step: SharedStep) -> tuple[list[Message], list[Message]]:
    """Return the exchanges of the first and of the second pass."""
    after = [
        Message(_SECOND, ALL_TO_ALL, step.num_ranks * step.column),
        Message(_SECOND, REDUCE_SCATTER, step.num_ranks * step.feature_dim * step.column),
    ]
    return _summed(step, _FIRST, step.text_bytes, (3 + step.masked) * step.column), after


def _ring(step: SharedStep) -> tuple[list[Message], list[Message]]:
    """Return the exchanges of the first and of the second pass."""
    before = _around(step, _FIRST, step.text_bytes, (3 + step.masked) * step.column)
    # The second pass needs two sums and the weight of each text anchor.
    after = _around(step, _SECOND, step.text_bytes + 3 * step.column, step.feature_dim * step.column)
    return before, after


def _estimates(step: SharedStep) -> list[Message]:
    """Return the exchanges of ids, of inner estimates, and of temperatures per sample."""
    rows, ids = 2 * step.state_bytes * step.num_local, _ID * step.num_local
    if step.estimates == "none":
        return []
    if step.estimates in ("all", "rows"):
        # Every rank moves all temperatures by the gradients of all pairs.
        gradients = 2 * step.column * step.temperatures
        return [Message(_ESTIMATES, ALL_GATHER, ids * (step.estimates == "all") + rows + gradients)]
    # Reading and writing check their arguments; before writing, the ranks also agree that the ids are those just read.
    checks = [Message(SMALL, ALL_GATHER, _DIGEST, 2), Message(SMALL, ALL_GATHER, 1)] if step.checked else []
    # If ids cannot be compared, they are sent again.
    times = 1 if step.checked else 2
    listed = [
        *checks,
        Message(_ESTIMATES, ALL_GATHER, ids, times),
        Message(_ESTIMATES, ALL_TO_ALL, step.num_ranks * rows),
        Message(_ESTIMATES, ALL_GATHER, rows),
    ]
    if not step.temperatures:
        return listed
    # A sample has two temperatures and two momenta. An update reads them before it writes them; ranks that cannot
    # compare ids send the rows again.
    checks = [Message(SMALL, ALL_GATHER, _DIGEST, 2), Message(SMALL, ALL_GATHER, 1, 2)] if step.checked else []
    return [
        *listed,
        *checks,
        Message(_TEMPERATURES, ALL_GATHER, ids, 1 if step.checked else 3),
        Message(_TEMPERATURES, ALL_TO_ALL, 2 * step.num_ranks * rows, times),
        Message(_TEMPERATURES, ALL_GATHER, 2 * rows),
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
