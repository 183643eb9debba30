"""The linear probe of a model on the labelled images of a data set: which images train it, and which test it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drrho_clip.data import PairsDataset
from drrho_clip.data.content import digests_of_pixels
from drrho_clip.errors import BadInput
from drrho_clip.measure.linear_probe import check_classes, check_installed, linear_probe

if TYPE_CHECKING:
    from drrho_clip.data import Dataset
    from drrho_clip.encoders import PairEncoder

__all__ = ["check_probe", "probe_figures"]

_NO_LABELS = "probe needs data with at least two different labels, got data without"
# One image in five of each class tests the probe; the other images train it.
_FIFTH = 5


def probe_figures(encoder: PairEncoder, dataset: Dataset, training: Dataset | None = None) -> dict[str, float]:
    """Train a linear classifier on image features, and measure it on other images.

    Parameters
    ----------
    encoder : PairEncoder
        The model.
    dataset : Dataset
        The measured pairs, with labels.
    training : Dataset, optional
        Pairs whose images train the classifier; all images of `dataset` then test it. By default the images of
        `dataset` are divided: its own test part tests, or, if it has no parts, a fifth of the images of each class,
        chosen by the content of the images.

    Returns
    -------
    dict
        linear_probe_accuracy in [0, 1], num_probe_training and num_probe_test (images), num_probe_classes, and
        linear_probe_strength, the chosen inverse strength C of the regularisation.

    Raises
    ------
    BadInput
        If there are no labels, or too few images of a class.
    MissingExtra
        If scikit-learn is not installed.
    """
    if training is None:
        task = _task(encoder, dataset)
        features, readable = task.features(encoder, dataset)
        labels, is_test = task.labels[readable], task.is_test[readable]
        parts = (features[~is_test], labels[~is_test], features[is_test], labels[is_test])
    else:
        parts = (*_labelled(encoder, training), *_labelled(encoder, dataset))
    _check_test(parts[3])
    measured = linear_probe(*parts)
    return {
        "linear_probe_accuracy": measured.accuracy,
        "linear_probe_strength": measured.strength,
        "num_probe_training": len(parts[1]),
        "num_probe_test": len(parts[3]),
        "num_probe_classes": len(np.unique(parts[1])),
    }


def check_probe(encoder: PairEncoder, dataset: Dataset, training: Dataset | None = None) -> None:
    """Raise BadInput or MissingExtra if `probe_figures` with the same arguments would; no image of a table is read.

    A measurement that takes long is thus refused before its start. Only unreadable images may still be too many.
    """
    check_installed()
    task = _task(encoder, dataset)
    labels = task.labels[~task.is_test] if training is None else _task(encoder, training).labels
    check_classes(labels)
    _check_test(task.labels[task.is_test] if training is None else task.labels)


def _check_test(labels: NDArray[np.int64]) -> None:
    if not len(labels):
        raise BadInput("probe needs at least one labelled image for the test, got none")


class _Task(NamedTuple):
    """Labels (m,) of m images, which images are for the test, and the images: rows of a table, or pixels."""

    labels: NDArray[np.int64]
    is_test: NDArray[np.bool_]
    rows: NDArray[np.int64]
    images: NDArray[np.uint8] | None

    def features(self, encoder: PairEncoder, dataset: Dataset) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
        """Return the features of the readable images, and which images are readable."""
        if self.images is not None:
            return encoder.images(self.images), np.ones(len(self.labels), dtype=np.bool_)
        features = encoder.images_of(dataset, self.rows)
        # An unreadable image has the feature of a black image, which says nothing about the class.
        readable = ~np.isin(self.rows, list(getattr(dataset, "unreadable", {})))
        return features[readable], readable


def _labelled(encoder: PairEncoder, dataset: Dataset) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Return features and labels of all readable images."""
    task = _task(encoder, dataset)
    features, readable = task.features(encoder, dataset)
    return features, task.labels[readable]


def _task(encoder: PairEncoder, dataset: Dataset) -> _Task:
    """Return the labelled images of a data set; raise BadInput if there are none."""
    if isinstance(dataset, PairsDataset):
        labelled = dataset.labelled_images()
        if labelled is None:
            raise BadInput(_NO_LABELS)
        is_test = labelled.is_test
        if is_test is None or is_test.all() or not is_test.any():
            is_test = _fifth(labelled.labels, [digest.tobytes() for digest in dataset.image_digests()[labelled.rows]])
        return _Task(labelled.labels, is_test, labelled.rows, None)
    task = None
    if encoder.reads_new_pairs:
        task = dataset.zero_shot(image_size=encoder.image_size, resize_mode=encoder.resize_mode)
    if task is None:
        raise BadInput(_NO_LABELS)
    # The order of raw pixels would put the darkest images first, and the test would have no others.
    is_test = _fifth(task.labels, [digest.tobytes() for digest in digests_of_pixels(task.images)])
    return _Task(task.labels, is_test, np.arange(len(task.labels)), task.images)


def _fifth(labels: NDArray[np.int64], contents: list[bytes]) -> NDArray[np.bool_]:
    """Return True for a fifth of the images of each class: those whose content comes first."""
    order = sorted(range(len(labels)), key=lambda place: (labels[place], contents[place]))
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for group in np.split(np.array(order, dtype=np.int64), np.cumsum(np.unique(labels, return_counts=True)[1])[:-1]):
        chosen[group[: len(group) // _FIFTH]] = True
    return chosen
