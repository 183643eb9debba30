"""The file behind `MemoryMappedEstimator`: its layout, its lock, and copies that stay sparse.

The file begins with a header, which takes one page (4096 bytes). Then each sample has two numbers side by side, the
image anchor's and the text anchor's, so that both numbers lie on the same page. All numbers are little-endian.

The stored bits are the bits of the number XOR the bits of ``-inf``, which means "never visited". The stored bits of
``-inf`` are therefore zeros, which the system also returns for the parts of a file that were never written. So a new
file is sparse (it takes disk space only for samples that were written), and making a new file takes no time.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

HEADER = struct.Struct("<16sIIQ")
"""The fields of a header: magic bytes, version, bytes per number, num_samples."""

MAGIC = b"drrho estimator\0"
"""The first bytes of every file of this format."""

VERSION = 1
"""Version of the format."""

OFFSET = 4096
"""Bytes before the first sample: a page, so that the 8 or 16 bytes of a sample never straddle two pages."""

CHUNK = 1 << 22
"""Number of bytes in memory at a time while a file is copied; number of samples in memory while a file is filled."""


class Layout(NamedTuple):
    """The contents of a header: size and dtype of the table."""

    num_samples: int
    dtype: np.dtype[Any]

    @property
    def bits(self) -> np.dtype[Any]:
        """The integers that numbers are stored as."""
        return np.dtype(f"<u{self.dtype.itemsize}")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return OFFSET + 2 * self.dtype.itemsize * self.num_samples

    @property
    def never(self) -> np.ndarray:
        """Bits of ``-inf``."""
        return np.asarray(-np.inf, dtype=self.dtype).view(self.bits)

    @property
    def header(self) -> bytes:
        """The header's bytes."""
        return HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, self.num_samples)


def float_dtype(dtype: Any) -> np.dtype[Any]:
    """Return float32 or float64, little-endian."""
    received: np.dtype[Any] = np.dtype(dtype)
    if received not in (np.dtype("f4"), np.dtype("f8")):
        raise TypeError(f"dtype must be float32 or float64, got {received}")
    return np.dtype(f"<f{received.itemsize}")


def read_layout(file: BinaryIO, path: Path) -> Layout:
    """Read and check the header of a file, and check that the size of the file fits the header."""
    file.seek(0)
    header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path} must be a file of MemoryMappedEstimator, got one that starts with {header[:16]!r}")
    _, version, itemsize, num_samples = HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"{path} must have version {VERSION}, got {version}")
    if itemsize not in (4, 8) or num_samples < 1:
        raise ValueError(f"{path} must have a header of float32 or float64 samples, got {header!r}")
    layout = Layout(num_samples, np.dtype(f"<f{itemsize}"))
    # If the size does not fit the header, a copy or a growth of the file was interrupted.
    size = os.fstat(file.fileno()).st_size
    if size != layout.size:
        hint = " (after an interrupted grow(): truncate it to that size)" if size > layout.size else ""
        raise ValueError(f"{path} must have {layout.size} bytes for {num_samples} samples{hint}, got {size}")
    return layout


@contextlib.contextmanager
def replacing(path: Path, layout: Layout) -> Iterator[BinaryIO]:
    """Open a new, sparse file for a ``with`` block; after the block the file is on the disk, named `path`."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb", buffering=0) as file:
            file.write(layout.header)
            file.truncate(layout.size)
            yield file
            os.fsync(file.fileno())
        # Renaming is atomic: readers see the old file or the complete new file.
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def copy_data(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Copy the numbers of a sparse file, without its header; holes, the parts that were never written, stay holes."""
    for start, end in extents(source, OFFSET, size):
        for position in range(start, end, CHUNK):
            source.seek(position)
            block = source.read(min(CHUNK, end - position))
            # A block of zeros is not written, because some systems cannot tell which parts of a file are holes.
            if block.count(0) < len(block):
                target.seek(position)
                write_all(target, memoryview(block))


def extents(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges with data between two positions, or the whole range if the system cannot find such ranges."""
    if not hasattr(os, "SEEK_DATA"):
        yield start, end
        return
    # SEEK_DATA finds the start of the next range that holds data, and SEEK_HOLE the end of this range.
    while start < end:
        try:
            start = os.lseek(file.fileno(), start, os.SEEK_DATA)
        except OSError:  # no data from here on
            return
        stop = min(os.lseek(file.fileno(), start, os.SEEK_HOLE), end)
        if start < stop:
            yield start, stop
        start = stop


def write_all(file: BinaryIO, block: memoryview) -> None:
    """Write a whole block; a single `write` to an unbuffered file may write only a part of the block."""
    while block:
        block = block[file.write(block) :]


def lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes, and other estimators of this process, from writing to the same file."""
    # The lock belongs to the open file and ends when the file is closed, even if the process is killed.
    if fcntl is not None:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{path} must be open in one estimator at a time, got a file that is open already"
            ) from error
