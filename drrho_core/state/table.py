"""A table with one row of numbers per sample, in any memory: checks, batches of rows, growth, and saved states.

A table has n rows and a few named columns of one dtype. A *home* is the memory that stores the columns. There are three
homes: the memory of the device, the host's memory while training runs on another device, and a file. Each home has a
subclass of `Table`: `ArrayTable` in this file for the device, and classes in the backends for the other two. One more
subclass, `drrho_core.state.sharded_table.ShardedTable`, splits the rows among ranks. A subclass has five methods:
`read` and `write` for rows of a batch, `resized`, `arrays` and `replace` for the whole table. `Table` checks all
arguments before it calls these methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, TypeVar

from drrho_core import _validate
from drrho_core._array_api import (
    Array,
    Namespace,
    device_of,
    namespace_of,
    supports_index_assignment,
    values_visible,
)
from drrho_core._validate import Call, Rule

T = TypeVar("T")


class Column(NamedTuple):
    """A column: its name, the number `fresh` in each row that was never written, and the rule that all numbers obey."""

    name: str
    fresh: float
    rule: Rule


class Table(ABC):
    """Rows of numbers, one row per sample.

    Parameters
    ----------
    columns : tuple of Column
        The columns, in the order of the arrays that `gather` returns and `scatter` takes.
    owner : str
        The table's name in messages about saved states, such as "the estimator".
    xp : namespace
        The namespace of all indices and rows.

    Attributes
    ----------
    num_samples : int
        Number of samples n.
    index_like : array
        Any array on the device on which each `sample_index` has to be.
    row_like : array
        Any array with the dtype of the rows, on the device on which rows have to be.
    num_ranks : int
        Number of ranks that share the table and its batches; 1 if nobody shares them.
    """

    # These are plain attributes, which a subclass sets whenever they change, because every step reads them many times.
    num_samples: int
    index_like: Array
    row_like: Array
    num_ranks: int = 1

    def __init__(self, columns: tuple[Column, ...], owner: str, xp: Namespace) -> None:
        self.columns, self.owner, self.xp = columns, owner, xp

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the namespace, because a module cannot be copied or pickled."""
        return {name: value for name, value in vars(self).items() if name != "xp"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes and derive the namespace from the arrays."""
        vars(self).update(state)
        self.xp = namespace_of({"the state": self.index_like})

    @abstractmethod
    def read(self, index: Array) -> tuple[Array, ...]:
        """Return copies of the rows of a checked index, one array (b,) per column."""

    @abstractmethod
    def write(self, index: Array, rows: Mapping[str, Array]) -> Self:
        """Write checked rows of some columns; return this table, or a new one if arrays cannot be written to."""

    @abstractmethod
    def resized(self, num_samples: int) -> Self:
        """Return a table of `num_samples` >= n samples, whose new rows were never written."""

    @abstractmethod
    def arrays(self) -> Mapping[str, Array]:
        """Return every column (n,) by name, not copied."""

    @abstractmethod
    def replace(self, arrays: Mapping[str, Array]) -> None:
        """Replace every column by the numbers of a checked array (n,); the table does not keep this array."""

    def gather(self, index: Array) -> tuple[Array, ...]:
        """Return copies of the rows of a batch, one array (b,) per column; see `check_index` for `index`."""
        # The state is among the checked arrays, so that an index of another library or device is refused.
        call = _validate.arrays({"the state": self.index_like, "sample_index": index}, self.xp)
        return self.read(checked_index(call, self.num_samples))

    def scatter(self, index: Array, *rows: Array) -> Self:
        """Check the rows of a batch, one array (b,) per column, write them, and return the table to use from now on."""
        index, by_name = self.checked_rows(index, rows)
        return self.write(index, by_name)

    def checked_rows(self, index: Array, rows: tuple[Array, ...]) -> tuple[Array, dict[str, Array]]:
        """Check and return the index and the rows of a batch, which are returned by name."""
        # Check everything before anything is written: libraries, devices, the index, then column after column.
        by_name = {column.name: array for column, array in zip(self.columns, rows, strict=True)}
        state, row_like = self.index_like, self.row_like
        if row_like is state:
            call = row_call = _validate.arrays({"the state": state, "sample_index": index} | by_name, self.xp)
        else:
            # The index lies on the host, the rows on a device.
            call = _validate.arrays({"the state": state, "sample_index": index}, self.xp)
            row_call = _validate.arrays({"the state": row_like} | by_name, self.xp)
        index = checked_index(call, self.num_samples)
        for column in self.columns:
            array = by_name[column.name]
            if array.dtype != row_like.dtype:
                raise TypeError(f"{column.name} must have the state's dtype {row_like.dtype}, got {array.dtype}")
            row_call.array(
                column.name, _validate.STATE, shape=(index.shape[0],), meaning="(batch_size,)", rule=column.rule
            )
        return index, by_name

    def together(self, check: Callable[[], T], _arguments: Mapping[str, Any], *, wait: bool = False) -> T:  # noqa: ARG002
        """Return ``check()``; if ranks share the table, an error of one rank is raised on all of them.

        With `wait` this holds on a device, too, for which the host has to wait then.
        """
        return check()

    @property
    def own_range(self) -> tuple[int, int]:
        """The ids of the rows in `arrays`: from the first number up to the second, exclusive."""
        return 0, self.num_samples

    def own_rows_of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a saved state of all n samples that this table stores, for `load_state_dict`.

        The arrays may be of any library that can slice them, so a part can be cut out before it is moved to a device.
        """
        return dict(state)

    def wait_for_all(self) -> None:
        """Wait for all ranks that share the table."""
        return

    def grow(self, num_samples: int) -> Self:
        """Return a table of `num_samples` >= n samples: the old rows first, then rows that were never written."""
        return self.resized(
            self.together(
                lambda: _validate.integer("num_samples", num_samples, minimum=self.num_samples),
                {"num_samples": num_samples},
                wait=True,
            )
        )

    def state_dict(self) -> dict[str, Array]:
        """Return a copy of every column by name."""
        return {name: self.xp.asarray(array, copy=True) for name, array in self.arrays().items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Check a saved state and replace every column by it; if an error is raised, the table has not changed."""
        self.replace(self.together(lambda: self.checked_state(state), {}, wait=True))

    def checked_state(self, state: Mapping[str, Array], version: int | None = None) -> dict[str, Array]:
        """Check a saved state and return the columns; `version` is the number that the state must hold, if any."""
        return self.checked_own(state, version)

    def checked_own(self, state: Mapping[str, Array], version: int | None = None) -> dict[str, Array]:
        """Check and return the columns of the own rows, which `arrays` returns; see `checked_state`."""
        return check_saved(state, self.arrays(), self.rules(), owner=self.owner, version=version, xp=self.xp)

    def rules(self) -> dict[str, Rule]:
        """Return the rule of every column by name."""
        return {column.name: column.rule for column in self.columns}

    def checked(self, index: Array) -> Array:
        """Check and return a batch's `sample_index` as `check_index` does."""
        return check_index(index, self.num_samples, like=self.index_like, xp=self.xp)


class ArrayTable(Table):
    """A table in arrays (n,) of the library and on the device of the array `like`.

    If the library has assignment by integer arrays (NumPy, torch, CuPy), updates are done in place. For other libraries
    every update returns a new table.
    """

    def __init__(
        self, columns: tuple[Column, ...], num_samples: int, *, like: Array, dtype: Any = None, owner: str
    ) -> None:
        xp = namespace_of({"like": like})
        num_samples = _validate.integer("num_samples", num_samples, minimum=1)
        super().__init__(columns, owner, xp)
        dtype, device = storage_dtype(like, dtype, xp), device_of(like)
        self.become(
            {column.name: xp.full((num_samples,), column.fresh, dtype=dtype, device=device) for column in columns}
        )
        # The function builds two arrays and tries an assignment, so it is called once and not in every step.
        self._in_place = supports_index_assignment(self.index_like, xp)

    def read(self, index: Array) -> tuple[Array, ...]:
        """Return copies of the rows, one array (b,) per column."""
        take = self.xp.take
        return tuple([take(array, index, axis=0) for array in self._arrays.values()])

    def write(self, index: Array, rows: Mapping[str, Array]) -> Self:
        """Write rows in place, or return a new table with new arrays."""
        # In torch, NumPy and CuPy this takes O(b) time. Other libraries copy all n rows of the columns that change.
        if self._in_place:
            for name, new in rows.items():
                self._arrays[name][index] = new
            return self
        return self.around(
            {
                name: scatter_rows(array, index, rows[name], xp=self.xp) if name in rows else array
                for name, array in self._arrays.items()
            }
        )

    def resized(self, num_samples: int) -> Self:
        """Return a table with longer arrays."""
        more, old = num_samples - self.num_samples, self.index_like
        grown = {}
        for column in self.columns:
            fresh = self.xp.full((more,), column.fresh, dtype=old.dtype, device=device_of(old))
            grown[column.name] = self.xp.concat([self._arrays[column.name], fresh])
        return self.around(grown)

    def arrays(self) -> Mapping[str, Array]:
        """Return every column (n,) by name, not copied."""
        return self._arrays

    def replace(self, arrays: Mapping[str, Array]) -> None:
        """Replace every column by a copy of an array (n,)."""
        # The arrays are copied, because later steps write into the table. A copy may be read-only although the old
        # column was writeable, so this is tested again.
        self.become({name: self.xp.asarray(arrays[name], copy=True) for name in self._arrays})
        self._in_place = supports_index_assignment(self.index_like, self.xp)

    def around(self, arrays: dict[str, Array]) -> Self:
        """Return a table of the same columns that holds these arrays."""
        # The copy is made without the constructor, because the constructor would build arrays of n new rows.
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.become(arrays)
        return other

    def become(self, arrays: dict[str, Array]) -> None:
        """Make these arrays the columns of this table."""
        self._arrays = arrays
        self.index_like = self.row_like = arrays[self.columns[0].name]
        self.num_samples = int(self.index_like.shape[0])


def storage_dtype(like: Array, dtype: Any, xp: Namespace) -> Any:
    """Return the dtype of the state: `dtype` if it is not None, else the dtype of `like`, but at least float32."""
    if dtype is None:
        wide = xp.isdtype(like.dtype, "real floating") and xp.finfo(like.dtype).bits > 32
        return like.dtype if wide else xp.float32
    if not xp.isdtype(dtype, "real floating") or xp.finfo(dtype).bits < 32:
        raise TypeError(f"dtype must be float32 or wider, got {dtype}")
    return dtype


def check_index(index: Array, num_samples: int, /, *, like: Array, xp: Namespace) -> Array:
    """Check a batch's `sample_index`: integers (b,) in [0, num_samples), no repeats, on the device of `like`.

    Returns
    -------
    array of int32 or int64, shape (b,)
        The index in a dtype with which every library can index, and which can hold the number of every row.

    Raises
    ------
    TypeError, ValueError
        If the index breaks these rules. Values are read on the host and outside tracing only.
    """
    return checked_index(_validate.arrays({"the state": like, "sample_index": index}, xp), num_samples)


def checked_index(call: Call, num_samples: int) -> Array:
    """Check the `sample_index` of a call; see `check_index`."""
    index, xp = call.arrays["sample_index"], call.xp
    if index.ndim != 1:
        raise ValueError(
            f"sample_index must have shape (batch_size,), one row id per sample of the batch, got {tuple(index.shape)}"
        )
    if not xp.isdtype(index.dtype, "integral"):
        raise TypeError(f"sample_index must have an integer dtype, got {index.dtype}")
    # A small integer dtype cannot hold the numbers of all rows, and not every library can index with unsigned integers.
    if index.dtype not in (xp.int32, xp.int64):
        index = xp.astype(index, xp.__array_namespace_info__().default_dtypes()["indexing"])
    words = f"hold row ids from 0 to {num_samples - 1} (see docs/large-data.md, 'How to number your samples')"
    call.values("sample_index", index, Rule(words, 0, num_samples - 1, True, True))
    # After sorting, a repeated index is equal to its successor.
    if (call.visible or values_visible(index, xp)) and index.shape[0] > 1:
        ordered = xp.sort(index)
        repeated = ordered[1:] == ordered[:-1]
        if bool(xp.any(repeated)):
            first = int(ordered[int(xp.argmax(xp.astype(repeated, xp.int8)))])
            raise ValueError(f"sample_index must not repeat an index within a batch, got {first} twice")
    return index


def check_saved(
    state: Mapping[str, Array],
    current: Mapping[str, Array],
    rules: Mapping[str, Rule],
    *,
    owner: str,
    version: int | None = None,
    xp: Namespace,
) -> dict[str, Array]:
    """Check a saved state against the arrays that it is to replace, and return the saved arrays.

    Parameters
    ----------
    state : mapping
        The saved state.
    current : mapping of str to array
        The current arrays. The saved arrays must have the same names, shapes, dtypes and device.
    rules : mapping of str to Rule
        The rule of each array's entries.
    owner : str
        The name of the object in messages, such as "the estimator".
    version : int, optional
        The number that the state must hold as ``version``; None if it holds no version.
    xp : namespace
        The arrays' namespace.

    Raises
    ------
    TypeError, ValueError
        If the saved state does not fit the current arrays, or if a saved number breaks the rule of its array.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping, got {type(state).__name__}")
    names = [*([] if version is None else ["version"]), *current]
    if set(state) != set(names):
        raise ValueError(f"state must hold {', '.join(names[:-1])} and {names[-1]} and nothing else, got {list(state)}")
    # The first current array is among the checked arrays, so that arrays of another library or device are refused.
    call = _validate.arrays({owner: next(iter(current.values())), **{name: state[name] for name in names}}, xp)
    if version is not None:
        _validate.shape("version", state["version"], (), "()")
        if int(state["version"]) != version:
            raise ValueError(f"version must be {version}, got {int(state['version'])}")
    for name, array in current.items():
        saved = state[name]
        _validate.shape(name, saved, tuple(array.shape), "(num_samples,)" if array.ndim else "()")
        if saved.dtype != array.dtype:
            raise TypeError(f"{name} must have dtype {array.dtype}, got {saved.dtype}")
        call.values(name, saved, rules[name])
    return {name: state[name] for name in current}


def with_version(state: Mapping[str, Array], version: int, xp: Namespace) -> dict[str, Array]:
    """Return copies of the arrays of a state, together with the version as an array on the same device."""
    number = xp.asarray(version, dtype=xp.int32, device=device_of(next(iter(state.values()))))
    return {"version": number, **{name: xp.asarray(array, copy=True) for name, array in state.items()}}


def scatter_rows(state: Array, index: Array, rows: Array, /, *, xp: Namespace) -> Array:
    """Return `state` (n,) with ``state[index] = rows``: the same array if it can be written to, else a new one.

    The Array API standard has no assignment by integer arrays. For a library without such an assignment each of the n
    samples is searched in the sorted batch: O((n + b) log b) in operations of the standard.
    """
    if supports_index_assignment(state, xp):
        state[index] = rows
        return state
    # JAX fuses this into one update.
    if hasattr(state, "at"):
        return state.at[index].set(rows)
    if index.shape[0] == 0:
        return state
    # `place` is the position in the sorted batch where a sample would be inserted; `hit`: whether the sample is there.
    order = xp.argsort(index)
    ordered = xp.take(index, order, axis=0)
    samples = xp.arange(state.shape[0], dtype=index.dtype, device=device_of(state))
    place = xp.clip(xp.searchsorted(ordered, samples), max=index.shape[0] - 1)
    hit = xp.take(ordered, place, axis=0) == samples
    return xp.where(hit, xp.take(xp.take(rows, order, axis=0), place, axis=0), state)
