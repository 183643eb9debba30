"""The one place that opens a model by the word with which the user names it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from drrho_clip.encoders.cached import CachedEncoder
from drrho_clip.encoders.naming import cache_folder, check_model_name, is_run, kind_of
from drrho_clip.encoders.protocol import PairEncoder
from drrho_clip.errors import BadInput
from drrho_clip.features.reading import ReferenceFeatures
from drrho_core.backend import Backend, backend_names, get_backend

if TYPE_CHECKING:
    from drrho_clip.run import Run

__all__ = ["feature_dim_in_memory", "open_foreign", "open_model"]


def open_model(
    model: str, *, backend: Backend, name: str = "model", state: str = "best", run: Run | None = None
) -> PairEncoder:
    """Open a model.

    Parameters
    ----------
    model : str
        The folder of a run, the folder of a cache of features, or one of ``hf:DIR`` (the directory of a CLIP or SigLIP
        model of `transformers`), ``open_clip:NAME`` and ``features:CACHE``.
    backend : Backend
        The library that runs the model of a run. A model of another program runs on this backend if the backend can
        open it, and otherwise on an installed backend that can.
    name : str
        The argument, for messages.
    state : {"best", "last", "reference"}
        The state of a run.
    run : Run, optional
        The opened run, if `model` is the folder of a run.

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
    check_model_name(model, name)
    # The module of runs imports this package.
    from drrho_clip.encode import Encoder
    from drrho_clip.run import open_run

    # A cache is recognised by its manifest, with or without the word "features:".
    folder = cache_folder(model)
    if folder is not None:
        return CachedEncoder(ReferenceFeatures(folder))
    kind = kind_of(model)
    if kind is None:
        return Encoder.load(open_run(model) if run is None else run, backend, state=state)
    place = model.partition(":")[2]
    # Reference features are NumPy arrays, so the run may use another backend than its reference model.
    if kind == "hf":
        for candidate in _backends(backend):
            if "hf" in candidate.architectures:
                return Encoder.load_hf(place, candidate)
    opened = open_foreign(kind, place, backend)
    if opened is not None:
        return opened
    raise BadInput(f"{name} must be a model that an installed backend can open, got {model!r}, which none can")


def open_foreign(kind: str, place: str, backend: Backend) -> PairEncoder | None:
    """Open a model of another program with the first backend that offers models of this kind; None if none does.

    Parameters
    ----------
    kind : str
        A key of the attribute `foreign_models` of a backend, such as "open_clip".
    place : str
        The name of the model within the kind.
    backend : Backend
        The backend that is asked first; the other installed backends follow.
    """
    for candidate in _backends(backend):
        opener = _openers(candidate).get(kind)
        if opener is not None:
            return opener(place)
    return None


def feature_dim_in_memory(model: str) -> int | None:
    """Return how many numbers per image and caption of a reference model a run keeps in memory; no model is built.

    None: the features stay in a cache on the disk, or only the library of the model knows the size.
    """
    from drrho_clip.exchange.hf_directory import open_hf_directory
    from drrho_clip.run import open_run

    if is_run(model):
        return open_run(model).spec.feature_dim
    return open_hf_directory(model.partition(":")[2]).spec.feature_dim if kind_of(model) == "hf" else None


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
