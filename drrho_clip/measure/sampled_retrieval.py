"""Retrieval in one gallery of all pairs by a sample of the queries, for data with hundreds of thousands of pairs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drrho_clip.errors import BadInput
from drrho_clip.measure.large_gallery import ranks_in_gallery
from drrho_clip.measure.retrieval import grouped, recall
from drrho_core.checks import describe

__all__ = ["sampled_retrieval"]

# Distinguishes the sample of the queries from other random numbers of the same seed.
_STREAM: Final = 0x51554552


def sampled_retrieval(
    image_features: ArrayLike,
    text_features: ArrayLike,
    captions: Sequence[str],
    *,
    num_queries: int,
    image_ids: ArrayLike | None = None,
    same_text: Callable[[str], Hashable] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Measure R@1, R@5 and R@10 among all pairs, with a random sample of the images and of the captions as queries.

    Correct answers, equal captions and ties count as in `drrho_clip.measure.retrieval.retrieval`. With all images and
    all captions as queries the figures are those of `retrieval` in a single gallery.

    Parameters
    ----------
    image_features, text_features, captions, image_ids, same_text
        The n pairs, as in `retrieval`.
    num_queries : int
        Number of images and number of captions that are queries, at least 1; all of them if there are fewer.
    seed : int, default 0
        At least 0; equal seeds give equal samples.

    Returns
    -------
    dict
        retrieval_r1, retrieval_r5 and retrieval_r10, the means over both directions, in [0, 1]; and num_pairs,
        num_queries (of both directions together) and gallery_size (number of images).

    Raises
    ------
    BadInput
        If an argument breaks these rules or those of `retrieval`.

    Examples
    --------
    >>> features = np.eye(4)
    >>> sampled_retrieval(features, features, ["a", "b", "c", "d"], num_queries=3)["num_queries"]
    6
    """
    if isinstance(num_queries, bool) or not isinstance(num_queries, int | np.integer) or num_queries < 1:
        raise BadInput(f"num_queries must be an integer of at least 1, got {describe(num_queries)}")
    pairs = grouped(image_features, text_features, captions, image_ids, same_text)
    # Captions with equal keys stand side by side in `by_key`, from first[key] to first[key + 1].
    by_key = np.argsort(pairs.keys, kind="stable")
    first = np.searchsorted(pairs.keys[by_key], np.arange(pairs.keys.max() + 2))
    image_of_text = np.repeat(np.arange(len(pairs.images)), np.diff(pairs.start))

    def captions_with(keys: NDArray[np.intp]) -> NDArray[np.intp]:
        return np.concatenate([by_key[first[key] : first[key + 1]] for key in np.unique(keys).tolist()])

    rng = np.random.default_rng([seed, _STREAM])
    images, texts = (_sample(rng, len(side), int(num_queries)) for side in (pairs.images, pairs.texts))
    own_captions = (pairs.keys[pairs.start[image] : pairs.start[image + 1]] for image in images.tolist())
    correct_texts = map(captions_with, own_captions)
    correct_images = (np.unique(image_of_text[captions_with(pairs.keys[text : text + 1])]) for text in texts.tolist())
    recalls = (
        recall(_ranks(pairs.images[images], pairs.texts, correct_texts)),
        recall(_ranks(pairs.texts[texts], pairs.images, correct_images)),
    )
    r1, r5, r10 = (float(np.mean(shares)) for shares in zip(*recalls, strict=True))
    return {
        "retrieval_r1": r1,
        "retrieval_r5": r5,
        "retrieval_r10": r10,
        "num_pairs": len(pairs.texts),
        "num_queries": len(images) + len(texts),
        "gallery_size": len(pairs.images),
    }


def _sample(rng: np.random.Generator, size: int, count: int) -> NDArray[np.intp]:
    return np.sort(rng.choice(size, min(size, count), replace=False)).astype(np.intp)


def _ranks(
    queries: NDArray[np.float64], answers: NDArray[np.float64], correct: Iterable[NDArray[np.intp]]
) -> NDArray[np.int64]:
    """Return the rank of the best correct answer of each query among the wrong answers."""
    best, ties = np.zeros(len(queries), dtype=np.intp), np.zeros(len(queries), dtype=np.int64)
    for place, rows in enumerate(correct):
        # `ranks_in_gallery` computes the similarity of the correct answer in the same way, bit for bit.
        repeated = np.repeat(queries[place : place + 1], len(rows), axis=0)
        similarity = np.einsum("nd,nd->n", repeated, answers[rows], optimize=False)
        best[place] = rows[np.argmax(similarity)]
        ties[place] = np.count_nonzero(similarity == similarity.max()) - 1
    # A correct answer counts as wrong there if it is as similar as the best correct answer.
    return ranks_in_gallery(queries, answers, best) - ties
