"""Inner estimates that other programs have saved, as the `log_inner` of this library.

Shapes: tables with one row per sample, (n,) or (n, 1), as those programs keep them; the result is (n,), in the order
and the dtype of the table. Put it into an estimator with ``InnerEstimator.load_state_dict``, and go on with the
temperature and the reference model that it was saved with, because the estimates are made of them.

What is stored, with g a moving average of mean_{j != i} exp(D_ij) over a batch of size B, and s the similarity of the
sample's positive pair at the time of its visit:

    LibAUC, bimodal (GCLoss_v2)                 u, b        g = u exp(b);    u = 0 is unvisited
    DRRho-CLIP, SogCLRLoss                      log u       u = eps + (B - 1) / B g;    0, inf and nan are unvisited
    DRRho-CLIP, FastCLIPLoss                    log u       u = (eps + (B - 1) / B g) exp(-s);    likewise
    LibAUC, unimodal (GCLoss_v1)                u           g = u exp(-s / tau);    u = 0 is unvisited

The first two are exact. The other two hold the similarity of the positive pair, which no table keeps: without it there
is no estimate to import, with the features of today it is exact for samples whose features have not changed since.
Sources: the released code of LibAUC (SogCLR, arXiv 2202.12387) and of DRRho-CLIP (arXiv 2505.06699).
"""

from __future__ import annotations

import math

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, is_array, namespace_of
from drrho_core._validate import POSITIVE
from drrho_core.numerics import log


def log_inner_from_libauc_v2(u: Array, b: Array, /, *, xp: Namespace | None = None) -> Array:
    """Return the estimates that LibAUC's bimodal loss (GCLoss_v2) has saved: exact.

    FastCLIPLossIndividual of DRRho-CLIP, with a temperature per sample, keeps the same two tables.

    Parameters
    ----------
    u, b : array, shape (n,) or (n, 1)
        One direction's tables, float32 or wider: ``u1`` and ``b1`` for images, ``u2`` and ``b2`` for texts. u is the
        estimate over exp(b); 0 = never visited.
    xp : namespace, optional
        The arrays' namespace.

    Returns
    -------
    array, shape (n,)
        log u + b, ``-inf`` where never visited.

    Raises
    ------
    TypeError, ValueError
        If the tables have another type, dtype, shape or device, u is negative, or a value is not finite.

    Notes
    -----
    A first visit that LibAUC weighed with its smallest gamma (every one after its first epoch) is too small by this
    factor in the table and stays so until gamma forgets it.

    Examples
    --------
    >>> import numpy as np
    >>> log_inner_from_libauc_v2(np.asarray([1.0, 0.0]), np.asarray([3.0, 0.0])).tolist()
    [3.0, -inf]
    """
    xp = _check_tables({"u": u, "b": b}, xp)
    _validate.values("u", u, lambda x: xp.isfinite(x) & (x >= 0), "be finite and >= 0", xp)
    _validate.finite("b", b, xp)
    return log(_flat(u, xp), xp=xp) + _flat(b, xp)


def log_inner_from_sogclr_loss(log_u: Array, /, *, batch_size: int, eps: float, xp: Namespace | None = None) -> Array:
    """Return the estimates that SogCLRLoss of DRRho-CLIP (one temperature for all) has saved: exact.

    Parameters
    ----------
    log_u : array, shape (n,) or (n, 1)
        One direction's table, ``u_im`` or ``u_tt``, float32 or wider; 0, inf and nan = never visited.
    batch_size : int
        B >= 2, the global batch size that it was saved with: that loss divides by B where B - 1 negatives are met.
    eps : float
        What that loss added to every estimate before it was stored, >= 0.
    xp : namespace, optional
        The array's namespace.

    Returns
    -------
    array, shape (n,)
        ``log((exp(log_u) - eps) B / (B - 1))``; ``-inf`` where never visited, and where an estimate is so far below
        `eps` that nothing of it is left in the table.

    Raises
    ------
    TypeError, ValueError
        If an argument has another type or shape, or `eps` is larger than what it was added to.

    Examples
    --------
    >>> import numpy as np
    >>> stored = np.log(0.1 + 3 / 4 * np.asarray([2.0, 5.0]))       # the means are 2 and 5, B is 4
    >>> np.round(np.exp(log_inner_from_sogclr_loss(stored, batch_size=4, eps=0.1)), 12).tolist()
    [2.0, 5.0]
    """
    xp = _check_tables({"log_u": log_u}, xp)
    return _without_eps(_flat(log_u, xp), None, batch_size, eps, xp)


def log_inner_from_fastclip_loss(
    log_u: Array,
    /,
    *,
    batch_size: int,
    eps: float,
    positive_similarity: Array | None = None,
    xp: Namespace | None = None,
) -> Array:
    """Return the estimates that FastCLIPLoss of DRRho-CLIP has saved, given the similarities of the positive pairs.

    That loss subtracts each pair's cosine once more from the logarithm that it stores, so the table alone is off by a
    factor of up to e in either direction, sample by sample, and nothing in it says by how much.

    Parameters
    ----------
    log_u : array, shape (n,) or (n, 1)
        One direction's table, ``u_im`` or ``u_tt``, float32 or wider; 0, inf and nan = never visited.
    batch_size : int
        B >= 2, the global batch size that it was saved with.
    eps : float
        What that loss added to every estimate, >= 0.
    positive_similarity : array, shape (n,) or (n, 1)
        The learner's cosine of each sample's image and text, in the table's dtype, in [-1, 1] up to rounding, not
        divided by the temperature and without the reference model: ``sum(image_features * text_features, axis=-1)``.
        Exact where it is that of all visits which the average still remembers: of the last one with gamma = 1. Not read
        for samples that were never visited.
    xp : namespace, optional
        The arrays' namespace.

    Returns
    -------
    array, shape (n,)
        ``log((exp(log_u + s) - eps) B / (B - 1))``; ``-inf`` as in `log_inner_from_sogclr_loss`.

    Raises
    ------
    TypeError, ValueError
        If `positive_similarity` is missing, an argument has another type, shape or domain, or `eps` is larger than
        what it was added to.

    Examples
    --------
    >>> import numpy as np
    >>> similarity = np.asarray([0.5, -0.5])
    >>> stored = np.log(0.1 + 3 / 4 * np.asarray([2.0, 5.0])) - similarity
    >>> estimates = log_inner_from_fastclip_loss(stored, batch_size=4, eps=0.1, positive_similarity=similarity)
    >>> np.round(np.exp(estimates), 12).tolist()
    [2.0, 5.0]
    """
    why = "FastCLIPLoss subtracts each pair's similarity from what it stores and keeps it nowhere"
    similarity = _require("positive_similarity", positive_similarity, why)
    xp = _check_tables({"log_u": log_u, "positive_similarity": similarity}, xp)
    return _without_eps(_flat(log_u, xp), _flat(similarity, xp), batch_size, eps, xp)


def log_inner_from_libauc_v1(
    u: Array,
    /,
    *,
    temperature: Scalar,
    positive_similarity: Array | None = None,
    xp: Namespace | None = None,
) -> Array:
    """Return the estimates that LibAUC's unimodal loss (GCLoss_v1) has saved, given the positive pairs' similarities.

    That loss averages exp(s_ij / tau) and not exp((s_ij - s_ii) / tau), and it keeps one table for both views: their
    mean. Start both views of `unimodal_contrastive_step` from what is returned.

    Parameters
    ----------
    u : array, shape (n,) or (n, 1)
        The table, float32 or wider; 0 = never visited.
    temperature : float or array of shape (), (n,) or (n, 1)
        tau > 0, one for all samples or each sample's own.
    positive_similarity : array, shape (n,) or (n, 1)
        The cosine of each sample's two views, in the table's dtype, in [-1, 1] up to rounding. With the features of
        today the estimate is what that loss itself would go on from. Not read for samples that were never visited.
    xp : namespace, optional
        The arrays' namespace.

    Returns
    -------
    array, shape (n,)
        log u - s / tau, ``-inf`` where never visited.

    Raises
    ------
    TypeError, ValueError
        If `positive_similarity` is missing, or an argument has another type, shape or domain.

    Examples
    --------
    >>> import numpy as np
    >>> u, similarity = np.exp(np.asarray([4.0, 6.0])), np.asarray([0.5, 1.0])
    >>> log_inner_from_libauc_v1(u, temperature=0.5, positive_similarity=similarity).round(12).tolist()
    [3.0, 4.0]
    """
    why = "GCLoss_v1 does not subtract the pair's similarity before it averages, and this library does"
    similarity = _require("positive_similarity", positive_similarity, why)
    tables = {"u": u, "positive_similarity": similarity}
    own = is_array(temperature) and temperature.ndim > 0  # type: ignore[union-attr]
    xp = _check_tables(tables | ({"temperature": temperature} if own else {}), xp)
    _validate.values("u", u, lambda x: xp.isfinite(x) & (x >= 0), "be finite and >= 0", xp)
    if own:
        _validate.values("temperature", temperature, lambda x: xp.isfinite(x) & (x > 0), "be > 0", xp)
        temperature = _flat(temperature, xp)
    else:
        temperature = _validate.static_number("temperature", temperature, POSITIVE)
        _validate.fits("temperature", temperature, POSITIVE, u.dtype, xp)
    u = _flat(u, xp)
    return log(u, xp=xp) - _usable(_flat(similarity, xp), u > 0, xp) / temperature


def _require(name: str, array: Array | None, why: str) -> Array:
    """Refuse to guess what a table does not hold."""
    if array is None:
        raise ValueError(f"{name} must be given, because {why}, got None")
    return array


def _check_tables(tables: dict[str, Array], xp: Namespace | None) -> Namespace:
    """Check all but the values of tables that belong together, and return their namespace."""
    xp = namespace_of(tables, xp)
    _validate.detached(tables, xp)
    _validate.same_device(tables, xp)
    (first, table), *rest = tables.items()
    _validate.state_dtype(first, table, xp)
    if table.ndim not in (1, 2) or table.shape[1:] not in ((), (1,)):
        raise ValueError(f"{first} must have shape (num_samples,) or (num_samples, 1), got {tuple(table.shape)}")
    _validate.same_dtype(tables)
    for name, other in rest:
        if tuple(other.shape) not in ((table.shape[0],), (table.shape[0], 1)):
            raise ValueError(
                f"{name} must have one row per row of {first} ({table.shape[0]}), got shape {tuple(other.shape)}"
            )
    return xp


def _flat(table: Array, xp: Namespace) -> Array:
    return xp.reshape(table, (-1,))


def _usable(similarity: Array, visited: Array, xp: Namespace) -> Array:
    """Return the similarities of the samples that were visited, 0 elsewhere, after checking them."""
    similarity = xp.where(visited, similarity, xp.zeros_like(similarity))
    _validate.values("positive_similarity", similarity, lambda x: xp.abs(x) <= 1.01, "be in [-1, 1]", xp)
    return similarity


def _without_eps(log_u: Array, similarity: Array | None, batch_size: int, eps: float, xp: Namespace) -> Array:
    """Return log g from ``log(eps + (B - 1) / B g) - s``."""
    batch_size = _validate.integer("batch_size", batch_size, minimum=2)
    eps = _validate.static_number("eps", eps, lambda x: x >= 0, "be >= 0")
    visited = xp.isfinite(log_u) & (log_u != 0)
    log_u = xp.where(visited, log_u, xp.zeros_like(log_u))
    if similarity is not None:
        log_u = log_u + _usable(similarity, visited, xp)
    correction = math.log(batch_size / (batch_size - 1))
    if eps == 0:
        return xp.where(visited, log_u + correction, -xp.inf)
    # A table is exact to a few units of its last place. An estimate within them of eps has been rounded away.
    slack = 16 * float(xp.finfo(log_u.dtype).eps) * max(1.0, abs(math.log(eps)))
    share = math.log(eps) - log_u  # log of what part of the table's value eps is
    rule = f"be at least log eps = {math.log(eps):.6g}, because eps was added to what is stored"
    name = "log_u" if similarity is None else "log_u + positive_similarity"
    _validate.values(name, xp.where(visited, log_u, xp.inf), lambda x: math.log(eps) - x <= slack, rule, xp)
    left = visited & (share < -slack)
    kept = xp.where(left, share, xp.full_like(share, -1.0))
    return xp.where(left, log_u + xp.log1p(-xp.exp(kept)) + correction, -xp.inf)
