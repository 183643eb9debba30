"""Conversion of inner estimates that other programs have saved to the `log_inner` of this library.

Shapes: tables have one row per sample, (n,) or (n, 1), as the other programs store them. The result is (n,), in the
order and the dtype of the table. Put the result into an estimator with ``InnerEstimator.load_state_dict``. Continue
with the temperature and the reference model of the program that saved the table, because the estimates depend on both.

A visit of a sample is a batch that contains the sample. The inner estimate g of sample i is a moving average of
mean_{j != i} exp(D_ij) over its visits. Here j runs over a batch of size B, D_ij = (s_ij - s_ii) / tau compares
similarities, and tau is the temperature. Each program stores a different function of g. Below, s is the similarity s_ii
of the sample's positive pair at the time of the visit, and eps is a number that the loss adds to every estimate:

    LibAUC, bimodal (GCLoss_v2)     u, b     g = u exp(b);                         not visited: u = 0
    DRRho-CLIP, SogCLRLoss          log u    u = eps + (B - 1) / B g;              not visited: log u is 0, inf or nan
    DRRho-CLIP, FastCLIPLoss        log u    u = (eps + (B - 1) / B g) exp(-s);    not visited: log u is 0, inf or nan
    LibAUC, unimodal (GCLoss_v1)    u        g = u exp(-s / tau);                  not visited: u = 0

The first two conversions are exact. The last two need the similarity of the positive pair, which no table holds. If the
similarity is computed from the features of today, the result is exact for samples whose features have not changed since
their visits.
Sources: the released code of LibAUC (SogCLR, arXiv 2202.12387) and of DRRho-CLIP (arXiv 2505.06699).
"""

from __future__ import annotations

import math

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, is_array
from drrho_core._validate import FINITE, FINITE_NOT_NEGATIVE, NOT_NEGATIVE, POSITIVE, STATE, Call, Rule
from drrho_core.numerics import log

COSINE = Rule("be in [-1, 1]", -1.01, 1.01, True, True)
"""The rule for similarities of unit vectors. The tolerance is needed because half types round them by almost 1 %."""


def log_inner_from_libauc_v2(u: Array, b: Array, /, *, xp: Namespace | None = None) -> Array:
    """Return the estimates that LibAUC's bimodal loss (GCLoss_v2) has saved. The conversion is exact.

    FastCLIPLossIndividual of DRRho-CLIP, with a temperature per sample, stores the same two tables.

    Parameters
    ----------
    u, b : array, shape (n,) or (n, 1)
        The tables of one direction, float32 or wider: ``u1`` and ``b1`` for images, ``u2`` and ``b2`` for texts. u is
        the estimate divided by exp(b). A u of 0 means never visited.
    xp : namespace, optional
        The arrays' namespace.

    Returns
    -------
    array, shape (n,)
        log u + b; ``-inf`` for samples that were never visited.

    Raises
    ------
    TypeError, ValueError
        If the tables differ in dtype, shape or device, a table has a wrong type, u is negative, or a value is not
        finite.

    Notes
    -----
    If LibAUC visits a sample for the first time after the first epoch, it multiplies the new estimate by its smallest
    gamma. In the table this estimate is too small by this factor, and it stays too small until further visits replace
    it.

    Examples
    --------
    >>> import numpy as np
    >>> log_inner_from_libauc_v2(np.asarray([1.0, 0.0]), np.asarray([3.0, 0.0])).tolist()
    [3.0, -inf]
    """
    call = _check_tables({"u": u, "b": b}, xp)
    call.values("u", u, FINITE_NOT_NEGATIVE)
    call.values("b", b, FINITE)
    xp = call.xp
    return log(_flat(u, xp), xp=xp) + _flat(b, xp)


def log_inner_from_sogclr_loss(log_u: Array, /, *, batch_size: int, eps: float, xp: Namespace | None = None) -> Array:
    """Return the estimates that SogCLRLoss of DRRho-CLIP has saved. The conversion is exact.

    SogCLRLoss has one temperature for all samples.

    Parameters
    ----------
    log_u : array, shape (n,) or (n, 1)
        The table of one direction, ``u_im`` or ``u_tt``, float32 or wider; 0, inf and nan mean never visited.
    batch_size : int
        B >= 2, the global batch size of the run that saved the table. SogCLRLoss divides the sum over B - 1 negatives
        by B.
    eps : float
        The number that the loss added to every estimate before it stored the sum, >= 0.
    xp : namespace, optional
        The array's namespace.

    Returns
    -------
    array, shape (n,)
        ``log((exp(log_u) - eps) B / (B - 1))``; ``-inf`` for samples that were never visited, and for estimates so
        far below `eps` that rounding has removed them from the table.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type or shape, or `eps` is larger than a stored sum, of which `eps` is a part.

    Examples
    --------
    >>> import numpy as np
    >>> stored = np.log(0.1 + 3 / 4 * np.asarray([2.0, 5.0]))       # the means are 2 and 5, B is 4
    >>> np.round(np.exp(log_inner_from_sogclr_loss(stored, batch_size=4, eps=0.1)), 12).tolist()
    [2.0, 5.0]
    """
    return _without_eps(_check_tables({"log_u": log_u}, xp), None, batch_size, eps)


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

    FastCLIPLoss subtracts the cosine of each positive pair once more from the logarithm that it stores. So each stored
    estimate is wrong by a factor between 1 / e and e, and the table does not say by which factor.

    Parameters
    ----------
    log_u : array, shape (n,) or (n, 1)
        The table of one direction, ``u_im`` or ``u_tt``, float32 or wider; 0, inf and nan mean never visited.
    batch_size : int
        B >= 2, the global batch size of the run that saved the table.
    eps : float
        The number that the loss added to every estimate, >= 0.
    positive_similarity : array, shape (n,) or (n, 1)
        The cosine ``sum(image_features * text_features, axis=-1)`` of each sample's image and text, in the table's
        dtype, in [-1, 1] up to rounding. The features are those of the learner, and the cosine is not divided by the
        temperature. The result is exact if all visits that still contribute to the average had this similarity. With
        gamma = 1 only the last visit contributes. Entries of samples that were never visited are not read.
    xp : namespace, optional
        The arrays' namespace.

    Returns
    -------
    array, shape (n,)
        ``log((exp(log_u + s) - eps) B / (B - 1))`` with s the similarity; ``-inf`` as in `log_inner_from_sogclr_loss`.

    Raises
    ------
    TypeError, ValueError
        If `positive_similarity` is missing, an argument has a wrong type or shape or lies outside its interval, or
        `eps` is larger than a stored sum, of which `eps` is a part.

    Examples
    --------
    >>> import numpy as np
    >>> similarity = np.asarray([0.5, -0.5])
    >>> stored = np.log(0.1 + 3 / 4 * np.asarray([2.0, 5.0])) - similarity
    >>> estimates = log_inner_from_fastclip_loss(stored, batch_size=4, eps=0.1, positive_similarity=similarity)
    >>> np.round(np.exp(estimates), 12).tolist()
    [2.0, 5.0]
    """
    why = "FastCLIPLoss subtracts each pair's similarity from the stored logarithm and does not store the similarity"
    similarity = _require("positive_similarity", positive_similarity, why)
    call = _check_tables({"log_u": log_u, "positive_similarity": similarity}, xp)
    return _without_eps(call, similarity, batch_size, eps)


def log_inner_from_libauc_v1(
    u: Array,
    /,
    *,
    temperature: Scalar,
    positive_similarity: Array | None = None,
    xp: Namespace | None = None,
) -> Array:
    """Return the estimates that LibAUC's unimodal loss (GCLoss_v1) has saved, given the positive pairs' similarities.

    GCLoss_v1 averages exp(s_ij / tau) and not exp((s_ij - s_ii) / tau). It stores one table, the mean of the estimates
    of each sample's two views. Use the result as the estimates of both views in `unimodal_contrastive_step`.

    Parameters
    ----------
    u : array, shape (n,) or (n, 1)
        The table, float32 or wider; 0 means never visited.
    temperature : float or array of shape (), (n,) or (n, 1)
        tau > 0, a single temperature for all samples or one temperature per sample.
    positive_similarity : array, shape (n,) or (n, 1)
        The cosine of each sample's two views, in the table's dtype, in [-1, 1] up to rounding. If it is computed from
        the features of today, the result is the estimate from which GCLoss_v1 itself would continue. Entries of samples
        that were never visited are not read.
    xp : namespace, optional
        The arrays' namespace.

    Returns
    -------
    array, shape (n,)
        log u - s / tau with s the similarity; ``-inf`` for samples that were never visited.

    Raises
    ------
    TypeError, ValueError
        If `positive_similarity` is missing, or an argument has a wrong type or shape or lies outside its interval.

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
    call = _check_tables(tables | ({"temperature": temperature} if own else {}), xp)
    xp = call.xp
    call.values("u", u, FINITE_NOT_NEGATIVE)
    if own:
        call.values("temperature", temperature, POSITIVE)
        temperature = _flat(temperature, xp)
    else:
        temperature = _validate.static_number("temperature", temperature, POSITIVE)
        _validate.fits("temperature", temperature, POSITIVE, u.dtype, xp)
    # g = u exp(-s / tau)
    u = _flat(u, xp)
    return log(u, xp=xp) - _usable(call, _flat(similarity, xp), u > 0) / temperature


def _require(name: str, array: Array | None, why: str) -> Array:
    """Check that an argument was passed, and return it. `why` says why no table can replace the argument."""
    if array is None:
        raise ValueError(f"{name} must be given, because {why}, got None")
    return array


def _check_tables(tables: dict[str, Array], xp: Namespace | None) -> Call:
    """Check everything but the values of tables that belong together, and return them as a `Call`."""
    call = _validate.arrays(tables, xp)
    (first, table), *rest = tables.items()
    call.array(first, STATE)
    if table.ndim not in (1, 2) or table.shape[1:] not in ((), (1,)):
        raise ValueError(f"{first} must have shape (num_samples,) or (num_samples, 1), got {tuple(table.shape)}")
    call.same_dtype(*tables)
    for name, other in rest:
        if tuple(other.shape) not in ((table.shape[0],), (table.shape[0], 1)):
            raise ValueError(
                f"{name} must have one row per row of {first} ({table.shape[0]}), got shape {tuple(other.shape)}"
            )
    return call


def _flat(table: Array, xp: Namespace) -> Array:
    """Return a table (n,) or (n, 1) as (n,)."""
    return xp.reshape(table, (-1,))


def _usable(call: Call, similarity: Array, visited: Array) -> Array:
    """Return the similarities of the visited samples after checking them, and 0 elsewhere."""
    similarity = call.xp.where(visited, similarity, call.xp.zeros_like(similarity))
    call.values("positive_similarity", similarity, COSINE)
    return similarity


def _without_eps(call: Call, similarity: Array | None, batch_size: int, eps: float) -> Array:
    """Return log g from ``log_u = log(eps + (B - 1) / B g) - s``."""
    xp = call.xp
    log_u = _flat(call.arrays["log_u"], xp)
    batch_size = _validate.integer("batch_size", batch_size, minimum=2)
    eps = _validate.static_number("eps", eps, NOT_NEGATIVE)
    visited = xp.isfinite(log_u) & (log_u != 0)
    log_u = xp.where(visited, log_u, xp.zeros_like(log_u))
    # Step 1: add s, so that log_u = log(eps + (B - 1) / B g).
    if similarity is not None:
        log_u = log_u + _usable(call, _flat(similarity, xp), visited)
    correction = math.log(batch_size / (batch_size - 1))
    if eps == 0:
        return xp.where(visited, log_u + correction, -xp.inf)
    # Step 2: subtract eps without leaving the logarithms. The entries of a table are exact to a few units of their last
    # place. If a stored sum differs from eps by no more than these units, nothing is left of the estimate.
    slack = 16 * float(xp.finfo(log_u.dtype).eps) * max(1.0, abs(math.log(eps)))
    words = f"be at least log eps = {math.log(eps):.6g}, because eps was added to every stored estimate"
    above = Rule(words, low=math.log(eps) - slack, includes_low=True, includes_high=True)
    name = "log_u" if similarity is None else "log_u + positive_similarity"
    call.values(name, xp.where(visited, log_u, xp.inf), above)
    share = math.log(eps) - log_u  # logarithm of the share of eps in the stored sum
    remains = visited & (share < -slack)
    # log(e^x - eps) = x + log(1 - eps e^-x). If nothing remains, `share` is set to -1 to avoid log(0).
    share = xp.where(remains, share, xp.full_like(share, -1.0))
    # Step 3: the factor B / (B - 1).
    return xp.where(remains, log_u + xp.log1p(-xp.exp(share)) + correction, -xp.inf)
