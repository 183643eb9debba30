"""Find the members of a tar archive, with the places of their contents, so that a member can be read alone.

The module `tarfile` needs about 30 microseconds for a header, which would be a minute for a million pairs. So plain
headers are read here, and `tarfile` reads only the headers of other kinds: of links and of long names.
"""

from __future__ import annotations

import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from drrho_clip.errors import BadInput
from drrho_clip.terminal.safe_text import shown

__all__ = ["Member", "members"]

_BLOCK: Final = tarfile.BLOCKSIZE
_PLAIN: Final = frozenset(b"0\0")
# The modulus of the checksum Adler-32.
_ADLER: Final = 65_521
# The beginnings of compressed files, in which no member can be read at its place.
_COMPRESSED: Final = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
# Keywords of an extended header that change where the content of the next member is or what it is called.
_KEYWORDS: Final = (b"path=", b"size=", b"GNU.sparse", b"charset=")


class Member(NamedTuple):
    """A file in an archive: the name, the place and size of the content in bytes, and the content."""

    name: str
    offset: int
    content: bytes


def members(path: Path) -> Iterator[Member]:
    """Yield the files of a tar archive in order; the archive is read once from the start to the end.

    Raises
    ------
    BadInput
        The archive is missing, is compressed, is damaged, or was cut short.
    """
    try:
        # A named pipe would wait for a writer, and it cannot be read at an offset later.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadInput(f"{path} must be a tar archive, got no regular file")
        with path.open("rb", buffering=1 << 20) as file:
            yield from _members(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise BadInput(shown(f"cannot read {path}: {error.strerror or error}")) from None


def _members(path: Path, file: BinaryIO, length: int) -> Iterator[Member]:
    position = 0
    while True:
        header = file.read(_BLOCK)
        if header and not any(header):
            return
        compression = next((name for start, name in _COMPRESSED if header.startswith(start)), None)
        if position == 0 and compression is not None:
            raise BadInput(f"{path} must be an uncompressed tar archive, got one that {compression} has compressed")
        if len(header) < _BLOCK:
            # Every writer of archives puts blocks of zeros behind the last member.
            end = "at the end" if position else "in an empty file"
            raise BadInput(f"{path} must be a whole tar archive, got no block of zeros {end}: the file is cut short")
        if _checksum(header) is None:
            place = f"a damaged header at byte {position:,}" if position else "a file of another kind"
            raise BadInput(f"{path} must be a tar archive, got {place}")
        kind = header[156]
        size = _octal(header[124:136])
        start = position + _BLOCK
        if kind == ord("x") and size is not None:
            body = file.read(-(-size // _BLOCK) * _BLOCK)
            # Extended headers mostly hold only the time to a fraction of a second; then the next header is plain.
            if not any(keyword in body for keyword in _KEYWORDS):
                position = start + len(body)
                continue
        # A size of more than 8 GiB is not octal, and `tarfile` reads that header.
        if kind in _PLAIN and size is not None:
            name, after = _name(header), start + -(-size // _BLOCK) * _BLOCK
            # Old archives mark folders by the name only.
            is_file = not name.endswith("/")
        else:
            name, start, size, after, is_file = _other_member(path, file, position)
            file.seek(start)
        if start + size > length:
            raise BadInput(
                f"{path} must be a whole tar archive, got {length - start:,} of the {size:,} bytes of {name}: the file "
                "is cut short"
            )
        if is_file:
            yield Member(name, start, file.read(size))
        # The content is padded with zeros to whole blocks.
        file.seek(after)
        position = after


def _checksum(header: bytes) -> int | None:
    """Return the checksum of a header, or None if the sum of the bytes differs from it."""
    recorded = _octal(header[148:156])
    # The low half of Adler-32 is 1 plus the sum of the bytes modulo 65,521, and is computed much faster than by `sum`.
    total = (zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF) - 1
    return recorded if recorded is not None and recorded % _ADLER == total % _ADLER else None


def _octal(field: bytes) -> int | None:
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # Only archives of the POSIX format have a prefix of the name.
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _other_member(path: Path, file: BinaryIO, position: int) -> tuple[str, int, int, int, bool]:
    """Let `tarfile` read the header at a position: name, start, size and end, and whether the member is a file."""
    file.seek(position)
    try:
        # `TarFile` reads the first header, so the position is set again.
        archive = tarfile.TarFile(fileobj=file)
        file.seek(position)
        info = tarfile.TarInfo.fromtarfile(archive)
    except tarfile.TarError as error:
        raise BadInput(
            f"{path} must be a whole tar archive, got a damaged header at byte {position:,}: {error}"
        ) from None
    return info.name, info.offset_data, info.size if info.isreg() else 0, archive.offset, info.isreg()
