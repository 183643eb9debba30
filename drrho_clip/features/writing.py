"""Write the features of all pairs into a cache, block by block, so that a killed encoding continues where it was."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.data.pair_ids import pair_ids
from drrho_clip.errors import BadInput
from drrho_clip.features.manifest import DTYPES, FILES, SIDES, Manifest, block_checksum, is_cache
from drrho_clip.files.disk import naming
from drrho_clip.files.json_files import parse_json
from drrho_clip.files.lock import LOCK, only_process
from drrho_clip.files.outputs import check_folder
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.together import of_first, together_with_values
from drrho_clip.terminal.safe_text import brief

if TYPE_CHECKING:
    from drrho_clip.data import Dataset
    from drrho_clip.encoders import PairEncoder

__all__ = ["encode_pairs"]


def encode_pairs(
    encoder: PairEncoder,
    dataset: Dataset,
    folder: str | os.PathLike[str],
    *,
    data_name: str | None = None,
    dtype: str = "float32",
    batch_size: int = 256,
    after_rows: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> Manifest:
    """Encode all pairs of a data set, and write the features into a cache.

    If several processes share the encoding, all of them call this function, and the first process writes.

    Parameters
    ----------
    encoder : PairEncoder
        The model.
    dataset : Dataset
        n pairs.
    folder : path
        The folder of the cache. If it holds an unfinished cache of the same model and the same data, the encoding
        continues after the last finished block. If that cache is finished, nothing is done.
    data_name : str, optional
        The name of the data in the manifest; by default that of the data set.
    dtype : {"float32", "float16"}
        The dtype of the files. Features of float16 need half the space and are normalised again when they are read.
    batch_size : int
        Pairs that are encoded at a time, at least 1.
    after_rows : callable, optional
        Called at the start and after each batch with the number of rows that are encoded.
    processes : Processes, optional
        The processes that share the encoding; by default this process encodes alone.

    Returns
    -------
    Manifest
        The manifest of the finished cache.

    Raises
    ------
    BadInput
        If the folder holds another cache or other files, or if an image cannot be decoded.
    OSError
        If the disk refuses a file; the error names the file.
    """
    if dtype not in DTYPES:
        raise BadInput(f"dtype must be one of {', '.join(DTYPES)}, got {brief(dtype)}")
    # The module of shared encoding imports the package of the encoders, which imports this package.
    from drrho_clip.processes.encoding import shared_encoder

    folder = Path(folder)

    def begun(stack: contextlib.ExitStack) -> _Begun:
        # The content decides about equality; the names are for the reader of a message.
        data = {"name": data_name or dataset.name, "fingerprint": dataset.fingerprint()}
        manifest = Manifest(encoder.identity(), data, len(dataset), encoder.feature_dims, dtype=dtype)
        manifest.require_sound()
        return _begin(manifest, folder, stack)

    is_first = processes is None or processes.is_first
    with contextlib.ExitStack() as stack:
        own, places = together_with_values(processes, lambda: _with_place(begun(stack) if is_first else None))
        batches: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())
        if places[0] is not None:
            first_row, block_rows = places[0]
            shared = shared_encoder(encoder, processes)
            batches = shared.batches_of(dataset, first_row=first_row, batch_size=min(batch_size, block_rows))
        if own is None:
            # The first process writes; this one only takes part in the encoding.
            for _ in batches:
                pass
        finished = None if own is None else own.finished or _write(own, batches, dataset, folder, after_rows)
    entries = of_first(processes, lambda: None if finished is None else asdict(finished))
    if finished is None:
        assert entries is not None
        finished = Manifest(**(entries | {"feature_dims": tuple(entries["feature_dims"])}))
    # An earlier process may have met some of the unreadable images.
    of_dataset: dict[int, str] = getattr(dataset, "unreadable", {})
    for row, reason in finished.unreadable.items():
        of_dataset.setdefault(int(row), reason)
    return finished


class _Begun(NamedTuple):
    """A cache that is being written: what earlier processes have written, and the first row that is missing."""

    manifest: Manifest
    done: list[dict[str, str]]
    unreadable: dict[str, str]
    first_row: int
    finished: Manifest | None = None


def _with_place(begun: _Begun | None) -> tuple[_Begun | None, tuple[int, int] | None]:
    """Return a cache, and for the other processes the first row to encode and the length of a block."""
    if begun is None or begun.finished is not None:
        return begun, None
    return begun, (begun.first_row, begun.manifest.block_rows)


def _begin(manifest: Manifest, folder: Path, stack: contextlib.ExitStack) -> _Begun:
    """Prepare a folder for writing or continuing a cache, and hold the lock of the folder until the stack is left."""
    stored = _stored(folder, manifest)
    if stored is None or not stored.finished:
        check_folder(folder, "out")
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(only_process(folder))
        # Another process may have finished the same cache in the meantime.
        stored = _stored(folder, manifest)
    if stored is not None and stored.finished:
        return _Begun(stored, [], {}, stored.num_pairs, stored)
    manifest = stored or manifest
    for name in FILES:
        if (folder / name).is_symlink():
            raise BadInput(f"{folder / name} must be a plain file, got a link to {os.readlink(folder / name)}")
    manifest.write(folder)
    # After a crash only the blocks that progress.jsonl lists count as encoded.
    done, unreadable = _finished_blocks(folder, manifest)
    blocks = manifest.blocks()
    first_row = blocks[len(done)][0] if len(done) < len(blocks) else manifest.num_pairs
    return _Begun(manifest, done, unreadable, first_row)


def _stored(folder: Path, manifest: Manifest) -> Manifest | None:
    """Return the manifest of the cache in a folder, or None; raise BadInput if the folder serves another purpose."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"out must be a folder, got the file {folder}")
    if not is_cache(folder):
        others = sorted(set(os.listdir(folder)) - {LOCK}) if folder.is_dir() else []
        # A crash before the first manifest leaves at most a temporary file behind.
        others = [name for name in others if not name.startswith(".manifest.json.")]
        if others:
            raise BadInput(f"out must be an empty folder or a cache, got {folder} with {', '.join(others[:5])}")
        return None
    stored = Manifest.read(folder)
    difference = stored.difference(manifest)
    if difference is not None:
        raise BadInput(f"out must be a folder for this model and these data, got {folder} with {difference}")
    return stored


def _write(
    begun: _Begun,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    dataset: Dataset,
    folder: Path,
    after_rows: Callable[[int], None] | None,
) -> Manifest:
    """Write the missing blocks, then the final manifest."""
    manifest, done, unreadable, first_row, _ = begun
    ids = pair_ids(dataset)
    # The threads that read images add rows while the blocks are written.
    noted: dict[int, str] = getattr(dataset, "unreadable", {})
    blocks = manifest.blocks()
    if after_rows is not None:
        after_rows(first_row)
    with contextlib.ExitStack() as stack:
        widths = {**dict(zip(SIDES, manifest.feature_dims, strict=True)), "ids": ids.shape[1]}
        files = {
            name: stack.enter_context(
                _column(folder / f"{name}.npy", manifest, width, first_row, "uint8" if name == "ids" else None)
            )
            for name, width in widths.items()
        }
        log = stack.enter_context((folder / "progress.jsonl").open("ab"))
        rows = _by_block(batches, manifest, first_row, after_rows)
        for (start, stop), (image, text) in zip(blocks[len(done) :], rows, strict=True):
            columns = {"image": image, "text": text, "ids": ids[start:stop]}
            checksums = {name: _append(files[name], folder / f"{name}.npy", columns[name]) for name in files}
            bad = {str(row): noted[row] for row in sorted(set(noted)) if start <= row < stop}
            # The line comes last, so a block with a line is on the disk.
            with naming(folder / "progress.jsonl"):
                log.write(json.dumps(checksums | ({"unreadable": bad} if bad else {})).encode() + b"\n")
                log.flush()
                os.fsync(log.fileno())
            done.append(checksums)
            unreadable |= bad
    # From here on the manifest alone describes the cache; a crash before the last line leaves a file that is not read.
    finished = replace(manifest, checksums=tuple(done), finished=True, unreadable=unreadable)
    finished.write(folder)
    (folder / "progress.jsonl").unlink(missing_ok=True)
    return finished


def _finished_blocks(folder: Path, manifest: Manifest) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Return checksums and unreadable rows of the blocks on the disk; cut off a line that a crash left unfinished."""
    file = folder / "progress.jsonl"
    if not file.exists():
        return [], {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with naming(file), file.open("r+b") as log:
            log.truncate(len(whole))
    try:
        done = [dict(parse_json(line)) for line in whole.splitlines()]
        unreadable = {row: reason for block in done for row, reason in block.pop("unreadable", {}).items()}
        replace(manifest, checksums=tuple(done), unreadable=unreadable).require_sound()
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{file} must hold the checksums of finished blocks, got a damaged line: {error}") from None
    if len(done) > len(manifest.blocks()):
        raise BadInput(f"{file} must have at most {len(manifest.blocks())} lines, got {len(done)}")
    return done, unreadable


@contextlib.contextmanager
def _column(path: Path, manifest: Manifest, width: int, first_row: int, dtype: str | None) -> Iterator[BinaryIO]:
    """Open a .npy file for appending behind `first_row` rows; the header names the shape of the finished file."""
    kind = np.dtype(dtype or manifest.dtype)
    header = io.BytesIO()
    shape = (manifest.num_pairs, width)
    np.lib.format.write_array_header_1_0(header, {"descr": kind.str, "fortran_order": False, "shape": shape})
    # The header has the same length for every number of rows, so the place of a row is known.
    start = header.getvalue()
    length = len(start) + first_row * width * kind.itemsize
    with naming(path), path.open("ab") as created:
        size = created.tell()
    if first_row and size < length:
        raise BadInput(f"{path} must hold the {first_row} rows that progress.jsonl lists, got a file of {size} bytes")
    # Rows behind the last finished block are written again. The file only grows by writing, never by a hole, so that a
    # full disk gives an error and not a crash of the process.
    with naming(path), path.open("r+b") as file:
        if first_row == 0:
            file.truncate(0)
            file.write(start)
        file.truncate(length)
        file.seek(length)
        yield file


def _append(file: BinaryIO, path: Path, rows: npt.NDArray[np.generic]) -> str:
    """Append rows to a file, wait until they are on the disk, and return their checksum."""
    content = np.ascontiguousarray(rows).tobytes()
    with naming(path):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return block_checksum(content)


def _by_block(
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    manifest: Manifest,
    first_row: int,
    after_rows: Callable[[int], None] | None,
) -> Iterator[tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]]:
    """Yield the features of the blocks from `first_row` on, in the dtype of the cache."""
    # Batches and blocks need not end at the same row, so `parts` holds the rows that belong to the next block.
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    start = stop = first_row
    for batch in batches:
        parts.append(batch)
        stop += len(batch[0])
        if after_rows is not None:
            after_rows(stop)
        while stop - start >= manifest.block_rows or (stop == manifest.num_pairs and stop > start):
            image, text = (np.concatenate(side) for side in zip(*parts, strict=True))
            end = min(manifest.block_rows, len(image))
            yield _stored_form(image[:end], manifest), _stored_form(text[:end], manifest)
            parts = [(image[end:], text[end:])]
            start += end


def _stored_form(features: np.ndarray, manifest: Manifest) -> npt.NDArray[np.floating]:
    if not np.isfinite(features).all():
        raise BadInput(f"the features of {manifest.model.get('name')} must be finite, got nan or infinity")
    return features.astype(manifest.dtype)
