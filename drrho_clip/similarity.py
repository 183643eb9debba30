"""Similarities of features: inner products in which equal features give exactly equal numbers.

The inner product is the cosine for the unit-norm features of this library. All functions compute in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drrho_clip.errors import BadInput
from drrho_core.checks import describe

__all__ = ["checked_features", "nearest", "similarities"]


def checked_features(name: str, values: ArrayLike, *, minimum: int) -> NDArray[np.float64]:
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


def similarities(queries: NDArray[np.float64], answers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return all inner products, [queries, answers]."""
    # In a matrix product of BLAS the rounding of an entry depends on the position of the entry, so equal features might
    # not tie exactly. `einsum` without `optimize` adds the terms of every entry in the same order.
    products: NDArray[np.float64] = np.einsum("qd,ad->qa", queries, answers, optimize=False)
    return products


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
