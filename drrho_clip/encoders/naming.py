"""The words with which a user names a model: the folder of a run or of a cache, or a kind, a colon and a name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Final

from drrho_clip.errors import BadInput
from drrho_clip.features.manifest import is_cache
from drrho_clip.terminal.safe_text import brief

__all__ = ["KINDS", "cache_folder", "check_model_name", "is_run", "kind_of", "path_in"]

_FEATURES: Final = "features"
KINDS: Final = ("hf", "open_clip", _FEATURES)
"""The words before the colon."""
_RULE: Final = "the folder of a run or of a cache, hf:DIR, open_clip:NAME or features:CACHE"


def kind_of(model: str) -> str | None:
    """Return the kind of a model that is named with a colon, or None for a folder."""
    kind, colon, _ = model.partition(":")
    return kind if colon and kind in KINDS else None


def is_run(model: str) -> bool:
    """Return whether a word names a model by the folder of a run.

    Examples
    --------
    >>> is_run("hf:clip"), is_run("runs/reference")
    (False, True)
    """
    return kind_of(model) is None and cache_folder(model) is None


def cache_folder(model: str) -> Path | None:
    """Return the folder of a cache of features if a word names a cache, else None."""
    if kind_of(model) == _FEATURES:
        return Path(model.partition(":")[2])
    return Path(model) if kind_of(model) is None and is_cache(model) else None


def path_in(model: str) -> tuple[str, str | None]:
    """Return the kind with its colon, and the path behind it; None if the word holds no path.

    Examples
    --------
    >>> path_in("runs/a"), path_in("hf:clip"), path_in("open_clip:ViT-B-32")
    (('', 'runs/a'), ('hf:', 'clip'), ('open_clip:', None))
    """
    kind = kind_of(model)
    if kind is None:
        return "", model
    return f"{kind}:", None if kind == "open_clip" else model.partition(":")[2]


def check_model_name(model: str, name: str) -> None:
    """Raise BadInput unless a word can name a model; `name` is the argument, for the message.

    Examples
    --------
    >>> check_model_name("hg:clip", "reference")  # doctest: +NORMALIZE_WHITESPACE
    Traceback (most recent call last):
        ...
    drrho_clip.errors.BadInput: reference must be the folder of a run or of a cache, hf:DIR, open_clip:NAME or
    features:CACHE, got 'hg:clip'; did you mean hf:?
    """
    kind, colon, rest = model.partition(":")
    hint = ""
    if colon and kind in KINDS:
        path = path_in(model)[1]
        if rest and (path is None or Path(path).is_dir()):
            return
        hint = ", where no folder has this name" if rest else ", which names nothing after the colon"
    elif Path(model).exists():
        return
    elif colon:
        # The words are so short that half of the letters are enough for a resemblance.
        nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]}:?" if nearest else ""
    raise BadInput(f"{name} must be {_RULE}, got {brief(model)}{hint or ', which does not exist'}")
