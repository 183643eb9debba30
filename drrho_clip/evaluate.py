"""Quality of a pair of encoders on held-out pairs: retrieval in galleries and zero-shot classification.

All measures take NumPy arrays of features and compute in float64. Similarity is the inner product, which is the cosine
for the unit-norm features of this library. Ties count against the model, so an encoder that has collapsed (all
features are equal) scores zero instead of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from drrho_clip.data import captions_of, same_text
from drrho_clip.errors import BadInput
from drrho_clip.measure.retrieval import Recall, Retrieval, retrieval
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
    prompts : Prompts, optional
        The user's own names and templates; by default the prompts of the data set.

    Returns
    -------
    dict
        The figures of `Retrieval.metrics` and, if the data have classes, zero_shot_accuracy in [0, 1] with the number
        of classes, num_classes, and of classified images, num_zero_shot_images.

    Raises
    ------
    BadInput
        If `prompts` do not fit the labels of the data, or the data have no labels.
    """
    # A table knows the labels before an image is decoded, so a mistake in the prompts is found at once.
    labels = getattr(dataset, "class_names", None)
    if prompts is not None and labels:
        prompts.names_of(labels)
    # An image with several captions is decoded and encoded once. The numbers of the images are 0, 1, ...
    captions, image_ids = captions_of(dataset), dataset.image_ids
    image_features = encoder.images_of(dataset, np.unique(image_ids, return_index=True)[1])
    # Retrieval compares the pairs of the data set with each other.
    metrics = retrieval(
        image_features[image_ids],
        encoder.texts(captions),
        captions,
        image_ids=image_ids,
        same_text=same_text(encoder.tokenizer),
        gallery_size=gallery_size,
    ).metrics()
    task = None
    if zero_shot and encoder.reads_new_pairs:
        task = dataset.zero_shot(image_size=encoder.image_size, resize_mode=encoder.resize_mode)
    if task is None and prompts is not None:
        raise BadInput("classes and templates need data with at least two different labels, got data without")
    if task is not None:
        # Zero-shot classification compares images with one feature per class.
        names = task.class_names
        of_classes = encoder.texts(task.prompts) if prompts is None else prompts.features(encoder, names)
        metrics["zero_shot_accuracy"] = zero_shot_accuracy(encoder.images(task.images), of_classes, task.labels)
        metrics |= {"num_classes": len(task.prompts), "num_zero_shot_images": len(task.images)}
    return metrics
