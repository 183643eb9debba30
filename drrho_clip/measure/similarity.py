"""Similarities of features: inner products in which equal features give exactly equal numbers.

The inner product is the cosine for the unit-norm features of this library. All functions compute in float64.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drrho_clip.errors import BadInput
from drrho_core.checks import describe

__all__ = ["SimilarityTile", "checked_features", "nearest", "plain_array", "similarities"]


def plain_array(name: str, values: ArrayLike) -> NDArray[Any]:
    """Return values as an array; raise BadInput if they have a mask, or rows of different lengths."""
    # `asarray` would drop the mask, and the masked numbers would count.
    if isinstance(values, np.ma.MaskedArray):
        raise BadInput(f"{name} must be an array without a mask, got a masked array of shape {values.shape}")
    try:
        return np.asarray(values)
    except ValueError:
        raise BadInput(f"{name} must be an array, got rows of different lengths") from None


def checked_features(name: str, values: ArrayLike, *, minimum: int) -> NDArray[np.float64]:
    """Check one matrix of features and return it in float64."""
    array = plain_array(name, values)
    if array.ndim != 2 or array.shape[0] < minimum or array.shape[1] < 1:
        raise BadInput(f"{name} must have shape (n, d) with n >= {minimum} and d >= 1, got {array.shape}")
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise BadInput(f"{name} must be real numbers, got {array.dtype}")
    array = np.ascontiguousarray(array, dtype=np.float64)
    finite = np.isfinite(array)
    if not finite.all():
        raise BadInput(f"{name} must be finite, got {array[~finite][0]} in row {np.argwhere(~finite)[0, 0]}")
    return array


def similarities(queries: NDArray[np.float64], answers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return all inner products, [queries, answers]."""
    # In a matrix product of BLAS the rounding of an entry depends on the position of the entry, so equal features might
    # not tie exactly. `einsum` without `optimize` adds the terms of every entry in the same order.
    products: NDArray[np.float64] = np.einsum("qd,ad->qa", queries, answers, optimize=False)
    return products


class SimilarityTile:
    """The similarities of queries and answers, of which few are needed exactly.

    A matrix product of BLAS is several times as fast as `similarities`, but equal features do not tie exactly in it.
    The error of such a product is bounded, so the product decides all comparisons except the close ones, and only the
    close ones are decided by the exact numbers of `similarities`.

    Parameters
    ----------
    queries, answers : ndarray of float64, shapes (n, d) and (m, d)
        The features.
    """

    def __init__(self, queries: NDArray[np.float64], answers: NDArray[np.float64]) -> None:
        self.queries, self.answers = queries, answers

    @functools.cached_property
    def _rough(self) -> NDArray[np.float64]:
        with np.errstate(over="ignore", invalid="ignore"):
            return self.queries @ self.answers.T

    @functools.cached_property
    def _whole(self) -> NDArray[np.float64]:
        return similarities(self.queries, self.answers)

    @functools.cached_property
    def _tolerance(self) -> float:
        """Bound of the difference between `_rough` and `_whole`.

        In any order of summation the error of an inner product is at most ``d u |q| |a|`` up to higher orders, with
        u = 2^-53. Both numbers have such an error, and another factor of 2 covers the higher orders.
        """
        with np.errstate(over="ignore"):
            longest = [np.sqrt(np.max(np.sum(rows * rows, axis=1))) for rows in (self.queries, self.answers)]
            return float(2 * self.queries.shape[1] * np.finfo(np.float64).eps * longest[0] * longest[1])

    def at(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the exact similarities at some places of the matrix."""
        # If many places are asked for, computing the whole matrix is quicker than collecting the features.
        if len(rows) > len(self.queries) * len(self.answers) // 16:
            return self._whole[rows, columns]
        products: NDArray[np.float64] = np.einsum("pd,pd->p", self.queries[rows], self.answers[columns], optimize=False)
        return products

    def at_least(self, threshold: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return where the exact similarity is at least a threshold, which is a row or a column of numbers."""
        with np.errstate(invalid="ignore"):
            excess = self._rough - threshold
        result: NDArray[np.bool_] = excess > 0
        # Written with "not", so that a product that overflowed is decided exactly too.
        rows, columns = np.nonzero(~(np.abs(excess) > self._tolerance))
        result[rows, columns] = self.at(rows, columns) >= np.broadcast_to(threshold, result.shape)[rows, columns]
        return result


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
    queries = checked_features("query_features", query_features, minimum=1)
    gallery = checked_features("gallery_features", gallery_features, minimum=1)
    if gallery.shape[1] != queries.shape[1]:
        raise BadInput(
            f"gallery_features must have as many columns as query_features, {queries.shape[1]}, got {gallery.shape[1]}"
        )
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= len(gallery):
        raise BadInput(f"k must be an integer from 1 to the gallery's size, {len(gallery)}, got {describe(k)}")
    return np.argsort(-similarities(queries, gallery), axis=1, kind="stable")[:, :k]
