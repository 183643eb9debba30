"""Ranks in a gallery that is too large for a matrix of all similarities, such as 10,000 queries and a million pairs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drrho_clip.errors import BadInput
from drrho_clip.measure.similarity import SimilarityTile, checked_features, plain_array

__all__ = ["ranks_in_gallery"]

# A tile of 512 x 4,096 float64 numbers takes 16 MiB.
_QUERIES, _ANSWERS = 512, 4096


def ranks_in_gallery(query_features: ArrayLike, gallery_features: ArrayLike, correct: ArrayLike) -> NDArray[np.int64]:
    """Return the rank of the correct answer of each query: 1 + the number of wrong answers at least as similar.

    Parameters
    ----------
    query_features : array_like (n, d)
        Features of the queries; all numbers are finite.
    gallery_features : array_like (m, d)
        Features of the answers; all numbers are finite.
    correct : array_like (n,) of integers
        The row of the correct answer in the gallery. R@k is ``np.mean(ranks <= k)``.

    Raises
    ------
    BadInput
        If an argument breaks these rules.

    Examples
    --------
    >>> ranks_in_gallery([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.6, 0.8], [0.0, 0.9]], [0, 1]).tolist()
    [1, 2]
    """
    queries = checked_features("query_features", query_features, minimum=1)
    gallery = checked_features("gallery_features", gallery_features, minimum=1)
    rows = plain_array("correct", correct)
    if gallery.shape[1] != queries.shape[1]:
        raise BadInput(f"gallery_features must have {queries.shape[1]} columns, got {gallery.shape[1]}")
    if rows.shape != (len(queries),) or not np.issubdtype(rows.dtype, np.integer):
        raise BadInput(f"correct must be integers of shape ({len(queries)},), got {rows.dtype} {rows.shape}")
    if rows.min() < 0 or rows.max() >= len(gallery):
        raise BadInput(f"correct must lie in [0, {len(gallery)}), got {rows.min()} to {rows.max()}")
    own = np.einsum("nd,nd->n", queries, gallery[rows], optimize=False)
    # The correct answer is at least as similar as itself, which gives the 1 of the rank.
    ranks = np.zeros(len(queries), dtype=np.int64)
    for top in range(0, len(queries), _QUERIES):
        part = slice(top, top + _QUERIES)
        for left in range(0, len(gallery), _ANSWERS):
            tile = SimilarityTile(queries[part], gallery[left : left + _ANSWERS])
            ranks[part] += np.count_nonzero(tile.at_least(own[part, np.newaxis]), axis=1)
    return ranks
