"""Text tables whose fields are separated by commas, tabs or semicolons, with quotation marks or without.

Two conventions for quotation marks are common. In a *quoted* table a field may stand in quotation marks; such a field
may hold separators and line ends. In a *plain* table a quotation mark is a character as all others, and every line is a
row; most files of web captions are plain. The suffix of a file does not tell the convention, so both are tried.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

from drrho_clip.errors import BadInput

__all__ = ["LINE_END", "Reading", "parse_delimited", "trim"]

_DELIMITERS: Final = (",", "\t", ";")

_EXCEL_LINE: Final = re.compile(r"\A\"?sep=[,;\t]\"?(?=[\r\n])")

LINE_END: Final = re.compile(r"\r\n|\n|\r")
"""The ends of lines. `str.splitlines` would also split at characters that a caption may hold, such as U+2028."""


class Reading(NamedTuple):
    """The rows of a table under one of the two conventions.

    `records` holds the number and the fields of each row after the header that is not blank; numbers count from 1 and
    include the header and blank rows.
    `joined` holds the numbers of the lines that continue a row of an earlier line. `broken` is the number of the first
    row that does not follow the convention, or None.
    """

    header: list[str]
    records: list[tuple[int, list[str]]]
    joined: frozenset[int]
    broken: int | None

    @property
    def fits(self) -> bool:
        """True if all rows follow the convention and have as many fields as the header."""
        return self.broken is None and all(len(fields) == len(self.header) for _, fields in self.records)


def trim(text: str) -> str:
    r"""Return a text without white space and byte-order marks at both ends.

    Examples
    --------
    >>> trim("\ufeff a dog ")
    'a dog'
    """
    # Files that were joined have a byte-order mark at the beginning of a line; Python does not count it as white space.
    return text.strip().strip("\ufeff").strip()


def parse_delimited(
    text: str, recognises: Callable[[Sequence[str]], bool], names_image: Callable[[Sequence[str], Sequence[str]], bool]
) -> Reading:
    """Split a text into rows and fields; the header and the quotation marks decide how.

    Parameters
    ----------
    text : str
        The table; it holds a character that is not white space.
    recognises : callable
        Takes a header and returns whether all required columns are in the header.
    names_image : callable
        Takes a header and the fields of a row, and returns whether the row names an image.

    Returns
    -------
    Reading
        If exactly one convention gives every row as many fields as the header has, the reading by that convention. If
        both conventions do so, the quoted reading, unless each of the lines that it joins to an earlier line names an
        image: these lines are rows, and their quotation marks are ordinary characters. If neither convention does so,
        the quoted reading, whose rows then have other numbers of fields than the header.

    Raises
    ------
    BadInput
        The quotation marks break the quoted convention and the other convention does not fit either; or both
        conventions fit with different rows and the images do not decide.
    """
    # Excel can put the separator on a line of its own. A blank line in its place keeps the numbers of the rows.
    text = _EXCEL_LINE.sub("", text, count=1)
    # The right separator splits the header into columns among which the required columns are. If no separator does so,
    # the separator that gives most columns is the best guess, and the error message that follows lists these columns.
    headers = {mark: _first(_rows_quoted(text, mark)) for mark in _DELIMITERS}
    delimiter = max(headers, key=lambda mark: (recognises(headers[mark]), len(headers[mark])))
    plain = _read(_rows_plain(text, delimiter))
    if '"' not in text:
        return plain
    quoted = _read(_rows_quoted(text, delimiter))
    # Quotation marks around names of columns show that the table is quoted.
    plain_fits = plain.fits and quoted.header in ([], plain.header)
    if plain_fits and not quoted.fits:
        return plain
    if quoted.broken is not None:
        raise BadInput(
            f"row {quoted.broken}: a field that begins with a quotation mark must end with one and have at most "
            f"{csv.field_size_limit():,} characters, and quotation marks inside it must be doubled; or all lines must "
            f"have {len(plain.header)} fields, and quotation marks are then read as ordinary characters"
        )
    if not plain_fits or not quoted.joined:
        return quoted
    fields_of = dict(plain.records)
    answers = {names_image(plain.header, fields_of[line]) for line in quoted.joined if line in fields_of}
    if answers == {True, False}:
        raise BadInput(
            f"line {min(quoted.joined)}: a quotation mark before this line can begin a field of several lines or be a "
            "part of the text: put all fields in quotation marks, or remove the marks at the beginning of fields"
        )
    return plain if True in answers else quoted


# The number of a row's last line, and the fields of the row; None if the row breaks the convention.
_Line: TypeAlias = tuple[int, list[str] | None]


def _rows_quoted(text: str, delimiter: str) -> Iterator[_Line]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        try:
            fields = next(reader, None)
        except csv.Error:
            yield reader.line_num, None
            return
        if fields is None:
            return
        yield reader.line_num, fields


def _rows_plain(text: str, delimiter: str) -> Iterator[_Line]:
    for number, line in enumerate(LINE_END.split(text), start=1):
        yield number, line.split(delimiter)


def _first(rows: Iterator[_Line]) -> list[str]:
    """Return the header, the first row that is not blank; an empty list if that row breaks the convention."""
    for _, fields in rows:
        if fields is None:
            return []
        if trim("".join(fields)):
            return [trim(field) for field in fields]
    return []


def _read(rows: Iterator[_Line]) -> Reading:
    records: list[tuple[int, list[str]]] = []
    joined: set[int] = set()
    line = 0
    # Blank lines count as rows, as in a spreadsheet, but are skipped.
    for number, (last_line, fields) in enumerate(rows, start=1):
        if fields is None:
            return Reading(_trimmed_header(records), records[1:], frozenset(joined), number)
        if last_line > line + 1:
            joined.update(range(line + 2, last_line + 1))
        line = last_line
        if trim("".join(fields)):
            records.append((number, fields))
    return Reading(_trimmed_header(records), records[1:], frozenset(joined), None)


def _trimmed_header(records: Sequence[tuple[int, list[str]]]) -> list[str]:
    return [trim(field) for field in records[0][1]] if records else []
