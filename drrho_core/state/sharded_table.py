"""A table whose rows are split among ranks, by the id of the sample.

Ranks are processes or threads that share one batch; W is their number. Each rank stores ceil(n / W) consecutive rows of
the n rows, in a table of its own, which is called the part. The last parts may hold fewer rows, or none. A rank may
have any samples in its batch, so rows are exchanged:

    gather    The ids of all ranks are gathered. Each rank answers all ids: with its rows, or with -inf for a row of
              another rank. Each asking rank takes the largest answer, which is the owner's.
    scatter   The new rows of all ranks are gathered, and each rank writes those that it owns.

A step with one gather and one scatter of the same ids brings 8 + 2 c s bytes per pair and other rank, with c columns of
s bytes per number and ids of 8 bytes: 8 + 4 s for inner estimates. A few dozen bytes per other rank are added, because
ranks check first that their arguments are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, TypeVar

from drrho_core import _validate
from drrho_core._array_api import Array, device_of, is_array, values_visible
from drrho_core.contrastive.agreement import agreed, refuse_repeats
from drrho_core.contrastive.ranks import Ranks
from drrho_core.state.table import ArrayTable, Column, Table

T = TypeVar("T")

BLOCK = 1 << 16
"""The number of rows per rank that move in one message when the table grows."""


class Request(NamedTuple):
    """A batch whose ids were exchanged: the own ids, those of all ranks (W, b), and the own rows of all columns."""

    index: Array
    everyone: Array
    rows: tuple[Array, ...]


class ShardedTable(Table):
    """Rows of n samples, split among ranks; all ranks have to call the same methods at the same time.

    Parameters
    ----------
    make : callable
        ``make(k)`` returns a table of k rows in the memory that stores the own rows; its indices and its rows lie on
        one device.
    num_samples : int
        Number of samples n, at least 1.
    ranks : Ranks
        The ranks that share the table.

    Attributes
    ----------
    part : Table
        The own rows, ceil(n / W) of them, and one row at the end that takes what belongs to other ranks.
    """

    def __init__(self, make: Callable[[int], Table], num_samples: int, ranks: Ranks) -> None:
        self.num_samples = _validate.integer("num_samples", num_samples, minimum=1)
        self.ranks, self.num_ranks = ranks, ranks.size
        self._length = part_length(self.num_samples, ranks.size)
        part = make(self._length + 1)
        super().__init__(part.columns, part.owner, part.xp)
        if device_of(part.index_like) != device_of(part.row_like):
            raise ValueError(
                f"a table that ranks share must have indices and rows on one device, got "
                f"{device_of(part.index_like)} and {device_of(part.row_like)}"
            )
        self._make = make
        self._hold(part)

    def _hold(self, part: Table) -> None:
        """Use this table as the own part."""
        self.part, self.index_like, self.row_like = part, part.index_like, part.row_like
        self._request: Request | None = None

    @property
    def own_range(self) -> tuple[int, int]:
        """The ids of the own rows: from the first number up to the second, exclusive."""
        return part_range(self.num_samples, self.num_ranks, int(self.ranks.rank))

    def own_rows_of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the own rows of every column of a state of all n samples, and their ids as `state_dict` does."""
        names = [column.name for column in self.columns]
        # A state of another size is returned as it is, and `load_state_dict` refuses it.
        shapes = {tuple(getattr(state.get(name), "shape", ())) for name in names}
        if "rows" in state or shapes != {(self.num_samples,)}:
            return dict(state)
        start, stop = self.own_range
        own = {name: array[start:stop] if name in names else array for name, array in state.items()}
        return {**own, "rows": (start, stop, self.num_samples)}

    def wait_for_all(self) -> None:
        """Wait until all ranks have called this method."""
        (number,) = self.ranks.all_sum((self.xp.ones((1,), device=device_of(self.index_like)),))
        # On a device an exchange may be complete long before the numbers are there, so a number is read.
        float(number[0])

    def together(self, check: Callable[[], T], arguments: Mapping[str, Any], *, wait: bool = False) -> T:
        """Return ``check()``, or raise on all ranks the error of a rank, or an error about arguments that differ."""
        facts = {"num_samples": self.num_samples, **arguments}
        return agreed(check, facts, self.ranks, like=self.index_like, wait=wait)

    def gather(self, index: Array) -> tuple[Array, ...]:
        """Return copies of the rows of the own batch; all ranks pass equally many ids, and no id occurs twice."""
        index = self.together(lambda: self.checked(index), {"sample_index": index})
        return self._copies(self._ask(index))

    def scatter(self, index: Array, *rows: Array) -> Self:
        """Check the rows of the own batch, send them to their owners, and return the table to use from now on."""
        given = {"sample_index": index} | {c.name: x for c, x in zip(self.columns, rows, strict=True)}
        index, by_name = self.together(lambda: self.checked_rows(index, rows), given)
        return self.write(index, by_name)

    def read(self, index: Array) -> tuple[Array, ...]:
        """Return copies of the rows of a checked index; rows that `gather` has just returned are not sent again."""
        request = self._remembered(index)
        return self._copies(self._ask(index) if request is None else request)

    def write(self, index: Array, rows: Mapping[str, Array]) -> Self:
        """Send checked rows to their owners; the ids are sent only if `gather` has not just sent them."""
        request, xp = self._remembered(index), self.xp
        everyone = self._exchanged(index) if request is None else request.everyone
        places, _ = self._places(everyone)
        gathered = self.ranks.all_gather(tuple(rows.values()))
        part = self.part.write(places, {name: xp.reshape(x, (-1,)) for name, x in zip(rows, gathered, strict=True)})
        if part is self.part:
            self._request = None
            return self
        return self._around(part)

    def resized(self, num_samples: int) -> Self:
        """Return a table of more samples; rows move between ranks in blocks, so no rank ever holds all of them."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), num_samples=num_samples, _length=part_length(num_samples, self.num_ranks))
        # A rank without enough memory must not stop alone, because the others would wait for its rows.
        part = self.together(lambda: self._make(other._length + 1), {}, wait=True)
        xp, like = self.xp, self.index_like
        first = self.ranks.rank * other._length
        for start in range(0, other._length, BLOCK):
            places = xp.arange(start, min(start + BLOCK, other._length), device=device_of(like))
            ids = first + places
            old = self._answers(self.ranks.all_gather((xp.clip(ids, max=self.num_samples - 1),))[0])
            rows = {
                column.name: xp.where(ids < self.num_samples, x, xp.full_like(x, column.fresh))
                for column, x in zip(self.columns, old, strict=True)
            }
            part = part.write(places, rows)
        other._hold(part)
        return other

    def arrays(self) -> Mapping[str, Array]:
        """Return the own rows of every column by name, not copied."""
        start, stop = self.own_range
        return {name: array[: stop - start] for name, array in self.part.arrays().items()}

    def replace(self, arrays: Mapping[str, Array]) -> None:
        """Replace the own rows of every column."""
        xp, whole = self.xp, {}
        for column in self.columns:
            given = arrays[column.name]
            more = self._length + 1 - int(given.shape[0])
            fresh = xp.full((more,), column.fresh, dtype=given.dtype, device=device_of(given))
            whole[column.name] = xp.concat([given, fresh])
        self.part.replace(whole)
        self._hold(self.part)

    def state_dict(self) -> dict[str, Array]:
        """Return a copy of the own rows by name, and ``rows``: their first id, the id after the last, and n."""
        rows = self.xp.asarray([*self.own_range, self.num_samples], device=device_of(self.index_like))
        return {"rows": rows, **super().state_dict()}

    def checked_state(self, state: Mapping[str, Array], version: int | None = None) -> dict[str, Array]:
        """Return the own rows of a saved state: one that `state_dict` of this rank returned, or one of all n rows."""
        if not isinstance(state, Mapping):
            return self.checked_own(state, version)
        state, (start, stop) = dict(state), self.own_range
        if "rows" in state:
            rows = [int(number) for number in state.pop("rows")]
            if rows != [start, stop, self.num_samples]:
                raise ValueError(
                    f"rows must be [{start}, {stop}, {self.num_samples}] on rank {int(self.ranks.rank)} of "
                    f"{self.num_ranks} (first id, id after the last, number of samples), got {rows}; `load_shards` "
                    f"reads the files of any number of ranks"
                )
        else:
            # Nothing says which samples a shorter array belongs to, so only the rows of all samples are taken.
            for name in [column.name for column in self.columns if is_array(state.get(column.name))]:
                _validate.shape(name, state[name], (self.num_samples,), "(num_samples,) in a state without rows")
                state[name] = state[name][start:stop]
        return self.checked_own(state, version)

    def _ask(self, index: Array) -> Request:
        """Exchange the ids of all ranks and the rows of the owners."""
        xp, everyone = self.xp, self._exchanged(index)
        rows = self._answers(everyone)
        if not values_visible(index, xp):
            # An id out of range was no error here. A sample that no rank stores must not count as never visited.
            inside = xp.logical_and(index >= 0, index < self.num_samples)
            rows = tuple(xp.where(inside, x, xp.full_like(x, float("nan"))) for x in rows)
        request = Request(index, everyone, rows)
        self._request = None
        # The request is kept for the scatter of the same batch. Its ids are compared by value, so it holds a copy. A
        # traced index has no values, and it must not outlive its trace.
        if values_visible(index, xp):
            self._request = request._replace(index=xp.asarray(index, copy=True))
        return request

    def _exchanged(self, index: Array) -> Array:
        """Return the ids of all ranks, (W, b), and refuse an id that occurs twice."""
        (everyone,) = self.ranks.all_gather((index,))
        if values_visible(everyone, self.xp):
            refuse_repeats(everyone, self.xp)
        return everyone

    def _remembered(self, index: Array) -> Request | None:
        """Return the last request if it was for these ids on every rank, else None."""
        xp, request = self.xp, self._request
        if not values_visible(index, xp):
            return None
        same = request is not None and request.index.shape == index.shape and bool(xp.all(request.index == index))
        # All ranks have to decide alike, because they send different messages otherwise.
        (votes,) = self.ranks.all_gather((xp.asarray([int(same)], dtype=xp.uint8, device=device_of(index)),))
        return request if bool(xp.all(votes == 1)) else None

    def _answers(self, everyone: Array) -> tuple[Array, ...]:
        """Return the own rows of all columns, given the ids of all ranks."""
        xp = self.xp
        places, mine = self._places(everyone)
        sent = tuple(
            xp.reshape(xp.where(mine, x, xp.full_like(x, -float("inf"))), everyone.shape)
            for x in self.part.read(places)
        )
        return tuple(xp.max(received, axis=0) for received in self.ranks.all_to_all(sent))

    def _places(self, everyone: Array) -> tuple[Array, Array]:
        """Return the row of the part for each id of all ranks, and whether the id is an own one.

        An id of another rank, or of no sample, has the place of the last row, so that shapes do not depend on values.
        """
        xp, ids = self.xp, self.xp.reshape(everyone, (-1,))
        places = ids - self.ranks.rank * self._length
        # The last rank may have more rows than samples.
        mine = xp.logical_and(xp.logical_and(places >= 0, places < self._length), ids < self.num_samples)
        return xp.where(mine, places, xp.full_like(places, self._length)), mine

    def _copies(self, request: Request) -> tuple[Array, ...]:
        """Return copies of the rows of a request, because the caller may write into them."""
        return tuple(self.xp.asarray(row, copy=True) for row in request.rows)

    def _around(self, part: Table) -> Self:
        """Return a table with another part."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._hold(part)
        return other


def make_table(
    columns: tuple[Column, ...], num_samples: int, *, like: Array, dtype: Any, owner: str, ranks: Ranks | None
) -> Table:
    """Return a table in arrays like `like`: all rows in one table, or the rows split among ranks."""
    if ranks is None:
        return ArrayTable(columns, num_samples, like=like, dtype=dtype, owner=owner)
    return ShardedTable(lambda rows: ArrayTable(columns, rows, like=like, dtype=dtype, owner=owner), num_samples, ranks)


def part_length(num_samples: int, num_ranks: int) -> int:
    """Return ceil(n / W), the number of rows of a part."""
    return -(-num_samples // num_ranks)


def part_range(num_samples: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """Return the ids of a rank's rows: from the first number up to the second, exclusive."""
    length = part_length(num_samples, num_ranks)
    start = min(rank * length, num_samples)
    return start, min(start + length, num_samples)
