"""The inner estimates of more samples than memory holds, in a file.

Layout, little-endian: one page of header, then per sample the image anchor's and the text anchor's number side by
side, so that a sample costs one page. A number is stored as its bits, exclusive or with the bits of ``-inf``: what
was never written reads as zeros, and zeros mean "never visited". So a new file is sparse, and made at once.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import array_api_compat.numpy
import numpy as np

from drrho_core import _validate
from drrho_core._array_api import namespace_of
from drrho_core.estimator import check_index, check_rows

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_XP = array_api_compat.numpy
_HEADER = struct.Struct("<16sIIQ")  # magic, version, bytes of a number, num_samples
_MAGIC = b"drrho estimator\0"
_VERSION = 1
_OFFSET = 4096
"""Bytes before the first sample: a page, so that 8 or 16 bytes of a sample never straddle two."""

_CHUNK = 1 << 22
"""Bytes, or samples, that are in memory at a time while a file is copied or filled."""


class _Layout(NamedTuple):
    """What a header says."""

    num_samples: int
    dtype: np.dtype[Any]

    @property
    def bits(self) -> np.dtype[Any]:
        """The integers that numbers are stored as."""
        return np.dtype(f"<u{self.dtype.itemsize}")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return _OFFSET + 2 * self.dtype.itemsize * self.num_samples

    @property
    def never(self) -> np.ndarray:
        """Bits of ``-inf``."""
        return np.asarray(-np.inf, dtype=self.dtype).view(self.bits)

    @property
    def header(self) -> bytes:
        return _HEADER.pack(_MAGIC, _VERSION, self.dtype.itemsize, self.num_samples)


class MemoryMappedEstimator:
    """Both directions' logarithmic inner estimates of n samples, in a file: `drrho_core.InnerEstimator` for large n.

    Parameters
    ----------
    path : str or path
        The file. One that exists is opened, with what it holds; else a new one is made, in which no sample was visited.
    num_samples : int, optional
        n >= 1. Needed for a new file; must be its n for one that exists.
    dtype : dtype, optional
        float32 (a new file's default) or float64; must be its dtype for a file that exists.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules, the file is none of this kind, version or size, or it is open already.
    OSError
        If the file cannot be made or opened.

    Notes
    -----
    A new file takes no disk space but that of samples visited (a page of 4096 bytes holds 512 of them), up to
    ``4096 + 8 n`` bytes in float32. Where the disk fills up the operating system ends the process, so leave that much.

    What `scatter` has written survives the end of the process, however sudden. After a power failure a sample holds
    either its estimate of the last `flush`, or a later one: the system writes pages back when it likes, but both
    numbers of a sample always together. Such a state is usable, but it is not that of one certain step; `snapshot` is.

    Indices and rows are NumPy arrays; ``torch.from_numpy(rows)`` and ``jax.numpy.asarray(rows)`` take them further.

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

    def __init__(self, path: str | os.PathLike[str], num_samples: int | None = None, *, dtype: Any = None) -> None:
        self._path = Path(path)
        if num_samples is not None:
            num_samples = _validate.integer("num_samples", num_samples, minimum=1)
        wanted = None if dtype is None else _float_dtype(dtype)
        if not self._path.exists():
            if num_samples is None:
                raise ValueError(f"num_samples must be given for a new file, got None and no file {self._path}")
            layout = _Layout(num_samples, wanted or np.dtype("<f4"))
            with _replacing(self._path, layout):
                pass
        self._open()
        found = self._layout
        for name, got, here in (("num_samples", num_samples, found.num_samples), ("dtype", wanted, found.dtype)):
            if got is not None and got != here:
                self.close()
                raise ValueError(f"{name} must be {here}, as in {self._path}, got {got}")

    def _open(self) -> None:
        """Map the file, after a look at its header."""
        self._file: BinaryIO = open(self._path, "r+b", buffering=0)  # noqa: SIM115
        try:
            _lock(self._file, self._path)
            self._layout = _read_layout(self._file, self._path)
            self._map()
        except BaseException:
            self._file.close()
            raise

    def _map(self) -> None:
        layout = self._layout
        self._memory = mmap.mmap(self._file.fileno(), layout.size, access=mmap.ACCESS_WRITE)
        if hasattr(mmap, "MADV_RANDOM"):  # do not read the neighbours of a sample, too
            self._memory.madvise(mmap.MADV_RANDOM)
        bits = np.frombuffer(self._memory, dtype=layout.bits, offset=_OFFSET)
        self._bits = bits.reshape(layout.num_samples, 2)
        self._like = np.zeros(0, dtype=layout.dtype)

    def __repr__(self) -> str:
        """Show what it holds."""
        return f"MemoryMappedEstimator({str(self._path)!r}, num_samples={self.num_samples}, dtype={self.dtype})"

    def __reduce__(self) -> Any:
        """Refuse copies: two objects would write to one file."""
        raise TypeError(
            "a MemoryMappedEstimator must not be copied or pickled, because a file is open in one estimator at a time: "
            f"use snapshot(path), got {self!r}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def num_samples(self) -> int:
        """Number of samples n."""
        return self._layout.num_samples

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the rows: float32 or float64."""
        return self._layout.dtype

    def gather(self, index: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a batch.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of the batch: in [0, n), no repeats.

        Returns
        -------
        tuple of arrays, shape (b,)
            Copies of the image anchors' and the text anchors' rows.

        Raises
        ------
        TypeError, ValueError
            If `index` is no such array, or the file was closed.
        """
        index = self._checked(index)
        rows = (self._bits[index] ^ self._layout.never).view(self.dtype)
        return np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1])

    def scatter(
        self, index: np.ndarray, log_inner_image: np.ndarray, log_inner_text: np.ndarray, /
    ) -> MemoryMappedEstimator:
        """Write the rows of a batch and return this estimator.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of the batch: in [0, n), no repeats.
        log_inner_image, log_inner_text : array, shape (b,)
            Updated rows, in the state's dtype.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules, or the file was closed; nothing has been written then.
        """
        index = self._checked(index)
        check_rows(log_inner_image, log_inner_text, size=index.shape[0], like=self._like, xp=_XP)
        rows = np.stack([log_inner_image, log_inner_text], axis=1)
        self._bits[index] = rows.view(self._layout.bits) ^ self._layout.never
        return self

    def prefetch(self, index: np.ndarray, /) -> None:
        """Tell the operating system that these rows will be gathered soon, and do not wait.

        While the encoders of a batch run, its rows come from the disk; `gather` alone would fetch one after the other.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of a batch to come.

        Raises
        ------
        TypeError, ValueError
            As `gather` does.
        """
        index = self._checked(index)
        if hasattr(os, "posix_fadvise"):  # not on every system
            per_page = mmap.PAGESIZE // (2 * self.dtype.itemsize)
            for page in np.unique(index // per_page).tolist():
                offset = _OFFSET + page * mmap.PAGESIZE
                os.posix_fadvise(self._file.fileno(), offset, mmap.PAGESIZE, os.POSIX_FADV_WILLNEED)

    def grow(self, num_samples: int, /) -> MemoryMappedEstimator:
        """Make the file longer and return this estimator: the old rows first, the new ones never visited.

        Parameters
        ----------
        num_samples : int
            At least n.

        Raises
        ------
        TypeError, ValueError
            If `num_samples` is none, or the file was closed.
        """
        num_samples = _validate.integer("num_samples", num_samples, minimum=self.num_samples)
        self.flush()
        grown = _Layout(num_samples, self.dtype)
        self._unmap()
        try:
            self._file.truncate(grown.size)
            os.fsync(self._file.fileno())
            self._file.seek(0)
            self._file.write(grown.header)
            os.fsync(self._file.fileno())
            self._layout = grown
        finally:
            self._map()
        return self

    def flush(self) -> None:
        """Wait until everything is on the disk."""
        self._check_open()
        self._memory.flush()

    def snapshot(self, path: str | os.PathLike[str], /) -> dict[str, Any]:
        """Copy the file, parts never visited left out, and return the copy's `state_dict`.

        Parameters
        ----------
        path : str or path
            The copy. It appears when it is complete; one that exists is replaced.

        Raises
        ------
        ValueError
            If it is this very file, or that was closed.
        """
        target = Path(path)
        if target.exists() and os.path.samefile(target, self._path):
            raise ValueError(f"path must be another file than the estimator's, got {target}")
        self.flush()
        with _replacing(target, self._layout) as copy:
            _copy_data(self._file, copy, self._layout.size)
        return self._description(target)

    def state_dict(self) -> dict[str, Any]:
        """Flush, and return what it takes to find and check the file again, not what it holds: that may be too large.

        Returns
        -------
        dict
            ``path``, ``version``, ``num_samples`` and ``dtype``, all of them text or numbers. The file goes on
            changing; what shall be kept as it is needs a `snapshot`.
        """
        self.flush()
        return self._description(self._path)

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take over what `state_dict` or `snapshot` described, or the arrays of `drrho_core.InnerEstimator`'s.

        Parameters
        ----------
        state : mapping
            ``path``, ``version``, ``num_samples`` and ``dtype`` of another file, or of this one, which changes nothing.
            Or ``log_inner_image`` and ``log_inner_text``, NumPy arrays (n,) in this dtype.

        Raises
        ------
        TypeError, ValueError
            If it does not fit; nothing has been changed then.

        Notes
        -----
        It is copied piece by piece into a new file, which then takes this one's place: an interruption leaves the old.
        """
        self._check_open()
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        if set(state) == {"log_inner_image", "log_inner_text"}:
            self._load_arrays(state["log_inner_image"], state["log_inner_text"])
            return
        expected = self._description(self._path)
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
        if os.path.samefile(path, self._path):
            return
        with open(path, "rb", buffering=0) as source:
            found = _read_layout(source, path)
            if found != self._layout:
                raise ValueError(f"{path} must hold {self._layout[:]}, got {found[:]}")
            self._refill(lambda copy: _copy_data(source, copy, self._layout.size))

    def close(self) -> None:
        """Unmap and close the file, which holds all that was written; closing again does nothing."""
        if not self._file.closed:
            self._unmap()
            self._file.close()

    def _load_arrays(self, image: np.ndarray, text: np.ndarray) -> None:
        for name, rows in (("log_inner_image", image), ("log_inner_text", text)):
            namespace_of({"the estimator": self._like, name: rows}, _XP)
            _validate.shape(name, rows, (self.num_samples,), "(num_samples,)")
        for start in range(0, self.num_samples, _CHUNK):
            part = slice(start, start + _CHUNK)
            check_rows(image[part], text[part], size=image[part].shape[0], like=self._like, xp=_XP)

        def fill(copy: BinaryIO) -> None:
            for start in range(0, self.num_samples, _CHUNK):
                part = slice(start, start + _CHUNK)
                rows = np.stack([image[part], text[part]], axis=1).view(self._layout.bits) ^ self._layout.never
                if rows.any():
                    copy.seek(_OFFSET + start * 2 * self.dtype.itemsize)
                    _write(copy, memoryview(rows).cast("B"))

        self._refill(fill)

    def _refill(self, fill: Callable[[BinaryIO], None]) -> None:
        """Fill a new file and go on with it in this one's place."""
        try:
            with _replacing(self._path, self._layout) as copy:
                fill(copy)
                self.close()
        finally:
            if self._file.closed:
                self._open()

    def _description(self, path: Path) -> dict[str, Any]:
        return {
            "path": str(path.absolute()),
            "version": _VERSION,
            "num_samples": self.num_samples,
            "dtype": self.dtype.name,
        }

    def _checked(self, index: np.ndarray) -> np.ndarray:
        self._check_open()
        checked: np.ndarray = check_index(index, self.num_samples, like=self._like, xp=_XP)
        return checked

    def _check_open(self) -> None:
        if self._file.closed:
            raise ValueError(f"the estimator must be open, got one whose file {self._path} was closed")

    def _unmap(self) -> None:
        del self._bits  # which holds on to the memory
        self._memory.close()


def _float_dtype(dtype: Any) -> np.dtype[Any]:
    """Return float32 or float64, little-endian."""
    found: np.dtype[Any] = np.dtype(dtype)
    if found not in (np.dtype("f4"), np.dtype("f8")):
        raise TypeError(f"dtype must be float32 or float64, got {found}")
    return np.dtype(f"<f{found.itemsize}")


def _read_layout(file: BinaryIO, path: Path) -> _Layout:
    """Read and check a header, and the file's size against it."""
    file.seek(0)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{path} must be a file of MemoryMappedEstimator, got one that starts with {header[:16]!r}")
    _, version, itemsize, num_samples = _HEADER.unpack(header)
    if version != _VERSION:
        raise ValueError(f"{path} must have version {_VERSION}, got {version}")
    if itemsize not in (4, 8) or num_samples < 1:
        raise ValueError(f"{path} must have a header of float32 or float64 samples, got {header!r}")
    layout = _Layout(num_samples, np.dtype(f"<f{itemsize}"))
    size = os.fstat(file.fileno()).st_size
    if size != layout.size:
        hint = " (after an interrupted grow(): truncate it to that size)" if size > layout.size else ""
        raise ValueError(f"{path} must have {layout.size} bytes for {num_samples} samples{hint}, got {size}")
    return layout


@contextlib.contextmanager
def _replacing(path: Path, layout: _Layout) -> Iterator[BinaryIO]:
    """Give a new, sparse file, which takes the name `path` once it is complete and on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb", buffering=0) as file:
            file.write(layout.header)
            file.truncate(layout.size)
            yield file
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _copy_data(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Copy what a sparse file holds, its header left out; holes stay holes."""
    for start, end in _extents(source, _OFFSET, size):
        for position in range(start, end, _CHUNK):
            source.seek(position)
            block = source.read(min(_CHUNK, end - position))
            if block.count(0) < len(block):
                target.seek(position)
                _write(target, memoryview(block))


def _extents(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where a file holds data between two positions; all of it where the system cannot tell."""
    if not hasattr(os, "SEEK_DATA"):
        yield start, end
        return
    while start < end:
        try:
            start = os.lseek(file.fileno(), start, os.SEEK_DATA)
        except OSError:  # none from here on
            return
        stop = min(os.lseek(file.fileno(), start, os.SEEK_HOLE), end)
        if start < stop:
            yield start, stop
        start = stop


def _write(file: BinaryIO, block: memoryview) -> None:
    """Write all of a block: an unbuffered file may take less at a time."""
    while block:
        block = block[file.write(block) :]


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes, and other estimators of this one, from writing to the same file."""
    if fcntl is not None:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} must be open in one estimator at a time, got one that is open already") from error
