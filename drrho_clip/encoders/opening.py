"""The one place that opens a model by the word with which the user names it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drrho_clip.encoders.cached import CachedEncoder
from drrho_clip.encoders.protocol import PairEncoder
from drrho_clip.errors import BadInput
from drrho_clip.features.manifest import is_cache
from drrho_clip.features.reading import ReferenceFeatures
from drrho_core.backend import Backend, backend_names, get_backend

if TYPE_CHECKING:
    from drrho_clip.run import Run

__all__ = ["KINDS", "cache_folder", "check_model", "is_run", "open_model", "path_in"]

FEATURES: Final = "features"
KINDS: Final = ("hf", "open_clip", FEATURES)
"""The words before the colon of a model that is no folder of a run."""
_RULE: Final = "the folder of a run or of a cache of features, or hf:DIR, open_clip:NAME or features:CACHE"


def is_run(model: str) -> bool:
    """Return whether a model is named by the folder of a run.

    Examples
    --------
    >>> is_run("hf:clip"), is_run("runs/reference")
    (False, True)
    """
    return _kind_of(model) is None and cache_folder(model) is None


def cache_folder(model: str) -> Path | None:
    """Return the folder of a cache if a model is one, else None."""
    if _kind_of(model) == FEATURES:
        return Path(model.partition(":")[2])
    return Path(model) if _kind_of(model) is None and is_cache(model) else None


def path_in(model: str) -> tuple[str, str | None]:
    """Return the word before the path with the colon, and the path; None if the model is no path.

    Examples
    --------
    >>> path_in("runs/a"), path_in("hf:clip"), path_in("open_clip:ViT-B-32")
    (('', 'runs/a'), ('hf:', 'clip'), ('', None))
    """
    kind = _kind_of(model)
    if kind is None:
        return "", model
    return ("", None) if kind == "open_clip" else (f"{kind}:", model.partition(":")[2])


def check_model(model: str, name: str) -> None:
    """Raise BadInput unless a word can name a model; `name` is the argument, for the message.

    Examples
    --------
    >>> check_model("hg:clip", "reference")  # doctest: +NORMALIZE_WHITESPACE
    Traceback (most recent call last):
        ...
    drrho_clip.errors.BadInput: reference must be the folder of a run or of a cache of features, or hf:DIR,
    open_clip:NAME or features:CACHE, got 'hg:clip'; did you mean hf:?
    """
    kind, colon, rest = model.partition(":")
    if colon and kind in KINDS:
        if not rest:
            raise BadInput(f"{name} must be {_RULE}, got {model!r}, which names nothing after the colon")
        return
    if not Path(model).is_dir():
        # The words are so short that half of the letters are enough for a resemblance.
        nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.4) if colon else []
        hint = f"; did you mean {nearest[0]}:?" if nearest else ", which is no folder"
        raise BadInput(f"{name} must be {_RULE}, got {model!r}{hint}")


def open_model(
    model: str,
    *,
    backend: Backend,
    name: str = "model",
    state: str = "best",
    run: Run | None = None,
    verify: bool = True,
) -> PairEncoder:
    """Open a model.

    Parameters
    ----------
    model : str
        The folder of a run, the folder of a cache of features, or one of ``hf:DIR`` (a directory of a CLIP or SigLIP
        model of `transformers`), ``open_clip:NAME`` and ``features:CACHE``.
    backend : Backend
        The library that runs the model of a run. A model of another program runs on this backend if the backend can
        open it, and otherwise on an installed backend that can.
    name : str
        The argument, for messages.
    state : {"best", "last", "reference"}
        The state of a run.
    run : Run, optional
        The opened run, if `model` is a run's folder.
    verify : bool
        Compare the checksums of a cache.

    Returns
    -------
    PairEncoder

    Raises
    ------
    BadInput
        If the model cannot be opened.
    MissingExtra
        If a library is not installed.
    """
    check_model(model, name)
    folder = cache_folder(model)
    if folder is not None:
        return CachedEncoder(ReferenceFeatures(folder, verify=verify))
    kind = _kind_of(model)
    if kind is None:
        from drrho_clip.encode import Encoder
        from drrho_clip.run import open_run

        return Encoder.load(open_run(model) if run is None else run, backend, state=state)
    for candidate in _backends(backend):
        opener = _openers(candidate).get(kind)
        if opener is not None:
            return opener(model.partition(":")[2])
    raise BadInput(f"{name} must be a model that an installed backend can open, got {model!r}, which none can")


def _kind_of(model: str) -> str | None:
    kind, colon, _ = model.partition(":")
    return kind if colon and kind in KINDS else None


def _openers(backend: Backend) -> dict[str, Callable[[str], PairEncoder]]:
    # The attribute is optional: a backend of a third party need not have it.
    return dict(getattr(backend, "foreign_models", {}))


def _backends(first: Backend) -> Iterator[Backend]:
    """Yield the given backend, and then the other installed backends."""
    yield first
    for name in backend_names():
        if name != first.name:
            # The library of a backend may be missing.
            with contextlib.suppress(ImportError, ValueError):
                yield get_backend(name)
