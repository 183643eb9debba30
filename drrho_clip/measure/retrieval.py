"""Retrieval: for how many images is a right caption the most similar caption, and for how many captions a right image.

An image may have several captions. Whether an answer is correct depends on the image's number and on the captions,
never on features: an encoder that has collapsed (all features are equal) scores zero, because ties count as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drrho_clip.errors import BadInput
from drrho_clip.measure.similarity import SimilarityTile, checked_features, plain_array
from drrho_core.checks import describe

__all__ = ["Pairs", "Recall", "Retrieval", "grouped", "recall", "retrieval"]

# Captions in a tile, the part of the matrix of similarities that is in memory at once: 256 x 256 float64 fit a cache.
TILE = 256


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
        Each direction alone: images as queries over captions, and captions as queries over images.
    num_galleries : int
        Number of galleries that were searched.
    num_pairs : int
        Number of pairs in all galleries; the remainder that fills no gallery is left out.
    num_queries : int
        Number of queries in all galleries: every image once and every caption once.
    gallery_size : int
        Number of images in a gallery.
    retrieval_r1_full : float
        R@1, the mean over the two directions, if all images form a single gallery, the remainder included.
    num_pairs_full : int
        Number of all pairs, from which `retrieval_r1_full` is computed.
    retrieval_r1_standard_error : float
        Standard error of `retrieval_r1` as an estimate for further images of the same kind, by the jackknife. An image
        counts with its captions, both as queries and as answers to other queries, so the error is larger than that of
        independent queries. It does not cover the seed of the training. If all queries are answered correctly, the
        error is 0, and the true share may still be lower by about 3 / (number of images).
    """

    retrieval_r1: float
    retrieval_r5: float
    retrieval_r10: float
    image_to_text: Recall
    text_to_image: Recall
    num_galleries: int
    num_pairs: int
    num_queries: int
    gallery_size: int
    retrieval_r1_full: float
    num_pairs_full: int
    retrieval_r1_standard_error: float

    def metrics(self) -> dict[str, float]:
        """Return all figures except the single directions, by their names in results.json."""
        names = [name for name in self._fields if name not in ("image_to_text", "text_to_image", "num_galleries")]
        return {name: getattr(self, name) for name in names}


class Pairs(NamedTuple):
    """Pairs that are grouped by image.

    `images` holds one row per image. The captions of image i are the rows ``start[i] : start[i + 1]`` of `texts` and of
    `keys`; captions with equal keys count as equal.
    """

    images: NDArray[np.float64]
    texts: NDArray[np.float64]
    keys: NDArray[np.intp]
    start: NDArray[np.intp]

    def part(self, first: int, stop: int) -> Pairs:
        """Return the pairs of the images first, ..., stop - 1."""
        rows = slice(self.start[first], self.start[stop])
        return Pairs(
            self.images[first:stop], self.texts[rows], self.keys[rows], self.start[first : stop + 1] - self.start[first]
        )


def retrieval(
    image_features: ArrayLike,
    text_features: ArrayLike,
    captions: Sequence[str],
    *,
    image_ids: ArrayLike | None = None,
    same_text: Callable[[str], Hashable] | None = None,
    gallery_size: int = 200,
) -> Retrieval:
    """Measure R@1, R@5 and R@10 of retrieval in both directions on held-out pairs.

    R@k is the share of queries for which a correct answer is among the k most similar answers; the notes have the rule
    for ties.

    The images are divided into galleries of `gallery_size` consecutive images, in the order in which they first appear,
    and every gallery holds all captions of its images. A remainder smaller than a gallery is left out, but if there are
    fewer than `gallery_size` images, all images form a single gallery. In a gallery every image is a query over all
    captions and every caption is a query over all images.

    Parameters
    ----------
    image_features, text_features : array_like (n, d)
        Features of the n pairs; row i of each array belongs to pair i. The numbers must be finite. If the rows have
        norm 1, the similarity is the cosine; the norm is not checked.
    captions : sequence of n str
        The captions.
    image_ids : array_like (n,) of integers, optional
        Pairs with equal numbers show the same image, which then has several captions. The image is a single query and a
        single answer, with the feature of its first row. By default every pair shows an image of its own.
    same_text : callable, optional
        Takes a caption and returns a hashable key; captions with equal keys count as equal. By default the caption is
        the key.
    gallery_size : int, default 200
        Images in a gallery, at least 2.

    Returns
    -------
    Retrieval
        The means of both directions, each direction alone, R@1 over all images at once, and the numbers of pairs,
        queries and galleries.

    Raises
    ------
    BadInput
        If the features are not two real matrices of one shape with n >= 2 and finite entries, if `captions` are not n
        strings, if `image_ids` are not n integers with at least 2 different values, if `same_text` is no function that
        returns hashable keys, or if `gallery_size` is not an integer of at least 2.

    Notes
    -----
    A caption is correct for an image if the image has this caption or an equal caption, and the image is then correct
    for the caption. Let C_q be the set of correct answers of query q, and s_qa the similarity of query q and answer a.
    Then ``rank_q = 1 + #{a not in C_q : s_qa >= max_{c in C_q} s_qc}`` and R@k is the share of queries with
    ``rank_q <= k``. Source: R@k over image-caption galleries, in which any of the captions of an image is correct, is
    the protocol of image-text retrieval since Karpathy and Fei-Fei, "Deep visual-semantic alignments for generating
    image descriptions" (2015). The rules for ties and for equal captions of different images do not come from this
    protocol.

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

    Two captions of one image are both correct for it, and the image counts once:

    >>> measured = retrieval([[1, 0], [1, 0], [0, 1]], [[1, 0], [0.8, 0.6], [0, 1]], ["a ball", "a toy", "a cube"],
    ...                      image_ids=[7, 7, 8])
    >>> measured.retrieval_r1, measured.num_pairs, measured.num_queries, measured.gallery_size
    (1.0, 3, 5, 2)
    """
    if isinstance(gallery_size, bool) or not isinstance(gallery_size, int | np.integer) or gallery_size < 2:
        raise BadInput(f"gallery_size must be an integer of at least 2, got {describe(gallery_size)}")
    pairs = grouped(image_features, text_features, captions, image_ids, same_text)
    num_images = len(pairs.images)
    size = min(int(gallery_size), num_images)
    num_galleries = num_images // size
    images, texts = zip(*(_answers(pairs.part(i, i + size)) for i in range(0, num_galleries * size, size)), strict=True)
    image_ranks, text_ranks = (np.concatenate([answers.ranks for answers in part]) for part in (images, texts))
    image_to_text, text_to_image = recall(image_ranks), recall(text_ranks)
    r1, r5, r10 = ((a + b) / 2 for a, b in zip(image_to_text, text_to_image, strict=True))
    # A single gallery without a remainder holds all images.
    r1_full = r1
    if num_images > size:
        r1_full = sum(recall(answers.ranks).r1 for answers in _answers(pairs)) / 2
    return Retrieval(
        retrieval_r1=r1,
        retrieval_r5=r5,
        retrieval_r10=r10,
        image_to_text=image_to_text,
        text_to_image=text_to_image,
        num_galleries=num_galleries,
        num_pairs=len(text_ranks),
        num_queries=len(image_ranks) + len(text_ranks),
        gallery_size=size,
        retrieval_r1_full=r1_full,
        num_pairs_full=len(pairs.texts),
        retrieval_r1_standard_error=_standard_error(images, texts, np.diff(pairs.start[: len(image_ranks) + 1])),
    )


def grouped(
    image_features: ArrayLike,
    text_features: ArrayLike,
    captions: Sequence[str],
    image_ids: ArrayLike | None,
    same_text: Callable[[str], Hashable] | None,
) -> Pairs:
    """Check the arguments of `retrieval` and group the pairs by image, in the order of the first appearance."""
    images = checked_features("image_features", image_features, minimum=2)
    texts = checked_features("text_features", text_features, minimum=2)
    if images.shape != texts.shape:
        raise BadInput(f"text_features must have the shape of image_features, {images.shape}, got {texts.shape}")
    is_sequence = isinstance(captions, Sequence | np.ndarray) and not isinstance(captions, str)
    if not is_sequence or not all(isinstance(caption, str) for caption in captions):
        raise BadInput(f"captions must be a sequence of str, got {describe(captions)}")
    if len(captions) != len(images):
        raise BadInput(f"captions must have one entry per pair, {len(images)}, got {len(captions)}")
    keys = _numbers(_keys(captions, same_text))
    if image_ids is None:
        return Pairs(images, texts, keys, np.arange(len(images) + 1))
    ids = plain_array("image_ids", image_ids)
    if ids.shape != (len(images),) or not np.issubdtype(ids.dtype, np.integer):
        raise BadInput(f"image_ids must be integers of shape ({len(images)},), got {describe(ids)}")
    image_of_row = _numbers(ids.tolist())
    # A stable sort keeps the order of the captions of one image.
    rows = np.argsort(image_of_row, kind="stable")
    start = np.searchsorted(image_of_row[rows], np.arange(image_of_row.max() + 2))
    if len(start) < 3:
        raise BadInput(f"image_ids must name at least 2 images, got {ids[0]} for every pair")
    return Pairs(images[rows[start[:-1]]], texts[rows], keys[rows], start)


def _keys(captions: Sequence[str], same_text: Callable[[str], Hashable] | None) -> Sequence[Hashable]:
    """Return the key of each caption."""
    if same_text is None:
        return captions
    if not callable(same_text):
        raise BadInput(f"same_text must be a function of a caption, got {describe(same_text)}")
    keys = [same_text(caption) for caption in captions]
    unhashable = next((key for key in keys if not isinstance(key, Hashable)), None)
    if unhashable is not None:
        raise BadInput(f"same_text must return hashable keys, got {describe(unhashable)}")
    return keys


def _numbers(values: Sequence[Hashable]) -> NDArray[np.intp]:
    """Return a number for each value: distinct values are numbered 0, 1, ... by their first appearance."""
    number_of = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.array([number_of[value] for value in values], dtype=np.intp)


class _Answers(NamedTuple):
    """How the queries of one direction are answered.

    `ranks` holds the rank of each query: 1 + the number of wrong answers that are at least as similar as the best
    correct answer, so a tie with a wrong answer raises the rank and lowers the score. `blockers` holds, for each query,
    the number of the image to which all these wrong answers belong, or -1 if there is no such single image.
    """

    ranks: NDArray[np.intp]
    blockers: NDArray[np.intp]


def _answers(gallery: Pairs) -> tuple[_Answers, _Answers]:
    """Answer every image by the captions, and every caption by the images."""
    num_images, num_texts = len(gallery.images), len(gallery.texts)
    image_of_text = np.repeat(np.arange(num_images), np.diff(gallery.start))
    best_of_image, best_of_text = np.full(num_images, -np.inf), np.full(num_texts, -np.inf)
    # The first pass finds the best correct answer of every query.
    for images, texts, correct in _tiles(gallery):
        tile = SimilarityTile(gallery.images[images], gallery.texts[texts])
        rows, columns = np.nonzero(correct)
        similarity = tile.at(rows, columns)
        np.maximum.at(best_of_image[images], rows, similarity)
        np.maximum.at(best_of_text[texts], columns, similarity)
    # The second pass counts the wrong answers that are at least as similar.
    of_images, of_texts = _Wrong(num_images), _Wrong(num_texts)
    for images, texts, correct in _tiles(gallery):
        tile = SimilarityTile(gallery.images[images], gallery.texts[texts])
        of_images.add(images, ~correct & tile.at_least(best_of_image[images, np.newaxis]), image_of_text[texts])
        wrong_images = ~correct & tile.at_least(best_of_text[texts])
        of_texts.add(texts, wrong_images.T, np.arange(images.start, images.stop))
    return of_images.answers(), of_texts.answers()


class _Wrong:
    """The wrong answers that come before the best correct answer, collected from tiles for the queries of a gallery."""

    def __init__(self, num_queries: int) -> None:
        self.count = np.zeros(num_queries, dtype=np.intp)
        # The smallest and the largest number of an image among the wrong answers; they are equal for a single blocker.
        self.first = np.full(num_queries, np.iinfo(np.intp).max)
        self.last = np.full(num_queries, -1)

    def add(self, queries: slice, wrong: NDArray[np.bool_], image: NDArray[np.intp]) -> None:
        """Add a tile [queries, answers]; `image` is the number of the image of each answer."""
        self.count[queries] += np.sum(wrong, axis=1)
        first = np.where(wrong, image, np.iinfo(np.intp).max).min(axis=1)
        last = np.where(wrong, image, -1).max(axis=1)
        self.first[queries] = np.minimum(self.first[queries], first)
        self.last[queries] = np.maximum(self.last[queries], last)

    def answers(self) -> _Answers:
        return _Answers(1 + self.count, np.where(self.first == self.last, self.first, -1))


def _tiles(gallery: Pairs) -> Iterator[tuple[slice, slice, NDArray[np.bool_]]]:
    """Divide the matrix [images, captions] into tiles: both slices, and a matrix that is True for correct answers."""
    first = 0
    while first < len(gallery.images):
        # The tile takes as many images as have `TILE` captions together, but at least one image.
        stop = int(np.searchsorted(gallery.start, gallery.start[first] + TILE, side="right")) - 1
        images = slice(first, max(first + 1, stop))
        own = gallery.part(images.start, images.stop)
        for left in range(0, len(gallery.texts), TILE):
            texts = slice(left, left + TILE)
            # Row r of `equal` compares caption r of these images with all captions; an image has a correct answer where
            # any of the rows of the image is True.
            equal = own.keys[:, np.newaxis] == gallery.keys[texts]
            correct = np.logical_or.reduceat(equal, own.start[:-1], axis=0)
            yield images, texts, correct
        first = images.stop


def recall(ranks: NDArray[Any]) -> Recall:
    """Return the shares of the ranks, which start at 1, that are at most 1, 5 and 10."""
    return Recall(*(float(np.mean(ranks <= k)) for k in (1, 5, 10)))


def _standard_error(images: Sequence[_Answers], texts: Sequence[_Answers], num_captions: NDArray[np.intp]) -> float:
    """Return the standard error of R@1 by the jackknife: R@1 is computed again without each image.

    With M images, and R@1 without image i called r_i, the squared error is ``(M - 1) / M * sum_i (r_i - mean r)^2``
    (Efron and Stein, "The jackknife estimate of variance", 1981; the estimate errs on the large side). An image without
    which a query would be answered correctly is the only blocker of the query.
    """
    total = len(num_captions)
    queries = np.ones(total, dtype=np.intp)
    owner = np.repeat(np.arange(total), num_captions)
    without = np.zeros(total)
    for galleries, count, image in ((images, queries, np.arange(total)), (texts, num_captions, owner)):
        hits = np.concatenate([answers.ranks == 1 for answers in galleries])
        own = np.bincount(image, weights=hits, minlength=total)
        # Galleries number their images from 0.
        sizes = [len(answers.ranks) for answers in images]
        freed = [
            np.bincount(answers.blockers[answers.blockers >= 0], minlength=size)
            for answers, size in zip(galleries, sizes, strict=True)
        ]
        without += (hits.sum() - own + np.concatenate(freed)) / (len(hits) - count) / 2
    return float(np.sqrt((total - 1) / total * np.sum((without - without.mean()) ** 2)))
