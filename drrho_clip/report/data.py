"""The content of a report: plain data, which the demo makes and the page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# `eq=False` for the classes below: comparing arrays gives an array, which is neither true nor false.


@dataclass(frozen=True, eq=False)
class RetrievedImage:
    """One image that a model retrieved.

    Attributes
    ----------
    image : uint8 array (height, width, channels) or (height, width)
        A small picture; the page enlarges it without smoothing.
    caption : str
        The caption of this image in the data set.
    correct : bool
        True if a caption of this image equals the query.
    """

    image: NDArray[np.uint8]
    caption: str
    correct: bool


@dataclass(frozen=True, eq=False)
class GalleryRow:
    """One caption as a query, and the images that every model retrieved for this query.

    Attributes
    ----------
    query : str
        The held-out caption.
    retrieved : mapping of method to sequence of RetrievedImage
        The top few images (five in the demo), best first.
    image : uint8 array, optional
        The image that belongs to the query; the page shows this image beside the query.
    """

    query: str
    retrieved: Mapping[str, Sequence[RetrievedImage]]
    image: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class ReportData:
    """Everything that `write_report` shows; empty parts are left out of the page.

    Attributes
    ----------
    title : str
        The page's title.
    results : sequence of mappings
        The rows of results.json: ``{method, dataset, seed, metrics: {retrieval_r1, retrieval_r5, retrieval_r10,
        zero_shot_accuracy}, samples_seen, seconds}``, one per method and seed, all of one data set. Metrics lie in
        [0, 1]. Several seeds of a method are averaged and drawn as dots.
    introduction : str
        One short paragraph about models and data, shown below the headline.
    curves : mapping of method to sequence of mappings
        Points ``{"samples_seen", "loss", "surrogate", "validation_r1"}`` of one seed, in the order of training; the
        surrogate is the scalar whose gradient the training follows. If a value is missing, None or nan, the curve of
        this value skips the point, so points with losses and points with validations may alternate.
    gallery : sequence of GalleryRow
        Retrieval examples.
    weights : mapping of method to (mapping of group to array)
        Weights (non-negative, any shape) that the loss gives to groups of captions:
        ``{"drrho": {"clean": ..., "swapped": ...}}``. A method has two groups; the first is drawn as the
        background, the second in the method's colour.
    weights_note : str
        Sentences that define these weights and say with which model they were measured.
    learning_rates : mapping of method to (mapping of learning rate to validation R@1)
        The trials by which the learning rates were chosen.
    chosen_learning_rates : mapping of method to learning rate
        The learning rates that were used; by default, for each method, the rate with the best R@1 in `learning_rates`.
    gallery_size : int, default 200
        Held-out pairs in a gallery of `drrho_clip.measure.retrieval.retrieval`, for the text of the page.
    facts : sequence of (name, text)
        Conditions that make the comparison fair and the page reproducible, such as initialisation, order, samples seen,
        temperature, optimiser, data of the reference model, versions, seed, machine.
    command : str
        The command line that reproduces the page.

    Examples
    --------
    >>> row = {"method": "clip", "dataset": "digits", "seed": 0, "samples_seen": 1000, "seconds": 2.5,
    ...        "metrics": {"retrieval_r1": 0.25, "retrieval_r5": 0.5, "retrieval_r10": 0.75, "zero_shot_accuracy": 0.5}}
    >>> ReportData(title="A first run", results=[row]).gallery
    ()
    """

    title: str
    results: Sequence[Mapping[str, Any]]
    introduction: str = ""
    curves: Mapping[str, Sequence[Mapping[str, float | None]]] = field(default_factory=dict)
    gallery: Sequence[GalleryRow] = ()
    weights: Mapping[str, Mapping[str, NDArray[np.floating[Any]]]] = field(default_factory=dict)
    weights_note: str = ""
    learning_rates: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    chosen_learning_rates: Mapping[str, float] = field(default_factory=dict)
    gallery_size: int = 200
    facts: Sequence[tuple[str, str]] = ()
    command: str = ""
