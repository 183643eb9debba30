"""Batches that several ranks share, on threads: slices of the arguments for each rank, and the joined results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from drrho_core import ThreadRanks


@st.composite
def shared_sizes(draw: Any, *, most: int, **more: st.SearchStrategy[Any]) -> dict[str, Any]:
    """A number of ranks, and the arguments of `problems.draw` for a batch of at most `most` samples per rank.

    `more` are strategies for further arguments.
    """
    num_ranks = draw(st.integers(1, 4))
    local = draw(st.integers(1 if num_ranks > 1 else 2, most))
    arguments = {
        "num_ranks": num_ranks,
        "b": num_ranks * local,
        "d": draw(st.integers(1, 5)),
        "r": draw(st.sampled_from([None, 1, 3, 6])),
        "features": draw(st.sampled_from(["random", "aligned", "opposite", "identical", "ties"])),
        "per_anchor_temperature": draw(st.booleans()),
        "gamma": draw(st.sampled_from(["number", "pair", "one"])),
        "as_arrays": draw(st.sampled_from([(), ("temperature", "eps"), ("reference_weight", "radius")])),
        "reference_weight": draw(st.sampled_from([0.0, 0.5, 1.5])),
        "eps": draw(st.sampled_from([0.0, 1e-4, 0.3])),
        "radius": draw(st.sampled_from([0.0, 0.7])),
    }
    return arguments | {name: draw(strategy) for name, strategy in more.items()}


def own_rows(value: Any, rank: int, num_ranks: int) -> Any:
    """Return a rank's rows of an array, or of each array of a pair; scalars stay as they are."""
    if isinstance(value, tuple):
        return tuple(own_rows(member, rank, num_ranks) for member in value)
    if not getattr(value, "ndim", 0):
        return value
    share = value.shape[0] // num_ranks
    return value[rank * share : (rank + 1) * share, ...]


def on_ranks(
    function: Callable[..., Any], num_ranks: int, arrays: tuple[Any, ...], options: dict[str, Any], **static: Any
) -> list[Any]:
    """Call ``function(*arrays, ranks=ranks, **options)`` on each rank, with the rank's own rows of all arrays."""

    def work(ranks: Any) -> Any:
        mine = [own_rows(x, ranks.rank, num_ranks) for x in arrays]
        chosen = {name: own_rows(value, ranks.rank, num_ranks) for name, value in options.items()}
        return function(*mine, ranks=ranks, **chosen, **static)

    return ThreadRanks.run(num_ranks, work)


def joined(results: list[Any], xp: Any) -> Any:
    """Join the results of all ranks: rows one after the other; scalars have to be the same on all ranks."""

    def join(parts: list[Any]) -> Any:
        if isinstance(parts[0], tuple):
            return tuple(join(list(members)) for members in zip(*parts, strict=True))
        if getattr(parts[0], "ndim", 0):
            return xp.concat(parts, axis=0)
        assert all(bool(part == parts[0]) for part in parts), parts
        return parts[0]

    return type(results[0])(*(join(list(parts)) for parts in zip(*results, strict=True)))


class Counting:
    """Ranks that note the bytes of every message that this rank receives from other ranks."""

    def __init__(self, ranks: Any, notes: list[tuple[str, int]]) -> None:
        self._ranks, self._notes = ranks, notes
        self.rank, self.size, self.repeat = ranks.rank, ranks.size, ranks.repeat

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        def counted(arrays: tuple[Any, ...]) -> Any:
            size = sum(array.nbytes for array in arrays)
            # An all_gather brings the whole message of each other rank, an all_to_all a W-th of it. A reduce_scatter
            # brings the sums of W - 1 partial results of a W-th of the message.
            parts = {"all_gather": self.size - 1, "shift": 1, "all_sum": 2 * (self.size - 1) / self.size}
            self._notes.append((operation, int(size * parts.get(operation, (self.size - 1) / self.size))))
            return getattr(self._ranks, operation)(arrays)

        return counted
