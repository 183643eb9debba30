"""Open data of any kind: the content of a path decides which reader reads it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from drrho_clip.data.columns import ColumnNames
from drrho_clip.data.index import is_index, read_index
from drrho_clip.data.pair_source import MAX_UNREADABLE, PairSource, require_readable
from drrho_clip.data.pair_table import read_table
from drrho_clip.data.pairs import PairsDataset
from drrho_clip.data.sources.hub import is_hub_data, read_hub_data
from drrho_clip.data.sources.idx import is_idx_folder, read_idx
from drrho_clip.data.sources.shards import expand_braces, read_shards, shards_in
from drrho_clip.errors import BadInput
from drrho_clip.terminal.safe_text import shown

__all__ = ["KINDS", "exists", "open_data", "read_source", "read_together"]

KINDS: Final = (
    "a table of images and captions (CSV, TSV, JSON Lines or Parquet), a folder of images with text files beside them, "
    "tar shards such as 'shards-{000..099}.tar', a saved data set of the library datasets, a folder of IDX files, or "
    "an index"
)
"""The kinds of data, in words, for help texts."""


def open_data(
    path: str | os.PathLike[str],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    max_unreadable: float = MAX_UNREADABLE,
) -> PairsDataset:
    """Open all pairs of data of any kind.

    Parameters
    ----------
    path : path
        A table or a folder of images with captions, as `read_pairs` takes them; tar shards in the format of webdataset:
        one file, a folder of such files, or a range such as ``shards-{000..099}.tar``; a data set that the library
        `datasets` saved on disk; a folder with the IDX files of Fashion-MNIST; or an index (`drrho index`).
    image_column, caption_column, label_column : str, optional
        Columns of a table or of a saved data set, as in `read_pairs`. In shards the last two name fields of the .json
        files.
    max_unreadable : float
        The largest share of the images, in [0, 1], that may be unreadable; these images are left out.

    Returns
    -------
    PairsDataset
        One pair per image and caption, in the order of the source.

    Raises
    ------
    BadInput
        The data cannot be read, or too many images are unreadable.
    MissingExtra
        A library that the kind of data needs is not installed.
    """
    source = read_source(path, ColumnNames(image_column, caption_column, label_column))
    require_readable(source, max_unreadable)
    return PairsDataset(source, max_unreadable=max_unreadable)


def read_source(path: str | os.PathLike[str], names: ColumnNames) -> PairSource:
    """Read the columns of data of any kind; the errors are those of `open_data`, and unreadable images are listed."""
    text = os.fspath(path)
    place = Path(text)
    # An index is a folder as well, so it is looked for first.
    if is_index(place):
        return read_index(place)
    if is_hub_data(place):
        return read_hub_data(place, names)
    if is_idx_folder(place):
        return read_idx(place)
    shards = shards_in(text)
    if shards:
        return read_shards(shards, names, path=text)
    return read_table(place, names)


def read_together(paths: Sequence[str], names: ColumnNames) -> PairSource:
    """Read several tar shards, or folders and ranges of such shards, as one source.

    Raises
    ------
    BadInput
        A path is other data, or for the reasons of `open_data`.
    """
    # The shell expands a range that is not quoted, so the command gets a path per shard.
    shards: list[Path] = []
    for path in paths:
        listed = shards_in(path)
        if not listed:
            problem = "other data" if Path(path).exists() else "no such file"
            raise BadInput(shown(f"data must be tar shards if several paths are given, got {problem}: {path}"))
        shards += listed
    return read_shards(shards, names, path=f"{shards[0]} to {shards[-1].name}")


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether data are there: a file, a folder, or the first file of a range of shards."""
    return Path(path).exists() or expand_braces(os.fspath(path))[0].exists()
