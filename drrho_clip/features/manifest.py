"""The files of a cache of features, and the manifest that describes them.

manifest.json     model, data, sizes, and the checksum of every block
image.npy         features of the images, shape (n, d); NumPy maps the file into memory
text.npy          features of the captions, shape (n, e)
ids.npy           ids of the pairs by their content, shape (n, 32); see `drrho_clip.data.pair_ids`
progress.jsonl    checksums and unreadable rows of the finished blocks, while the cache is being written

A *block* is a number of neighbouring rows. The features are written block by block, and a block counts as finished as
soon as its line is in progress.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from drrho_clip.errors import BadInput
from drrho_clip.files.json_files import read_json
from drrho_clip.files.outputs import write_json
from drrho_clip.terminal.safe_text import brief

__all__ = ["DTYPES", "FILES", "SIDES", "Manifest", "block_checksum", "is_cache"]

_FORMAT: Final = "drrho-features"
_VERSION: Final = 1
SIDES: Final = ("image", "text")
DTYPES: Final = ("float32", "float16")
FILES: Final = ("manifest.json", "image.npy", "text.npy", "ids.npy", "progress.jsonl")
_BLOCK: Final = 1024


@dataclass(frozen=True)
class Manifest:
    """The description of a cache.

    Attributes
    ----------
    model : mapping
        The identity of the model: "name", "temperature", and the SHA-256 of "weights", "configuration",
        "preprocessing" and "tokenizer".
    data : mapping
        "name" and "fingerprint" of the encoded data.
    num_pairs : int
        Number n of rows.
    feature_dims : tuple of int
        Sizes d and e of the features of an image and a caption.
    dtype : {"float32", "float16"}
        The dtype of the files.
    block_rows : int
        Number of rows of a block; the last block may have fewer.
    checksums : tuple of mapping
        For each finished block the SHA-256 of the bytes in image.npy ("image"), text.npy ("text") and ids.npy ("ids").
    finished : bool
        All blocks are there.
    unreadable : mapping of str to str
        The rows whose image could not be read, with the reason. Their features are those of a black image.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    num_pairs: int
    feature_dims: tuple[int, int]
    dtype: str = "float32"
    block_rows: int = _BLOCK
    checksums: tuple[Mapping[str, str], ...] = ()
    finished: bool = False
    unreadable: Mapping[str, str] = field(default_factory=dict)

    def blocks(self) -> list[tuple[int, int]]:
        """Return first row and end of each block."""
        starts = range(0, self.num_pairs, self.block_rows)
        return [(start, min(start + self.block_rows, self.num_pairs)) for start in starts]

    def write(self, folder: Path) -> None:
        """Write manifest.json, whole or not at all."""
        # Tuples become lists in JSON; `read` turns them back.
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        # Earlier versions know no such entry, and can still read a cache without unreadable images.
        if not self.unreadable:
            del content["unreadable"]
        write_json(folder / "manifest.json", content | {"feature_dims": list(self.feature_dims)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read manifest.json.

        Raises
        ------
        BadInput
            If the file is missing or damaged, or comes from another program or version.
        """
        file = folder / "manifest.json"
        document = read_json(file, "the manifest of a cache of features")
        if not isinstance(document, dict) or document.pop("format", None) != _FORMAT:
            raise BadInput(f"{file} must describe a drrho cache of features, got another program's file")
        version = document.pop("version", None)
        if version != _VERSION:
            raise BadInput(f"{file} must have version {_VERSION}, got {brief(version)}")
        # A key that is missing or unknown, or a value of a wrong type, raises one of the exceptions below.
        try:
            dims = tuple(document.pop("feature_dims"))
            manifest = cls(feature_dims=dims, checksums=tuple(document.pop("checksums")), **document)
            manifest.require_sound()
        except BadInput as error:
            raise BadInput(f"{file}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{file} must describe a cache of features, got a damaged description ({error!r})") from None
        return manifest

    def require_sound(self) -> None:
        """Raise BadInput if an entry has a wrong type or is out of its range."""
        sizes = {"num_pairs": self.num_pairs, "block_rows": self.block_rows}
        sizes |= dict(zip(("feature_dims[0]", "feature_dims[1]"), self.feature_dims, strict=True))
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadInput(f"{name} must be an integer of at least 1, got {brief(value)}")
        if self.dtype not in DTYPES:
            raise BadInput(f"dtype must be one of {', '.join(DTYPES)}, got {brief(self.dtype)}")
        if not isinstance(self.model, Mapping) or not isinstance(self.data, Mapping):
            raise BadInput("model and data must be objects, got something else")
        # The temperature is the only entry of the identity with which something is computed.
        temperature = self.model.get("temperature")
        if not isinstance(temperature, float) or not 0 < temperature < float("inf"):
            raise BadInput(f"the temperature of the model must be a number > 0, got {brief(temperature)}")
        if not isinstance(self.finished, bool):
            raise BadInput(f"finished must be true or false, got {brief(self.finished)}")
        for row, reason in self.unreadable.items():
            if not row.isdecimal() or int(row) >= self.num_pairs or not isinstance(reason, str):
                raise BadInput(f"unreadable must have rows below {self.num_pairs} with reasons, got {brief(row)}")
        for checksums in self.checksums:
            if set(checksums) != {"image", "text", "ids"}:
                raise BadInput(f"a block must have the checksums of image, text and ids, got {brief(checksums)}")

    def like(self, model: Mapping[str, Any], data: Mapping[str, Any]) -> Manifest:
        """Return a manifest with the same sizes for another model and other data."""
        return replace(self, model=dict(model), data=dict(data))

    def content_digest(self) -> str:
        """Return a SHA-256, in hex, of dtype, sizes and checksums: caches with equal files have equal digests."""
        described = [self.dtype, self.num_pairs, self.block_rows, *(sorted(block.items()) for block in self.checksums)]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def difference(self, other: Manifest) -> str | None:
        """Return what differs between two encodings, in words, or None if they are the same encoding.

        The names of model and data do not count, because folders may move.
        """
        # The most telling difference comes first, because only one of them is named.
        for part in ("weights", "configuration", "preprocessing", "tokenizer"):
            # Caches of older versions have no entry for the configuration.
            if part == "configuration" and not (part in self.model and part in other.model):
                continue
            if self.model.get(part) != other.model.get(part):
                words = "model" if part == "weights" else part
                return f"another {words}: {self.model.get('name')} in place of {other.model.get('name')}"
        if self.model.get("temperature") != other.model.get("temperature"):
            return f"another temperature: {self.model.get('temperature')} in place of {other.model.get('temperature')}"
        if self.data.get("fingerprint") != other.data.get("fingerprint"):
            return f"other data: {self.data.get('name')} with other content than {other.data.get('name')}"
        if self.dtype != other.dtype:
            return f"another dtype: {self.dtype} in place of {other.dtype}"
        if (self.num_pairs, self.feature_dims) != (other.num_pairs, other.feature_dims):
            return "other sizes"
        return None


def block_checksum(content: bytes | memoryview) -> str:
    """Return the SHA-256 of the bytes of a block, in hex."""
    return hashlib.sha256(content).hexdigest()


def is_cache(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds the manifest of a cache."""
    return (Path(folder) / "manifest.json").is_file()
