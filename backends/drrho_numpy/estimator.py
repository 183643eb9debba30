"""Keeps the inner estimates of more samples than fit into memory: a table in a memory-mapped file.

The inner estimates of a sample are two numbers, one for the image anchor and one for the text anchor.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import array_api_compat.numpy
import numpy as np

from drrho_core import checks
from drrho_core.state.inner import COLUMNS, OWNER, EstimatorOfRows
from drrho_core.state.table import Table
from drrho_numpy.sparse_file import (
    CHUNK,
    OFFSET,
    VERSION,
    Layout,
    copy_data,
    float_dtype,
    lock,
    read_layout,
    replacing,
    write_all,
)


class FileTable(Table):
    """The two columns of inner estimates in a file that is mapped into memory; see `drrho_numpy.sparse_file`.

    Parameters
    ----------
    path : Path
        An existing file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(COLUMNS, OWNER, array_api_compat.numpy)
        self.path = path
        self.open()

    def open(self) -> None:
        """Lock the file, check the header and map the file into memory."""
        # The file object is unbuffered, so that the map and the file object always show the same bytes.
        self.file: BinaryIO = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        try:
            lock(self.file, self.path)
            self.layout = read_layout(self.file, self.path)
            self._map()
        except BaseException:
            self.file.close()
            raise

    def _map(self) -> None:
        layout = self.layout
        self._memory = mmap.mmap(self.file.fileno(), layout.size, access=mmap.ACCESS_WRITE)
        if hasattr(mmap, "MADV_RANDOM"):  # the system should not read the neighbours of a sample in advance
            self._memory.madvise(mmap.MADV_RANDOM)
        # The file stores each number as an integer: the bits of the number XOR the bits of -inf. So the map is viewed
        # as an array of integers.
        bits = np.frombuffer(self._memory, dtype=layout.bits, offset=OFFSET)
        self._bits = bits.reshape(layout.num_samples, 2)
        self.index_like = self.row_like = np.zeros(0, dtype=layout.dtype)
        self.num_samples = layout.num_samples

    def _unmap(self) -> None:
        del self._bits  # the memory cannot be closed while this view exists
        self._memory.close()

    def close(self) -> None:
        """Unmap and close the file; closing again does nothing."""
        if not self.file.closed:
            self._unmap()
            self.file.close()

    def check_open(self) -> None:
        """Check that the file is open."""
        if self.file.closed:
            raise ValueError(f"the estimator must be open, got one whose file {self.path} was closed")

    def flush(self) -> None:
        """Wait until everything is on the disk."""
        self.check_open()
        self._memory.flush()

    def checked(self, index: np.ndarray) -> np.ndarray:
        """Check a batch's `sample_index`, and that the file is open."""
        self.check_open()
        checked: np.ndarray = super().checked(index)
        return checked

    def gather(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return copies of the rows of a batch, if the file is open."""
        self.check_open()
        return super().gather(index)

    def scatter(self, index: np.ndarray, *rows: np.ndarray) -> Self:
        """Check and write the rows of a batch, if the file is open."""
        self.check_open()
        return super().scatter(index, *rows)

    def read(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return copies of the rows; zeros in the file become ``-inf``."""
        # The stored bits are the bits of the number XOR those of -inf; a second XOR restores the number.
        rows = (self._bits[index] ^ self.layout.never).view(self.layout.dtype)
        return np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1])

    def write(self, index: np.ndarray, rows: Mapping[str, np.ndarray]) -> Self:
        """Write both numbers of each sample at once, so that they reach the disk together."""
        pairs = np.stack(list(rows.values()), axis=1)
        self._bits[index] = pairs.view(self.layout.bits) ^ self.layout.never
        return self

    def resized(self, num_samples: int) -> Self:
        """Make the file longer.

        After an interruption the length of the file may not match the header; `read_layout` reports this error.
        """
        # The size changes first and the header last. The map must be closed while the size changes; `finally` maps the
        # file again, whether it has grown or not.
        self.flush()
        grown = Layout(num_samples, self.layout.dtype)
        self._unmap()
        try:
            self.file.truncate(grown.size)
            os.fsync(self.file.fileno())
            self.file.seek(0)
            self.file.write(grown.header)
            os.fsync(self.file.fileno())
            self.layout = grown
        finally:
            self._map()
        return self

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Return every column (n,) by name, as arrays in memory; a large table may not fit into the memory."""
        image, text = self.read(np.arange(self.num_samples))
        return {"log_inner_image": image, "log_inner_text": text}

    def replace(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a new file from two arrays, piece by piece, and replace the present file by the new file."""
        layout, (image, text) = self.layout, (arrays[column.name] for column in self.columns)

        def fill(copy: BinaryIO) -> None:
            # The file is written piece by piece, so that the memory in use does not grow with n.
            for start in range(0, self.num_samples, CHUNK):
                part = slice(start, start + CHUNK)
                rows = np.stack([image[part], text[part]], axis=1).view(layout.bits) ^ layout.never
                if rows.any():  # a piece of zeros is not written and takes no disk space
                    copy.seek(OFFSET + start * 2 * layout.dtype.itemsize)
                    write_all(copy, memoryview(rows).cast("B"))

        self.refill(fill)

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Check two arrays piece by piece, so that no large array is made, and replace the columns by these arrays."""
        self.check_open()
        arrays = {column.name: state[column.name] for column in self.columns}
        call = checks.arrays({OWNER: self.index_like} | arrays, self.xp)
        for column in self.columns:
            array = arrays[column.name]
            checks.shape(column.name, array, (self.num_samples,), "(num_samples,)")
            if array.dtype != self.layout.dtype:
                raise TypeError(f"{column.name} must have the state's dtype {self.layout.dtype}, got {array.dtype}")
            call.values(column.name, array, column.rule)
        self.replace(arrays)

    def refill(self, fill: Callable[[BinaryIO], None]) -> None:
        """Fill a new file and replace the present file by the new file; an interruption leaves the old file."""
        # The new file gets the name of the old file at the end of the `with` block, after the old file was closed.
        try:
            with replacing(self.path, self.layout) as copy:
                fill(copy)
                self.close()
        finally:
            if self.file.closed:
                self.open()

    def description(self, path: Path) -> dict[str, Any]:
        """Return the description of a file of this table: path, version of the format, size and dtype."""
        return {
            "path": str(path.absolute()),
            "version": VERSION,
            "num_samples": self.num_samples,
            "dtype": self.layout.dtype.name,
        }


class MemoryMappedEstimator(EstimatorOfRows):
    """Keeps the logarithms of the inner estimates of n samples in a file: a `drrho_core.InnerEstimator` for large n.

    Parameters
    ----------
    path : str or path
        The file. If the file exists, it is opened with the estimates that it holds. Otherwise a new file is made, in
        which no sample was visited.
    num_samples : int, optional
        n >= 1. Required for a new file; for an existing file it must be the n of the file.
    dtype : dtype, optional
        float32 (a new file's default) or float64; for an existing file it must be the dtype of the file.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules, the file has another format, version or size, or it is open already.
    OSError
        If the file cannot be made or opened.

    Notes
    -----
    A new file takes disk space only for visited samples (a page of 4096 bytes holds 512 of them), up to ``4096 + 8 n``
    bytes in float32. If the disk becomes full, the operating system ends the process, so keep that much space free.

    Rows that `scatter` has written survive even a sudden end of the process. After a power failure a sample holds
    the estimate of the last `flush` or a later estimate: the operating system chooses when it writes a page to the
    disk, but it always writes both numbers of a sample together. Such a state is usable, but its rows may come from
    different steps. All rows of a `snapshot` come from the same step.

    Indices and rows are NumPy arrays; ``torch.from_numpy(rows)`` and ``jax.numpy.asarray(rows)`` convert rows.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with MemoryMappedEstimator(Path(folder.name) / "estimator", 1_000_000_000) as estimator:
    ...     index = np.asarray([999_999_999, 5])
    ...     estimator = estimator.scatter(index, *np.asarray([[0.5, 1.5], [0.0, 1.0]], dtype="float32"))
    ...     [side.tolist() for side in estimator.gather(np.asarray([5, 6]))]
    [[1.5, -inf], [1.0, -inf]]
    >>> with MemoryMappedEstimator(Path(folder.name) / "estimator") as estimator:
    ...     estimator.num_samples, os.stat(estimator.path).st_blocks * 512 < 100_000
    (1000000000, True)
    >>> folder.cleanup()
    """

    table: FileTable

    def __init__(self, path: str | os.PathLike[str], num_samples: int | None = None, *, dtype: Any = None) -> None:
        path = Path(path)
        if num_samples is not None:
            num_samples = checks.integer("num_samples", num_samples, minimum=1)
        # `requested` is compared with the dtype of the file below, once the file is open.
        requested = None if dtype is None else float_dtype(dtype)
        # A new file is sparse, so making it takes no time. An existing file is only opened.
        if not path.exists():
            if num_samples is None:
                raise ValueError(f"num_samples must be given, because {path} does not exist yet, got None")
            with replacing(path, Layout(num_samples, requested or np.dtype("<f4"))):
                pass
        self.table = FileTable(path)
        here = self.table.layout
        for name, value, stored in (("num_samples", num_samples, here.num_samples), ("dtype", requested, here.dtype)):
            if value is not None and value != stored:
                self.close()
                raise ValueError(f"{name} must be {stored}, as in {path}, got {value}")

    def __repr__(self) -> str:
        """Show file, size and dtype."""
        return f"MemoryMappedEstimator({str(self.path)!r}, num_samples={self.num_samples}, dtype={self.dtype})"

    def __reduce__(self) -> Any:
        """Refuse to copy or pickle this object: two objects would write to the same file."""
        raise TypeError(
            "a MemoryMappedEstimator must not be copied or pickled, because a file must be open in one estimator only: "
            f"call snapshot(path) to copy the file, got {self!r}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self.table.path

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the rows: float32 or float64."""
        return self.table.layout.dtype

    def prefetch(self, index: np.ndarray, /) -> None:
        """Tell the operating system that these rows will be gathered soon, and return without waiting.

        The system can then read the rows while the encoders run; `gather` alone would read one page after the other.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of a later batch.

        Raises
        ------
        TypeError, ValueError
            As `gather` does.
        """
        index = self.table.checked(index)
        if hasattr(os, "posix_fadvise"):  # some systems lack this function
            # The samples of a page are read together, so each page is requested once.
            per_page = mmap.PAGESIZE // (2 * self.dtype.itemsize)
            for page in np.unique(index // per_page).tolist():
                offset = OFFSET + page * mmap.PAGESIZE
                os.posix_fadvise(self.table.file.fileno(), offset, mmap.PAGESIZE, os.POSIX_FADV_WILLNEED)

    def grow(self, num_samples: int, /) -> Self:
        """Make the file longer and return this estimator: the old rows stay first, the new samples are not visited yet.

        Parameters
        ----------
        num_samples : int
            At least n.

        Raises
        ------
        TypeError, ValueError
            If `num_samples` breaks this rule, or the file was closed.
        """
        return super().grow(num_samples)

    def flush(self) -> None:
        """Wait until everything is on the disk."""
        self.table.flush()

    def snapshot(self, path: str | os.PathLike[str], /) -> dict[str, Any]:
        """Copy the file without the parts that no batch has visited, and return the copy's `state_dict`.

        Parameters
        ----------
        path : str or path
            The path of the copy. The copy gets this path when it is complete, and replaces an existing file.

        Raises
        ------
        ValueError
            If `path` is the estimator's own file, or the estimator was closed.
        """
        target, table = Path(path), self.table
        if target.exists() and os.path.samefile(target, self.path):
            raise ValueError(f"path must be another file than the estimator's, got {target}")
        self.flush()
        with replacing(target, table.layout) as copy:
            copy_data(table.file, copy, table.layout.size)
        return table.description(target)

    def state_dict(self) -> dict[str, Any]:
        """Flush, and return a description of the file instead of the rows, which may not fit into memory.

        Returns
        -------
        dict
            ``path``, ``version``, ``num_samples`` and ``dtype``. Later steps change the file; `snapshot` copies it.
        """
        self.flush()
        return self.table.description(self.path)

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Replace the rows by those of a file that `state_dict` or `snapshot` describes, or by two arrays.

        Parameters
        ----------
        state : mapping
            Either ``path``, ``version``, ``num_samples`` and ``dtype`` of a file, or the arrays ``log_inner_image`` and
            ``log_inner_text``, NumPy arrays (n,) in the estimator's dtype. If the description names the
            estimator's own file, nothing changes.

        Raises
        ------
        TypeError, ValueError
            If the state does not fit this estimator. The estimator is then unchanged.

        Notes
        -----
        The rows are copied piece by piece into a new file, which then replaces the estimator's file. An interruption
        leaves the old file unchanged.
        """
        table = self.table
        table.check_open()
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        # There are two kinds of state: the arrays of another estimator, and the description of a file.
        if set(state) == {column.name for column in table.columns}:
            table.load_state_dict(state)
            return
        expected = table.description(self.path)
        if set(state) != set(expected):
            raise ValueError(
                f"state must hold {', '.join(expected)}, or log_inner_image and log_inner_text, got {list(state)}"
            )
        for name in ("version", "num_samples", "dtype"):
            if state[name] != expected[name]:
                raise ValueError(f"{name} of the state must be {expected[name]}, got {state[name]}")
        path = Path(state["path"])
        if not path.exists():
            raise ValueError(f"path of the state must be a file, got {path}")
        if os.path.samefile(path, self.path):
            return
        # The layout is read from the file itself, because the file may have changed since the description was made.
        with open(path, "rb", buffering=0) as source:
            layout = read_layout(source, path)
            if layout != table.layout:
                raise ValueError(
                    f"{path} must have num_samples={table.layout.num_samples} and dtype={table.layout.dtype}, "
                    f"got num_samples={layout.num_samples} and dtype={layout.dtype}"
                )
            table.refill(lambda copy: copy_data(source, copy, layout.size))

    def close(self) -> None:
        """Unmap and close the file, which holds all rows that were written; closing again does nothing."""
        self.table.close()
