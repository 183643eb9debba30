"""Quality of a pair of encoders on held-out pairs: retrieval in galleries and zero-shot classification.

All measures take NumPy arrays of features and compute in float64. Similarity is the inner product, which is the cosine
for the unit-norm features of this library. Ties count against the model, so an encoder that has collapsed (all
features are equal) scores zero instead of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drrho_clip.data import captions_of
from drrho_clip.errors import BadInput
from drrho_core.checks import describe

if TYPE_CHECKING:
    from drrho_clip.data import Dataset
    from drrho_clip.encode import Encoder

__all__ = ["Recall", "Retrieval", "evaluate", "nearest", "retrieval", "zero_shot_accuracy"]


class Recall(NamedTuple):
    """Shares of the queries, in [0, 1], for which a correct answer is among the first 1, 5 and 10 answers."""

    r1: float
    r5: float
    r10: float


class Retrieval(NamedTuple):
    """The result of `retrieval`.

    Attributes
    ----------
    retrieval_r1, retrieval_r5, retrieval_r10 : float
        Means of R@1, R@5 and R@10 (see `retrieval`) over the two directions, in [0, 1].
    image_to_text, text_to_image : Recall
        Each direction alone: images as queries over texts, and texts as queries over images.
    num_galleries : int
        Number of galleries that were searched.
    num_pairs : int
        Number of pairs in all galleries; the remainder that fills no gallery is left out.
    """

    retrieval_r1: float
    retrieval_r5: float
    retrieval_r10: float
    image_to_text: Recall
    text_to_image: Recall
    num_galleries: int
    num_pairs: int

    def metrics(self) -> dict[str, float]:
        """Return the three means by their names in results.json."""
        return {
            "retrieval_r1": self.retrieval_r1,
            "retrieval_r5": self.retrieval_r5,
            "retrieval_r10": self.retrieval_r10,
        }


def evaluate(encoder: Encoder, dataset: Dataset, *, zero_shot: bool = True) -> dict[str, float]:
    """Measure retrieval in galleries of 200 pairs and, if the data have classes, zero-shot accuracy.

    Returns
    -------
    dict
        retrieval_r1, retrieval_r5, retrieval_r10 and, if the data have classes, zero_shot_accuracy, in [0, 1].
    """
    image_features, text_features = encoder.pairs(dataset)
    # Retrieval compares the pairs of the data set with each other.
    metrics = retrieval(image_features, text_features, captions_of(dataset)).metrics()
    task = dataset.zero_shot(image_size=encoder.image_size) if zero_shot else None
    if task is not None:
        # Zero-shot classification compares images with one prompt per class.
        prompts = encoder.texts(task.prompts)
        metrics["zero_shot_accuracy"] = zero_shot_accuracy(encoder.images(task.images), prompts, task.labels)
    return metrics


def retrieval(
    image_features: ArrayLike, text_features: ArrayLike, captions: Sequence[str], *, gallery_size: int = 200
) -> Retrieval:
    """Measure R@1, R@5 and R@10 of retrieval in both directions on held-out pairs.

    R@k is the share of queries for which a correct answer is among the k most similar answers; the notes have the rule
    for ties.

    The pairs are divided into galleries of `gallery_size` consecutive pairs. A remainder smaller than a gallery is left
    out, but if there are fewer than `gallery_size` pairs, all pairs form a single gallery. In a gallery every image is
    a query over all texts and every text is a query over all images.

    Parameters
    ----------
    image_features, text_features : array_like (n, d)
        Features of the n pairs, n >= 2; row i of each array belongs to pair i. The numbers must be finite. If the rows
        have norm 1, the similarity is the cosine; the norm is not checked.
    captions : sequence of n str
        The captions. Identical captions count as correct: image i may retrieve any text that equals caption i, and
        text i any image whose caption equals text i.
    gallery_size : int, default 200
        Pairs in a gallery, at least 2.

    Returns
    -------
    Retrieval
        The means of both directions, each direction alone, and the numbers of galleries and pairs.

    Raises
    ------
    BadInput
        If the features are not two real matrices of one shape with n >= 2 and finite entries, if `captions` are not n
        strings, or if `gallery_size` is not an integer of at least 2.

    Notes
    -----
    Let C_q be the set of correct answers of query q, and s_qa the similarity of query q and answer a. Then
    ``rank_q = 1 + #{a not in C_q : s_qa >= max_{c in C_q} s_qc}`` and R@k is the share of queries with ``rank_q <= k``.
    Source: R@k over image-caption galleries is the protocol of image-text retrieval since Karpathy and Fei-Fei, "Deep
    visual-semantic alignments for generating image descriptions" (2015). The rules for ties and for equal captions do
    not come from this protocol.

    Examples
    --------
    Here the last of three images is nearest to a wrong text, while every text is nearest to its own image:

    >>> images = [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]
    >>> texts = [[1.0, 0.0], [0.28, 0.96], [0.88, 0.47]]
    >>> measured = retrieval(images, texts, ["a ball", "a cube", "a cone"])
    >>> [round(value, 3) for value in (measured.image_to_text.r1, measured.text_to_image.r1, measured.retrieval_r5)]
    [0.667, 1.0, 1.0]

    If the third caption equals the second, the text nearest to the last image is correct:

    >>> retrieval(images, texts, ["a ball", "a cube", "a cube"]).image_to_text.r1
    1.0
    """
    images = _features("image_features", image_features, minimum=2)
    texts = _features("text_features", text_features, minimum=2)
    if images.shape != texts.shape:
        raise BadInput(f"text_features must have the shape of image_features, {images.shape}, got {texts.shape}")
    if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
        raise BadInput(f"captions must be a sequence of str, got {describe(captions)}")
    if len(captions) != len(images):
        raise BadInput(f"captions must have one entry per pair, {len(images)}, got {len(captions)}")
    if isinstance(gallery_size, bool) or not isinstance(gallery_size, int | np.integer) or gallery_size < 2:
        raise BadInput(f"gallery_size must be an integer of at least 2, got {describe(gallery_size)}")

    size = min(int(gallery_size), len(images))
    num_galleries = len(images) // size
    # Equal captions get equal numbers: an answer is correct if the numbers of query and answer are equal.
    number_of = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    numbers = np.array([number_of[caption] for caption in captions])
    image_ranks, text_ranks = [], []
    # Each gallery is searched twice: images are the queries (rows of the matrix), then texts (columns).
    for start in range(0, num_galleries * size, size):
        gallery = slice(start, start + size)
        similarity = _similarity(images[gallery], texts[gallery])
        correct = numbers[gallery, np.newaxis] == numbers[gallery]
        image_ranks.append(_ranks(similarity, correct))
        text_ranks.append(_ranks(similarity.T, correct.T))
    image_to_text = _recall(np.concatenate(image_ranks))
    text_to_image = _recall(np.concatenate(text_ranks))
    r1, r5, r10 = ((a + b) / 2 for a, b in zip(image_to_text, text_to_image, strict=True))
    return Retrieval(r1, r5, r10, image_to_text, text_to_image, num_galleries, num_galleries * size)


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
    images = _features("image_features", image_features, minimum=1)
    prompts = _features("prompt_features", prompt_features, minimum=2)
    if prompts.shape[1] != images.shape[1]:
        raise BadInput(
            f"prompt_features must have as many columns as image_features, {images.shape[1]}, got {prompts.shape[1]}"
        )
    classes = np.asarray(labels)
    if classes.shape != (len(images),) or not np.issubdtype(classes.dtype, np.integer):
        raise BadInput(f"labels must be integers of shape ({len(images)},), got {describe(classes)}")
    if classes.min() < 0 or classes.max() >= len(prompts):
        raise BadInput(f"labels must lie in [0, {len(prompts)}), got {classes.min()} to {classes.max()}")
    correct = classes[:, np.newaxis] == np.arange(len(prompts))
    return float(np.mean(_ranks(_similarity(images, prompts), correct) == 1))


def nearest(query_features: ArrayLike, gallery_features: ArrayLike, *, k: int = 5) -> NDArray[np.intp]:
    """Return the k rows of a gallery that are most similar to every query, the most similar row first.

    Parameters
    ----------
    query_features : array_like (n, d)
        Features of n >= 1 queries; all numbers are finite.
    gallery_features : array_like (m, d)
        Features to search; all numbers are finite.
    k : int, default 5
        Number of rows to return, 1 <= k <= m.

    Returns
    -------
    integer array (n, k)
        Indices of rows of the gallery, by falling similarity; of equally similar rows, the lower index comes first.

    Raises
    ------
    BadInput
        If an argument breaks these rules.

    Examples
    --------
    >>> nearest([[1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]], k=2)
    array([[1, 2]])
    """
    queries = _features("query_features", query_features, minimum=1)
    gallery = _features("gallery_features", gallery_features, minimum=1)
    if gallery.shape[1] != queries.shape[1]:
        raise BadInput(
            f"gallery_features must have as many columns as query_features, {queries.shape[1]}, got {gallery.shape[1]}"
        )
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= len(gallery):
        raise BadInput(f"k must be an integer from 1 to the gallery's size, {len(gallery)}, got {describe(k)}")
    return np.argsort(-_similarity(queries, gallery), axis=1, kind="stable")[:, :k]


def _features(name: str, values: ArrayLike, *, minimum: int) -> NDArray[np.float64]:
    """Check one matrix of features and return it in float64."""
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[0] < minimum or array.shape[1] < 1:
        raise BadInput(f"{name} must have shape (n, d) with n >= {minimum} and d >= 1, got {array.shape}")
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise BadInput(f"{name} must be real numbers, got {array.dtype}")
    array = np.ascontiguousarray(array, dtype=np.float64)
    finite = np.isfinite(array)
    if not finite.all():
        raise BadInput(f"{name} must be finite, got {array[~finite][0]} in row {np.argwhere(~finite)[0, 0]}")
    return array


def _similarity(queries: NDArray[np.float64], answers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return all inner products, [queries, answers]."""
    # In a matrix product of BLAS the rounding of an entry depends on the position of the entry, so equal features might
    # not tie exactly. `einsum` without `optimize` adds the terms of every entry in the same order.
    products: NDArray[np.float64] = np.einsum("qd,ad->qa", queries, answers, optimize=False)
    return products


def _ranks(similarity: NDArray[np.float64], correct: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the rank of each query: 1 + the number of wrong answers at least as similar as the best correct one."""
    # A wrong answer that ties with the best correct answer raises the rank, so ties lower the score.
    best = np.max(similarity, axis=1, where=correct, initial=-np.inf)
    return np.asarray(1 + np.sum(~correct & (similarity >= best[:, np.newaxis]), axis=1))


def _recall(ranks: NDArray[Any]) -> Recall:
    return Recall(*(float(np.mean(ranks <= k)) for k in (1, 5, 10)))
