"""The bytes that ranks send to select the pairs of a step from a super-batch together.

W ranks, processes or devices, share a super-batch of c pairs, from which a method selects k. Every rank needs the
features of all pairs, because a choice depends on the whole super-batch. The chosen pairs are then divided among ranks
anew, so their inputs travel. A rank receives

    (W - 1) c / W f        from the super-batch: f bytes of features of learner and reference model for each pair, and
                           with a mask c bytes for each pair
    (W - 1) 8 k            positions of the chosen pairs
    (W - 1) / W k i        from the chosen pairs: i bytes of inputs, features of the reference model and other numbers
                           for each pair, and with a mask k bytes for each pair
"""

from __future__ import annotations

from typing import Final, NamedTuple

from drrho_clip.plan.exchanges import ALL_GATHER, ALL_TO_ALL, Message

__all__ = ["Selection", "selection_messages"]

_POSITION: Final = 8
"""Bytes of the position of a pair."""

_PURPOSE = "selection"


class Selection(NamedTuple):
    """The sizes of a super-batch from which ranks select pairs.

    Attributes
    ----------
    num_local : int
        The own pairs of the super-batch, c / W.
    num_chosen : int
        k, the chosen pairs of all ranks.
    feature_bytes : int
        The bytes f of a pair's features, of both models.
    pair_bytes : int
        The bytes i of all that belongs to a pair.
    masked : bool
        A mask says which pairs are no negatives.
    """

    num_local: int
    num_chosen: int
    feature_bytes: int
    pair_bytes: int
    masked: bool = False


def selection_messages(selection: Selection, num_ranks: int) -> list[Message]:
    """Return the exchanges of a selection.

    Examples
    --------
    >>> for message in selection_messages(Selection(num_local=8, num_chosen=4, feature_bytes=64, pair_bytes=100), 2):
    ...     print(message.purpose, message.operation, message.num_bytes)
    selection all_gather 512
    selection all_gather 32
    selection all_to_all 400
    """
    num_local, num_chosen = selection.num_local, selection.num_chosen
    masks = [Message(_PURPOSE, ALL_GATHER, num_local * num_local * num_ranks)] if selection.masked else []
    # The rows of the mask travel with the pairs, and have a column for each chosen pair.
    pair_bytes = selection.pair_bytes + selection.masked * num_chosen
    return [
        Message(_PURPOSE, ALL_GATHER, num_local * selection.feature_bytes),
        *masks,
        Message(_PURPOSE, ALL_GATHER, _POSITION * num_chosen),
        Message(_PURPOSE, ALL_TO_ALL, num_chosen * pair_bytes),
    ]
