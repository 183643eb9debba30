"""Pairs in tar shards in the format of webdataset: files of equal names up to the first dot are a sample.

A sample has one image, and captions in a file .txt (a caption per line) or in a field of a file .json; a class may
stand in a file .cls or in the field "label". The shards are not unpacked: an image is read at its place in the shard.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drrho_clip.data.columns import ColumnNames
from drrho_clip.data.delimited import LINE_END, trim
from drrho_clip.data.images import decode_bytes, inspect_bytes
from drrho_clip.data.pair_source import PairSource, SourceBuilder, Unreadable
from drrho_clip.data.pair_table import checked_captions, checked_label
from drrho_clip.data.protocol import Int64, UInt8
from drrho_clip.data.sources.tar_members import Member, members
from drrho_clip.data.tables import IMAGE_SUFFIXES
from drrho_clip.errors import BadInput
from drrho_clip.terminal.progress import Reporter
from drrho_clip.terminal.safe_text import shown

__all__ = ["ShardStore", "expand_braces", "read_shards", "shards_in"]

_RANGE: Final = re.compile(r"\{(\d+)\.\.(\d+)\}")
_ARCHIVE: Final = re.compile(r"\.(tar|tgz|tar\.\w+)$", re.IGNORECASE)
_MOST_SHARDS: Final = 1_000_000


class ShardStore:
    """Images in tar shards, by shard, offset and size.

    Parameters
    ----------
    shards : sequence of Path
    places : ndarray of int64, shape (m, 3)
        For each record the number of the shard, and the offset and size of the image in bytes.
    image_names : sequence of str, length m
        Shard and member of each image.
    """

    kind = "shards"

    def __init__(self, shards: Sequence[Path], places: Int64, image_names: Sequence[str]) -> None:
        self.shards, self._places, self._image_names = tuple(shards), places, image_names

    def load(self, record: int, digest: bytes) -> UInt8:
        """Read an image at its place; see `decode_bytes`."""
        # A read at a place does not move a position, so threads may share the store.
        number, offset, size = self._places[record].tolist()
        # The file is opened for each image, so that a thousand shards need no thousand open files. A descriptor is
        # opened several times as quickly as a file object.
        descriptor = os.open(self.shards[number], os.O_RDONLY)
        try:
            content = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        return decode_bytes(content, digest)

    def place(self, record: int) -> str:
        """Return the shard and the key of a sample."""
        member = self._image_names[record].split("/", 1)[1]
        return f"{self._shard(record)}, sample {_key_and_suffix(member)[0]}"

    def image(self, record: int) -> str:
        """Return the shard and the name of the image in it."""
        return f"{self._shard(record).parent / self._image_names[record]}"

    def files(self) -> Sequence[Path]:
        """Return the shards."""
        return self.shards

    def describe(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Return the places of the images in the shards."""
        return {}, {"places": self._places}

    def _shard(self, record: int) -> Path:
        return self.shards[int(self._places[record, 0])]


def expand_braces(text: str) -> list[Path]:
    """Return the paths for which a text with ranges such as ``{000..099}`` stands; they need not exist.

    Raises
    ------
    BadInput
        A range falls, or the text stands for more than a million paths.

    Examples
    --------
    >>> [str(path) for path in expand_braces("a-{08..10}.tar")]
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    pieces = _RANGE.split(text)
    choices: list[list[str]] = []
    total = 1
    # `split` returns the text before a range, the two ends of the range, and so on.
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        total *= max(0, int(last) - int(first) + 1)
        if not 0 < total <= _MOST_SHARDS:
            raise BadInput(
                f"data must name 1 to {_MOST_SHARDS:,} shards by rising ranges, got {{{first}..{last}}} in {text!r}"
            )
        choices.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
    names = itertools.product(*choices)
    return [Path("".join(_interleave(pieces[::3], chosen))) for chosen in names]


def shards_in(text: str) -> list[Path]:
    """Return the shards for which a path stands: a shard, a folder of shards or a range; [] if it is other data.

    Raises
    ------
    BadInput
        A shard of a range is missing, or a folder of shards also holds images or compressed archives.
    """
    path = Path(text)
    if path.is_dir():
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        archives = [name for name in names if name.lower().endswith(".tar")]
        if archives:
            _refuse_other_pairs(path, archives[0], names)
        return [path / name for name in archives]
    if _ARCHIVE.search(text) is None or not (path.exists() or _RANGE.search(text)):
        return []
    # A file whose name looks like a range is that file.
    shards = [path] if path.exists() else expand_braces(text)
    missing = [shard for shard in shards if not shard.exists()]
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise BadInput(shown(f"{text} must have all shards of the range, got no {missing[0]}{more}"))
    return shards


def _refuse_other_pairs(folder: Path, shard: str, names: Sequence[str]) -> None:
    """Raise BadInput if a folder of shards also holds compressed archives or images, which would be left out."""
    for name in names:
        if _ARCHIVE.search(name) and not name.lower().endswith(".tar"):
            raise BadInput(shown(f"{folder} must hold uncompressed tar shards only, got {shard} and {name}"))
    # A folder of images may have folders in it.
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                image = os.path.relpath(os.path.join(place, name), folder)
                raise BadInput(shown(f"{folder} must hold tar shards or images, got both: {shard} and {image}"))


def read_shards(shards: Sequence[Path], names: ColumnNames, *, path: str) -> PairSource:
    """Read and check every sample of tar shards; each shard is read once.

    Raises
    ------
    BadInput
        A shard is damaged, or a sample lacks its image or its caption. Unreadable images are listed in the result.
    """
    builder, places, unreadable = SourceBuilder(), [], []
    # Flaws of samples are collected, so that the message can count them.
    problems: list[str] = []
    with Reporter(f"reading {path}", len(shards), brief=True) as reporter:
        for number, shard in enumerate(shards):
            for key, files in _samples(shard):
                place = f"{shard}, sample {key}"
                try:
                    image, captions, label = _checked(files, names)
                except BadInput as error:
                    problems.append(f"{place}: {error}")
                    continue
                digest, flaw = inspect_bytes(image.content)
                if flaw is None:
                    places.append((number, image.offset, len(image.content)))
                    builder.add(f"{shard.name}/{image.name}", captions, label, digest)
                else:
                    unreadable.append(Unreadable(place, image.name, flaw))
            reporter.advance()
    if problems:
        more = f" (and {len(problems) - 1} more such samples)" if len(problems) > 1 else ""
        raise BadInput(shown(f"{problems[0]}{more}"))
    if not len(builder) and not unreadable:
        raise BadInput(shown(f"{path} must hold samples of an image and a caption, got no file in the shards"))
    store = ShardStore(shards, np.array(places, dtype=np.int64).reshape(-1, 3), builder.image_names())
    return builder.build(_name(path), path, store, unreadable=unreadable)


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield key and files, by their suffixes, of each sample of a shard; the files of a sample stand side by side."""
    seen: set[str] = set()
    current, files = "", dict[str, Member]()
    for member in members(shard):
        key, suffix = _key_and_suffix(member.name)
        # Programs put hidden files into archives, such as "._photo.png".
        if not key or key.rsplit("/", 1)[-1].startswith(".") or not suffix:
            continue
        if key != current:
            if files:
                yield current, files
            if key in seen:
                raise BadInput(shown(f"{shard} must have different keys, got the sample {key} twice"))
            seen.add(key)
            current, files = key, {}
        if suffix in files:
            raise BadInput(shown(f"{shard} must have different keys, got the file {member.name} twice"))
        files[suffix] = member
    if files:
        yield current, files


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Divide the name of a member at the first dot of the file name: "a/b.c.txt" has key "a/b" and suffix "c.txt"."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _checked(files: Mapping[str, Member], names: ColumnNames) -> tuple[Member, tuple[str, ...], str]:
    """Return image, captions and label of a sample."""
    # The suffix "0.png" is that of an image too.
    images = [suffix for suffix in files if "." + suffix.rsplit(".", 1)[-1] in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise BadInput(f"must have one image (.jpg, .png or another usual suffix), got the files {_listed(files)}")
    fields: Mapping[str, Any] = {}
    if "json" in files:
        fields = _fields(files["json"])
    label = checked_label(fields.get(names.label_column or "label"), names.label_column or "label")
    # The file of the class comes before the field.
    if "cls" in files:
        label = checked_label(_text(files["cls"]), "cls")
    if "txt" in files and names.caption_column is None:
        lines = [line for line in LINE_END.split(_text(files["txt"])) if trim(line)]
        return files[images[0]], checked_captions(lines, ".txt"), label
    if not fields:
        raise BadInput(f"must have a caption in a file .txt or .json, got the files {_listed(files)}")
    column = names.caption_in(list(fields))
    return files[images[0]], checked_captions(fields[column], column), label


def _fields(member: Member) -> Mapping[str, Any]:
    try:
        value = json.loads(member.content)
    # A text that is nested too deeply is a RecursionError.
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{member.name} must be JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{member.name} must be a JSON object, got a value of type {type(value).__name__}")
    return value


def _text(member: Member) -> str:
    try:
        return member.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{member.name} must be UTF-8, got byte 0x{member.content[error.start]:02x}") from None


def _listed(files: Mapping[str, Member]) -> str:
    return ", ".join(f".{suffix}" for suffix in files)


def _name(path: str) -> str:
    """Return a short name: that of the file or folder, without ranges and suffix."""
    file = os.path.basename(os.path.normpath(path.split(" to ")[0]))
    return _RANGE.sub("", _ARCHIVE.sub("", file)).strip("-_.") or "shards"


def _interleave(first: Sequence[str], second: Sequence[str]) -> Iterator[str]:
    for text, number in itertools.zip_longest(first, second, fillvalue=""):
        yield from (text, number)
