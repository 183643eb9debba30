r"""Text that comes from users (paths, captions, labels, names), made safe for one line of a terminal.

A file's name may hold every character except ``/`` and zero. Raw on a terminal, an escape code changes colours or
moves the cursor, a bidirectional override shows the name in another order, and a line break makes a message of one line
look like two messages.
"""

from __future__ import annotations

import unicodedata

__all__ = ["brief", "shown"]

# Control and format characters, surrogates without a partner, and the separators of lines and paragraphs.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

# Persian, Indic scripts and emoji need these two joiners inside words; the joiners neither move nor reorder text.
_JOINERS = frozenset("\u200c\u200d")


def shown(text: object) -> str:
    r"""Return a text on one line in which a backslash and a number replace every character that is not visible.

    Parameters
    ----------
    text : object
        A text, or an object whose ``str`` is shown.

    Returns
    -------
    str
        The text without control characters, bidirectional overrides, line breaks and lone surrogates. Every UTF-8
        stream can write the result. Brackets, quotes and all other visible characters stay.

    Examples
    --------
    >>> print(shown("two\nlines [bold], \x1b[31mred\x1b[0m, \u202eelif"))
    two\nlines [bold], \x1b[31mred\x1b[0m, \u202eelif
    """
    line = str(text)
    if line.isascii() and line.isprintable():
        return line
    # The unicode_escape codec writes a character as Python does in a string literal.
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _HIDDEN and character not in _JOINERS
        else character
        for character in line
    )


def brief(value: object, *, length: int = 80) -> str:
    """Return the representation of a value for a message, shortened to about `length` characters.

    Examples
    --------
    >>> brief("red"), brief(10**30), len(brief("a" * 10_000)) < 120
    ("'red'", '1000000000000000000000000000000', True)
    """
    # Python refuses to write an integer of more than some thousand digits.
    try:
        whole = repr(value)
    except ValueError:
        whole = f"{type(value).__name__} of more than 4,000 digits"
    except RecursionError:
        whole = f"{type(value).__name__} that is nested too deeply"
    return whole if len(whole) <= length else f"{whole[:length]}... ({len(whole):,} characters)"
