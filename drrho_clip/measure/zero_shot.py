"""Zero-shot classification: images are compared with one prompt per class."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from drrho_clip.errors import BadInput
from drrho_clip.measure.similarity import checked_features, plain_array, similarities
from drrho_core.checks import describe

__all__ = ["zero_shot_accuracy"]


def zero_shot_accuracy(image_features: ArrayLike, prompt_features: ArrayLike, labels: ArrayLike) -> float:
    """Measure for which share of the images the prompt of the right class is nearer than every other prompt.

    Parameters
    ----------
    image_features : array_like (n, d)
        Features of n >= 1 images; all numbers are finite.
    prompt_features : array_like (num_classes, d)
        One feature per class, num_classes >= 2, for example the feature of the text "a photo of a cat", or the mean
        feature of several such texts; all numbers are finite.
    labels : array_like (n,) of integers
        The classes, in [0, num_classes).

    Returns
    -------
    float
        Top-1 accuracy in [0, 1]. A tie with another prompt counts as wrong.

    Raises
    ------
    BadInput
        If an argument breaks these rules.

    Notes
    -----
    ``mean_i [ s_{i, y_i} > max_{c != y_i} s_{i, c} ]``. Source: zero-shot classification by prompts, Radford et al.,
    "Learning transferable visual models from natural language supervision" (2021).

    Examples
    --------
    >>> zero_shot_accuracy([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], [0, 0, 1])
    0.6666666666666666
    """
    images = checked_features("image_features", image_features, minimum=1)
    prompts = checked_features("prompt_features", prompt_features, minimum=2)
    if prompts.shape[1] != images.shape[1]:
        raise BadInput(
            f"prompt_features must have as many columns as image_features, {images.shape[1]}, got {prompts.shape[1]}"
        )
    classes = plain_array("labels", labels)
    if classes.shape != (len(images),) or not np.issubdtype(classes.dtype, np.integer):
        raise BadInput(f"labels must be integers of shape ({len(images)},), got {describe(classes)}")
    if classes.min() < 0 or classes.max() >= len(prompts):
        raise BadInput(f"labels must lie in [0, {len(prompts)}), got {classes.min()} to {classes.max()}")
    scores = similarities(images, prompts)
    rows = np.arange(len(images))
    own = scores[rows, classes]
    # The own class leaves the comparison, so that only a tie with another prompt counts as wrong.
    scores[rows, classes] = -np.inf
    return float(np.mean(own > np.max(scores, axis=1)))
