"""Checkpoints of state that ranks share: a file per rank, which any other number of ranks can read.

    NAME-START-STOP.safetensors     the rows START to STOP - 1 of every column; NAME is ``inner`` or ``temperature``

START, STOP, the number of all samples and the step are also in the metadata of the file, and the metadata count, not
the name. A rank that reads opens all files, and takes from each one only the rows that the rank stores.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import array_api_compat

from drrho_core import _validate
from drrho_core._array_api import Array, device_of, namespace_of
from drrho_core.state.inner import EstimatorOfRows
from drrho_core.state.sample_temperatures import PerSampleTemperature
from drrho_core.state.sharded_table import part_length
from drrho_core.state.table import Table

FORMAT = "drrho-shard"
"""The metadata entry ``format`` of every file."""

VERSION = "1"
"""The metadata entry ``version`` of every file."""


class Shard(NamedTuple):
    """A file of a checkpoint: the ids of its rows, from `start` up to `stop`, and the numbers that all files share."""

    path: Path
    start: int
    stop: int
    num_samples: int
    step: int


def save_shards(
    state: EstimatorOfRows | PerSampleTemperature, folder: str | os.PathLike[str], /, *, step: int
) -> Path | None:
    """Write the rows of this rank to a file of their own; all ranks that share the state have to call this function.

    A state that is not shared has all rows. If each of several processes keeps such a state, the first one calls this
    function alone; if all of them call it, each replaces the same file by a whole file.

    Parameters
    ----------
    state : InnerEstimator, HostEstimator, MemoryMappedEstimator or PerSampleTemperature
        The state, shared by ranks or not.
    folder : path
        The folder of the checkpoint, the same on all ranks; it is made if it is missing.
    step : int
        Number of steps taken, at least 0. `load_shards` refuses files of several steps, and returns the number.

    Returns
    -------
    Path or None
        The file; None if this rank stores no rows, because there are more ranks than parts.

    Raises
    ------
    ValueError
        If the file cannot be written, or if `step` is not the same on all ranks; all ranks raise the error.

    Notes
    -----
    The file is written under a temporary name and sent to the disk. When all ranks have written, each renames the own
    file, so a file under the final name is whole. When all files have their names, the first rank deletes files that
    other numbers of ranks have left in the folder. If the machines stop between the renames, files of two steps remain,
    which `load_shards` refuses; so give every checkpoint of a run another `step`.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from drrho_core import InnerEstimator, ThreadRanks
    >>> folder = tempfile.mkdtemp()
    >>> def save(ranks):
    ...     estimator = InnerEstimator(5, like=np.zeros(1), ranks=ranks)
    ...     mine = np.asarray([ranks.rank])
    ...     return save_shards(estimator.scatter(mine, mine + 0.5, mine + 0.25), folder, step=1).name
    >>> ThreadRanks.run(2, save)
    ['inner-000000000000-000000000003.safetensors', 'inner-000000000003-000000000005.safetensors']
    >>> alone = InnerEstimator(5, like=np.zeros(1))
    >>> load_shards(alone, folder), alone.log_inner_image.tolist()
    (1, [0.5, 1.5, -inf, -inf, -inf])
    """
    table = state.table
    target, step = table.together(
        lambda: (Path(folder), _validate.integer("step", step, minimum=0)), {"step": step}, wait=True
    )
    path = _path(table, _name(state), target)
    # Processes that keep all rows each write the same file, so the temporary name is random.
    partial = None if path is None else path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        # No rank renames a file before all ranks have written theirs, so a rank that cannot write leaves the old files.
        table.together(lambda: _write(table, path, partial, step), {}, wait=True)
        table.together(lambda: _rename(partial, path), {}, wait=True)
    finally:
        if partial is not None:
            # If nothing can be deleted here, the error that is being raised says so.
            with suppress(OSError):
                partial.unlink()
    # No file is deleted before all ranks have renamed theirs, and no rank goes on before the first has deleted them.
    table.wait_for_all()
    table.together(lambda: _delete_stale(table, _name(state), target), {}, wait=True)
    table.wait_for_all()
    return path


def load_shards(state: EstimatorOfRows | PerSampleTemperature, folder: str | os.PathLike[str], /) -> int:
    """Replace the rows of this rank by those of a checkpoint that any number of ranks has written.

    Parameters
    ----------
    state : InnerEstimator, HostEstimator, MemoryMappedEstimator or PerSampleTemperature
        The state, shared by ranks or not, of as many samples as the checkpoint. The same object holds the rows of the
        checkpoint afterwards.
    folder : path
        The folder that was given to `save_shards`.

    Returns
    -------
    int
        The step that was given to `save_shards`.

    Raises
    ------
    TypeError, ValueError
        If a row is missing, if two files disagree about a row, the step or the number of samples, or if numbers, dtypes
        or columns do not fit the state. All ranks raise the error, and no rank has changed its rows.
    """
    table = state.table
    rows, step = table.together(lambda: _read(table, _name(state), Path(folder)), {}, wait=True)
    table.replace(rows)
    return step


def _name(state: EstimatorOfRows | PerSampleTemperature) -> str:
    """Return the first word of the names of a state's files."""
    return "temperature" if isinstance(state, PerSampleTemperature) else "inner"


def _delete_stale(table: Table, name: str, folder: Path) -> None:
    """Delete, on the first rank, the files of other rows than those that these ranks have just written."""
    if table.own_range[0] > 0:
        return
    length = part_length(table.num_samples, table.num_ranks)
    for old in _shards(folder, name):
        whole = old.start % length == 0 and old.stop == min(old.start + length, table.num_samples)
        if not whole or old.num_samples != table.num_samples:
            try:
                old.path.unlink(missing_ok=True)
            except OSError as error:
                raise ValueError(f"{old.path} cannot be deleted: {error}") from error


def _path(table: Table, name: str, folder: Path) -> Path | None:
    """Return the file of the own rows; None if there are no own rows."""
    start, stop = table.own_range
    return None if start == stop else folder / f"{name}-{start:012d}-{stop:012d}.safetensors"


def _write(table: Table, path: Path | None, partial: Path | None, step: int) -> None:
    """Write the own rows under a temporary name."""
    import safetensors
    from safetensors.numpy import save_file

    if path is None or partial is None:
        return
    start, stop = table.own_range
    rows = {column: _on_host(array) for column, array in table.arrays().items()}
    metadata = {"format": FORMAT, "version": VERSION, "num_samples": table.num_samples, "step": step}
    metadata |= {"start": start, "stop": stop}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(rows, partial, {key: str(value) for key, value in metadata.items()})
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be written: {error}") from error


def _rename(partial: Path | None, path: Path | None) -> None:
    """Give the own file the final name."""
    if path is None or partial is None:
        return
    try:
        # Renaming is atomic: a reader sees the old file or the complete new file.
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error


def _shards(folder: Path, name: str) -> list[Shard]:
    """Return the files of a checkpoint in the order of their rows."""
    import safetensors

    shards = []
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
                raise ValueError(f"format {metadata.get('format')!r} and version {metadata.get('version')!r}")
            shards.append(Shard(path, *(int(metadata[key]) for key in Shard._fields[1:])))
        except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} must be a file of `save_shards` in version {VERSION}, got {error}") from error
    return sorted(shards, key=lambda shard: shard.start)


def _read(table: Table, name: str, folder: Path) -> tuple[dict[str, Array], int]:
    """Return the own rows of every column and the step."""
    import safetensors

    shards = _shards(folder, name)
    if not shards:
        raise ValueError(f"{folder} must hold files {name}-START-STOP.safetensors, got none")
    first = shards[0]
    if first.num_samples != table.num_samples:
        raise ValueError(f"{first.path} must hold rows of {table.num_samples} samples, got {first.num_samples}")
    for shard in shards[1:]:
        for quantity in ("num_samples", "step"):
            here, there = getattr(first, quantity), getattr(shard, quantity)
            if here != there:
                raise ValueError(
                    f"all files must have the same {quantity}, got {here} in {first.path} and {there} in {shard.path}"
                )
    names = [column.name for column in table.columns]
    rows = _Rows(table.own_range)
    # Files without an own row are opened, too, because a rank without rows needs to know the dtype.
    for shard in shards:
        with safetensors.safe_open(shard.path, framework="numpy") as file:
            if sorted(file.keys()) != sorted(names):
                raise ValueError(f"{shard.path} must hold {', '.join(names)}, got {', '.join(file.keys())}")
            rows.take(shard, {column: file.get_slice(column) for column in names})
    rows.check_complete(folder)
    like, xp = table.index_like, table.xp
    arrays = {column: xp.asarray(array, device=device_of(like)) for column, array in rows.columns.items()}
    return table.checked_own(arrays), first.step


class _Rows:
    """The own rows, which are filled file by file."""

    def __init__(self, own_range: tuple[int, int]) -> None:
        self.start, self.stop = own_range
        self.columns: dict[str, Any] = {}
        self._filled: Any = None  # (stop - start,) whether a file has held the row
        self._sources: list[Shard] = []

    def take(self, shard: Shard, slices: dict[str, Any]) -> None:
        """Copy the own rows of a file, and compare them with what earlier files have held."""
        low = min(max(shard.start, self.start), self.stop)
        high = max(min(shard.stop, self.stop), low)
        here = slice(low - self.start, high - self.start)
        for column, values in slices.items():
            if list(values.get_shape()) != [shard.stop - shard.start]:
                raise ValueError(f"{shard.path} must hold {shard.stop - shard.start} rows, got {values.get_shape()}")
            piece = values[max(low - shard.start, 0) : max(high - shard.start, 0)] if high > low else values[0:0]
            xp = namespace_of({column: piece})
            if self._filled is None:
                self._filled = xp.zeros((self.stop - self.start,), dtype=xp.bool)
            if column not in self.columns:
                self.columns[column] = xp.zeros((self.stop - self.start,), dtype=piece.dtype)
            array = self.columns[column]
            if piece.dtype != array.dtype:
                raise TypeError(f"{column} must have dtype {array.dtype} in all files, got {piece.dtype}")
            if bool(xp.any(self._filled[here] & (array[here] != piece))):
                differing = self._filled[here] & (array[here] != piece)
                row = low + int(xp.argmax(xp.astype(differing, xp.int8)))
                other = next(source for source in self._sources if source.start <= row < source.stop)
                raise ValueError(f"{shard.path} and {other.path} must agree, got two values of {column} in row {row}")
            array[here] = piece
        self._filled[here] = True
        self._sources.append(shard)

    def check_complete(self, folder: Path) -> None:
        """Check that every own row was in a file."""
        xp = namespace_of({"rows": self._filled})
        if not bool(xp.all(self._filled)):
            row = self.start + int(xp.argmax(xp.astype(~self._filled, xp.int8)))
            raise ValueError(
                f"{folder} must hold every row from {self.start} to {self.stop - 1}, got no file with row {row}"
            )


def _on_host(array: Array) -> Any:
    """Return an array of any library as a NumPy array."""
    if array_api_compat.is_torch_array(array) or array_api_compat.is_cupy_array(array):
        array = array_api_compat.to_device(array, "cpu")
    return array.__array__()
