"""The two errors that the harness shows to its user; the command line prints them in one line and exits with 2."""

from __future__ import annotations

__all__ = ["BadInput", "MissingExtra"]


class BadInput(ValueError):
    """Something that the user gave (a file, a column, an option) cannot be used.

    The message is one line that names what was given, the rule and what was found.

    Examples
    --------
    >>> raise BadInput("batch_size must be at least 2, got 1")
    Traceback (most recent call last):
        ...
    drrho_clip.errors.BadInput: batch_size must be at least 2, got 1
    """


class MissingExtra(ImportError):
    """An optional library is not installed.

    Parameters
    ----------
    purpose : str
        What was to be done, as the subject of the sentence: "reading images".
    library : str
        The library's name as its users know it.
    extra : str
        The extra of this distribution that installs it.

    Examples
    --------
    >>> print(MissingExtra("reading images", "Pillow"))
    reading images needs Pillow: pip install 'drrho-core[train]'
    """

    def __init__(self, purpose: str, library: str, extra: str = "train") -> None:
        super().__init__(f"{purpose} needs {library}: pip install 'drrho-core[{extra}]'")
