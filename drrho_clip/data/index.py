"""The index of data: a folder with the columns of a source, so that data are read and checked only once.

A folder INDEX holds `index.json`, which names the source and counts what is in it, and one .npy file per column. The
columns are memory-mapped, so an index of a million pairs is opened at once, and a caption is read when it is used. The
images stay where they are.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drrho_clip.data.content import file_digest, image_numbers
from drrho_clip.data.pair_source import ImageStore, PairSource, TextColumn, Unreadable
from drrho_clip.data.pair_table import FileStore
from drrho_clip.data.pairs import PairsDataset
from drrho_clip.data.protocol import Int64
from drrho_clip.data.sources.hub import HubStore
from drrho_clip.data.sources.idx import IdxStore
from drrho_clip.data.sources.shards import ShardStore
from drrho_clip.errors import BadInput
from drrho_clip.files.disk import naming, temporary_path
from drrho_clip.files.json_files import read_json
from drrho_clip.files.outputs import check_folder, write_json

__all__ = ["SCHEMA", "count", "is_index", "open_index", "read_index", "require_new", "write_index"]

SCHEMA: Final = 1
"""The version of the format; another version is refused by name."""

_DESCRIPTION: Final = "index.json"
_TEXTS: Final = ("captions", "image_names", "labels")
# Columns of at most this number of bytes are read into memory.
_SMALL: Final = 4096


def write_index(source: PairSource, folder: Path) -> dict[str, Any]:
    """Write the index of a source and return the description that `index.json` holds.

    The index is written under another name and then renamed, so a folder that has the name is complete.

    Raises
    ------
    BadInput
        The folder exists and is not empty, or cannot be written.
    """
    require_new(folder)
    image_ids = image_numbers(source.digests[source.record_of])
    # The store adds columns of its own: where each image is.
    values, places = source.store.describe()
    columns: dict[str, npt.NDArray[Any]] = {
        "record_of": source.record_of,
        "image_ids": image_ids,
        "digests": source.digests,
        **({} if source.parts is None else {"parts": source.parts}),
        **{f"store_{name}": array for name, array in places.items()},
    }
    for name in _TEXTS:
        column = TextColumn.of(getattr(source, name))
        columns |= {f"{name}_bytes": column.content, f"{name}_ends": column.ends}
    described = {
        "schema": SCHEMA,
        "kind": source.store.kind,
        "name": source.name,
        "path": source.path,
        "store": values,
        "files": [_recorded(file, folder) for file in source.store.files()],
        "text_files": [_recorded(file, folder) | {"digest": _digest(file)} for file in source.text_files],
        "fingerprint": PairsDataset(source).fingerprint(),
        "class_names": source.class_names,
        "counts": count(source, image_ids),
        "unreadable": source.unreadable,
        "columns": {name: {"dtype": array.dtype.str, "shape": array.shape} for name, array in columns.items()},
    }
    # A crash leaves a hidden folder, never half of an index under the name.
    temporary = temporary_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with naming(folder):
            temporary.mkdir(parents=True)
            for name, array in columns.items():
                with (temporary / f"{name}.npy").open("xb") as file:
                    np.save(file, array, allow_pickle=False)
                    file.flush()
                    # The columns must be on the disk before the folder gets the final name.
                    os.fsync(file.fileno())
            write_json(temporary / _DESCRIPTION, described)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return described


def require_new(folder: Path) -> None:
    """Raise BadInput unless an index can be written to a folder that is missing or empty."""
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"out must be a new or an empty folder, got {folder} with {sorted(os.listdir(folder))[0]}")
    check_folder(folder, "out")


def count(source: PairSource, image_ids: Int64) -> dict[str, Any]:
    """Return what is in a source: pairs, images, captions per image, duplicates and unreadable images."""
    per_image = np.bincount(image_ids)
    captions, how_many = np.unique(per_image, return_counts=True)
    # Eight bytes of a hash stand for a caption; 10^6 pairs collide with a probability of about 10^-8.
    hashes = np.fromiter((_hash(caption) for caption in source.captions), dtype=np.uint64, count=len(source))
    pairs = np.stack([image_ids.astype(np.uint64), hashes], axis=1)
    # Equal pairs stand side by side in sorted order.
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return {
        "pairs": len(source),
        "images": len(per_image),
        "captions_per_image": {str(number): int(images) for number, images in zip(captions, how_many, strict=True)},
        "duplicate_images": len(source.digests) - len(per_image),
        "duplicate_pairs": int(np.all(pairs[order[1:]] == pairs[order[:-1]], axis=1).sum()),
        "unreadable": len(source.unreadable),
    }


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def is_index(path: Path) -> bool:
    """Return whether a folder is an index."""
    return (path / _DESCRIPTION).is_file()


def open_index(path: str | os.PathLike[str]) -> PairsDataset:
    """Open all pairs of an index; the captions stay on the disk until they are used.

    Raises
    ------
    BadInput
        The index is damaged or of another version, or the data that it describes are missing or have changed.
    """
    return PairsDataset(read_index(Path(path)))


def read_index(folder: Path) -> PairSource:
    """Return the columns of an index, memory-mapped; the errors are those of `open_index`."""
    described = read_json(folder / _DESCRIPTION, "the description of an index")
    if not isinstance(described, dict) or described.get("schema") != SCHEMA:
        version = described.get("schema") if isinstance(described, dict) else described
        raise BadInput(f"{folder} must be an index of schema {SCHEMA}, got {version!r}: index the data again")
    try:
        columns = {name: _column(folder, name, about) for name, about in described["columns"].items()}
        files = [_found(folder, recorded) for recorded in described["files"]]
        # Earlier versions recorded no such files.
        for recorded in described.get("text_files", ()):
            _require_same_text(folder, recorded)
        store = _open_store(described, files, columns)
        texts = {name: TextColumn(columns[f"{name}_bytes"], columns[f"{name}_ends"]) for name in _TEXTS}
        return PairSource(
            name=described["name"],
            path=os.fspath(folder),
            store=store,
            record_of=columns["record_of"],
            digests=columns["digests"],
            parts=columns.get("parts"),
            class_names=tuple(described["class_names"]),
            unreadable=tuple(Unreadable(*entry) for entry in described["unreadable"]),
            image_ids=columns["image_ids"],
            fingerprint=described["fingerprint"],
            captions=texts["captions"],
            image_names=texts["image_names"],
            labels=texts["labels"],
        )
    except BadInput:
        raise
    # The description is a file of the user, so every field may be missing or of another type.
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{folder} must be an index, got a damaged one ({type(error).__name__}: {error})") from None


def _column(folder: Path, name: str, about: Mapping[str, Any]) -> npt.NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        # An empty file cannot be mapped, and a small one need not be.
        mapped = path.stat().st_size > _SMALL
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise BadInput(f"{folder} must be a whole index, got no column {path.name}: {error}") from None
    # The contents are not compared: that would read all columns, and every image has a digest anyway.
    if array.dtype.str != about["dtype"] or list(array.shape) != about["shape"]:
        raise BadInput(f"{folder} must be a whole index, got a column {path.name} of another size")
    return array


def _recorded(file: Path, folder: Path) -> dict[str, Any]:
    """Return how an index records a file or folder of the source: where it is, and how large a file is."""
    # The size of a folder says nothing about the files in it.
    path = os.path.abspath(file)
    size = os.stat(path).st_size if os.path.isfile(path) else None
    return {"path": path, "from_index": os.path.relpath(path, os.path.abspath(folder)), "size": size}


def _places(folder: Path, recorded: Mapping[str, Any]) -> tuple[Path, Path]:
    """Return where a recorded file may be: an index and the data may move together, for example to another disk."""
    return Path(recorded["path"]), Path(os.path.normpath(folder / recorded["from_index"]))


def _found(folder: Path, recorded: Mapping[str, Any]) -> Path:
    """Return where a recorded file is now: at its old place, or at the same place relative to the index."""
    candidates = _places(folder, recorded)
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise BadInput(f"{folder} must have its data where they were, got no {candidates[0]}")
    if recorded["size"] is not None and path.stat().st_size != recorded["size"]:
        raise BadInput(
            f"{folder} must describe the data as they are, got {path.stat().st_size:,} instead of "
            f"{recorded['size']:,} bytes in {path}: index the data again"
        )
    return path


def _digest(file: Path) -> str:
    with naming(file), file.open("rb") as stream:
        return file_digest(stream).hex()


def _require_same_text(folder: Path, recorded: Mapping[str, Any]) -> None:
    """Raise BadInput if a file of captions or labels has changed; the index does not need a file that is gone."""
    if not any(path.exists() for path in _places(folder, recorded)):
        return
    path = _found(folder, recorded)
    if _digest(path) != recorded["digest"]:
        raise BadInput(
            f"{folder} must describe the data as they are, got other content in {path}: index the data again"
        )


def _open_store(described: Mapping[str, Any], files: list[Path], columns: Mapping[str, npt.NDArray[Any]]) -> ImageStore:
    names = TextColumn(columns["image_names_bytes"], columns["image_names_ends"])
    if described["kind"] == ShardStore.kind:
        return ShardStore(files, columns["store_places"], names)
    if described["kind"] == FileStore.kind:
        return FileStore(Path(described["path"]), files[0], described["store"]["unit"], columns["store_numbers"], names)
    if described["kind"] == HubStore.kind:
        about = described["store"]
        return HubStore(files[0], about["column"], about["parts"], columns["store_places"])
    if described["kind"] == IdxStore.kind:
        return IdxStore(files[0].parent, columns["store_places"])
    raise BadInput(f"{described['kind']!r} must be a kind of data that this version knows")
