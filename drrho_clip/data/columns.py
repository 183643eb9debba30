"""The columns of a table that hold images, captions and labels: by their usual names, or as the settings name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from drrho_clip.errors import BadInput

__all__ = ["CAPTION_NAMES", "IMAGE_NAMES", "ColumnNames", "Columns"]

IMAGE_NAMES: Final = ("image", "image_path", "filepath", "file_path", "file_name", "filename", "path")
"""Usual names of the column of image paths; the first name has priority over all others."""

CAPTION_NAMES: Final = ("caption", "captions", "title", "text", "description")
"""Usual names of the column of captions; the first name has priority over all others."""

_LABEL_NAMES: Final = ("label",)
_ADDRESS_NAMES: Final = ("url", "image_url", "img_url")


class Columns(NamedTuple):
    """The columns of one table; `label` is None if the table has no labels."""

    image: str
    caption: str
    label: str | None


class ColumnNames(NamedTuple):
    """The names of columns that the user gives; with None a usual name is looked for."""

    image_column: str | None = None
    caption_column: str | None = None
    label_column: str | None = None

    def in_header(self, header: Sequence[str]) -> bool:
        """Return whether a header has columns for images and captions."""
        pairs = ((self.image_column, IMAGE_NAMES), (self.caption_column, CAPTION_NAMES))
        return all(given in header if given is not None else bool(_usual(header, names)) for given, names in pairs)

    def choose(self, header: Sequence[str]) -> Columns:
        """Return the columns to read.

        Raises
        ------
        BadInput
            A given column is missing or is there twice, or no column or several columns have usual names.

        Examples
        --------
        >>> ColumnNames(label_column="kind").choose(["file_name", "text", "kind"])
        Columns(image='file_name', caption='text', label='kind')
        """
        image = _choose(header, self.image_column, IMAGE_NAMES, "image_column")
        caption = _choose(header, self.caption_column, CAPTION_NAMES, "caption_column")
        label = None
        if self.label_column is not None or len(_usual(header, _LABEL_NAMES)) == 1:
            label = _choose(header, self.label_column, _LABEL_NAMES, "label_column")
        return Columns(image, caption, label)

    def caption_in(self, header: Sequence[str]) -> str:
        """Return the column of captions; the errors are those of `choose`."""
        return _choose(header, self.caption_column, CAPTION_NAMES, "caption_column")


def _usual(header: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the columns with usual names: only those with the first name, if there are any."""
    named = [column for column in header if column.casefold() in names]
    return [column for column in named if column.casefold() == names[0]] or named


def _choose(header: Sequence[str], given: str | None, names: Sequence[str], setting: str) -> str:
    listed = ", ".join(header)
    if given is not None:
        if header.count(given) != 1:
            raise BadInput(f"must have one column named {given!r}, got the columns {listed}")
        return given
    usual = _usual(header, names)
    if len(usual) == 1:
        return usual[0]
    option = "--" + setting.replace("_", "-")
    if len(usual) > 1:
        raise BadInput(
            f"must have one column named {names[0]!r}, or name a column with {option}: got the columns {listed}"
        )
    addresses = [column for column in header if column.casefold() in _ADDRESS_NAMES]
    if names is IMAGE_NAMES and addresses:
        raise BadInput(
            f"must have a column of image files, got the web addresses {addresses[0]!r}: download the images first, "
            f"then name the column of their paths with {option}"
        )
    raise BadInput(
        f"must have one column named {names[0]!r} (or {', '.join(names[1:])}), or name a column with {option}: "
        f"got the columns {listed}"
    )
