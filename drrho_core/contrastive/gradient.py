"""The gradient with respect to features, computed from weighted sums that the second pass over all pairs returns.

dE1 = V E2 - c E2,   dE2 = V^T E1 - c E1      times a factor of the objective, such as 1 / 2b

E1 and E2 are the features of both sides, V the weights of all pairs, and c_i the sum of the weights of both anchors of
pair i.
"""

from __future__ import annotations

from array_api_compat import is_writeable_array

from drrho_core._array_api import Array, Namespace, Scalar, is_compiling

ROWS = 8192
"""Number of rows of a gradient that are computed at a time. At b = 65,536 this saves 400 MB of temporary memory."""


def wide_gradient(pull: Array, c: Array, features: Array, xp: Namespace, *factors: Scalar) -> Array:
    """Return ``pull - c * features`` times the factors, in the dtype of `pull`, which may be overwritten.

    `pull` holds the weighted sums of the negatives' features, ``c * features`` those of the positives' features. The
    factors are multiplied one after the other, because their product may overflow although the gradient does not.
    """
    # The subtraction is done in place, so that no second array of this size exists. A compiler does this by itself.
    if not is_compiling(xp) and is_writeable_array(pull):
        size = pull.shape[0]
        for start in range(0, size, ROWS):
            rows = slice(start, min(start + ROWS, size))
            pull[rows, :] -= c[rows][:, None] * xp.astype(features[rows, :], pull.dtype, copy=False)
    else:
        pull = pull - c[:, None] * xp.astype(features, pull.dtype, copy=False)
    for factor in factors:
        pull *= factor
    return pull


def gradient(pull: Array, c: Array, features: Array, xp: Namespace, *factors: Scalar) -> Array:
    """Return `wide_gradient` in the features' dtype."""
    return xp.astype(wide_gradient(pull, c, features, xp, *factors), features.dtype, copy=False)
