"""The errors that the harness shows to the user; the command line prints them in one line and exits with code 2."""

from __future__ import annotations

__all__ = ["AgreedError", "BadInput", "Diverged", "MissingExtra"]


class BadInput(ValueError):
    """A file, a column or an option of the user cannot be used.

    The message is one line that names the argument, the rule and the received value.

    Examples
    --------
    >>> raise BadInput("batch_size must be at least 2, got 1")
    Traceback (most recent call last):
        ...
    drrho_clip.errors.BadInput: batch_size must be at least 2, got 1
    """


class Diverged(BadInput):
    """The loss of a training did not stay finite."""


class AgreedError(BadInput):
    """An error that all processes that train together raise at the same time, with the same message.

    Parameters
    ----------
    message : str
        The message.
    repeats : bool
        The error only repeats an error in our own code, which another process raises with its traceback.
    """

    def __init__(self, message: str, *, repeats: bool = False) -> None:
        super().__init__(message)
        self.repeats = repeats


class MissingExtra(ImportError):
    """An optional library is not installed.

    Parameters
    ----------
    purpose : str
        The task, as the subject of the message: "reading images".
    library : str
        The name of the library in the message, as users know it: "Pillow", not "PIL".
    extra : str
        The extra of this distribution that installs the library.

    Examples
    --------
    >>> print(MissingExtra("reading images", "Pillow"))
    reading images needs Pillow: pip install 'drrho-core[train]'
    """

    def __init__(self, purpose: str, library: str, extra: str = "train") -> None:
        # The command to type is part of the message, because the name of an extra is hard to guess.
        super().__init__(f"{purpose} needs {library}: pip install 'drrho-core[{extra}]'")
