"""Quality of a pair of encoders on held-out pairs: retrieval in galleries and zero-shot classification.

All measures take NumPy arrays of features and compute in float64. Similarity is the inner product, which is the cosine
for the unit-norm features of this library. Ties count against the model, so an encoder that has collapsed (all
features are equal) scores zero instead of one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from drrho_clip.data import DEFAULT_PROMPT, PairsDataset, captions_of, readable_rows, same_text
from drrho_clip.errors import BadInput
from drrho_clip.measure.retrieval import Recall, Retrieval, retrieval
from drrho_clip.measure.sampled_retrieval import sampled_retrieval
from drrho_clip.measure.similarity import nearest
from drrho_clip.measure.zero_shot import zero_shot_accuracy

if TYPE_CHECKING:
    from drrho_clip.data import Dataset
    from drrho_clip.encoders import PairEncoder
    from drrho_clip.measure.prompts import Prompts

__all__ = ["Recall", "Retrieval", "evaluate", "nearest", "retrieval", "zero_shot_accuracy"]


def evaluate(
    encoder: PairEncoder,
    dataset: Dataset,
    *,
    zero_shot: bool = True,
    gallery_size: int = 200,
    num_queries: int | None = None,
    prompts: Prompts | None = None,
) -> dict[str, float]:
    """Measure retrieval in galleries and, if the data have classes, zero-shot accuracy.

    Parameters
    ----------
    encoder : PairEncoder
        The model. A cache of features has no zero-shot accuracy, because it cannot encode prompts.
    dataset : Dataset
        The held-out pairs.
    zero_shot : bool, default True
        If False, zero-shot accuracy is not measured.
    gallery_size : int, default 200
        Images in a gallery, as in `retrieval`.
    num_queries : int, optional
        If given, all images form a single gallery, and so many images and captions, drawn at random, are the queries,
        as in `sampled_retrieval`.
    prompts : Prompts, optional
        The user's own names and templates; by default the prompts of the data set.

    Returns
    -------
    dict
        The figures of `Retrieval.metrics`, or of `sampled_retrieval` with `num_queries`. If the data have classes, also
        zero_shot_accuracy in [0, 1] with the number of classes, num_classes, and of classified images,
        num_zero_shot_images. If images could not be read, num_unreadable is their number; their pairs count in no
        figure.

    Raises
    ------
    BadInput
        If `prompts` do not fit the labels of the data, or the data have no labels, or if fewer than two images can be
        read.
    """
    # A table knows the labels before an image is decoded, so a mistake in the prompts is found at once.
    labels = getattr(dataset, "class_names", None)
    if prompts is not None and labels:
        prompts.names_of(labels)
    # An image with several captions is decoded and encoded once. The numbers of the images are 0, 1, ...
    captions, image_ids = captions_of(dataset), dataset.image_ids
    image_features = encoder.images_of(dataset, np.unique(image_ids, return_index=True)[1])
    rows = readable_rows(dataset)
    if len(np.unique(image_ids[rows])) < 2:
        raise BadInput(f"data must have at least 2 images that can be read, got {len(np.unique(image_ids[rows]))}")
    text_features = encoder.texts(captions)
    # Retrieval compares the pairs of the data set with each other.
    features = image_features[image_ids[rows]], text_features[rows]
    captions = captions if len(rows) == len(captions) else [captions[row] for row in rows.tolist()]
    rule: _Rule = {"image_ids": image_ids[rows], "same_text": same_text(encoder.tokenizer)}
    metrics = (
        retrieval(*features, captions, gallery_size=gallery_size, **rule).metrics()
        if num_queries is None
        else sampled_retrieval(*features, captions, num_queries=num_queries, **rule)
    )
    if len(rows) < len(image_ids):
        metrics["num_unreadable"] = len(np.unique(image_ids)) - len(np.unique(image_ids[rows]))
    images = _classified(encoder, dataset, image_features, rows) if zero_shot and encoder.reads_new_pairs else None
    if images is None and prompts is not None:
        raise BadInput("classes and templates need data with at least two different labels, got data without")
    if images is not None:
        # Zero-shot classification compares images with one feature per class.
        of_classes = encoder.texts(images.prompts) if prompts is None else prompts.features(encoder, images.class_names)
        metrics["zero_shot_accuracy"] = zero_shot_accuracy(images.features, of_classes, images.labels)
        metrics |= {"num_classes": len(images.class_names), "num_zero_shot_images": len(images.labels)}
    return metrics


class _Rule(TypedDict):
    """Which answers of retrieval are correct."""

    image_ids: npt.NDArray[np.int64]
    same_text: Callable[[str], Hashable]


class _Classified(NamedTuple):
    """Features (m, d) and classes (m,) of the images of a zero-shot task, with the default prompts."""

    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    features: npt.NDArray[np.floating]
    labels: npt.NDArray[np.int64]


def _classified(
    encoder: PairEncoder, dataset: Dataset, image_features: npt.NDArray[np.floating], rows: npt.NDArray[np.int64]
) -> _Classified | None:
    """Return the images to classify, or None if the data have no classes."""
    if not isinstance(dataset, PairsDataset):
        task = dataset.zero_shot(image_size=encoder.image_size, resize_mode=encoder.resize_mode)
        return task and _Classified(task.class_names, task.prompts, encoder.images(task.images), task.labels)
    labelled = dataset.labelled_images()
    if labelled is None:
        return None
    # The images are those of retrieval, so no image is decoded or encoded a second time.
    readable = np.isin(labelled.rows, rows)
    if not readable.any():
        return None
    features = image_features[dataset.image_ids[labelled.rows[readable]]]
    prompts = tuple(DEFAULT_PROMPT.replace("{}", name) for name in labelled.class_names)
    return _Classified(labelled.class_names, prompts, features, labelled.labels[readable])
