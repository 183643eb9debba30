"""The scaling law: error as a power of compute, fitted by least squares with bootstrap intervals.

    error = floor + prefactor * compute^(-exponent)

The floor is an error that remains however large the compute is. The fit minimises the sum of squared residuals in
natural logarithms of the error. Without a floor this is the fit of a straight line to the logarithms of compute and
error. With a floor SciPy minimises over all three parameters. The fit is meant for finished runs: it reads values on
the host and cannot be traced. Docs: docs/theory/measuring.md, "Does it scale?".

Source: published fits of Model Steering / DRRho (arXiv 2505.06699, code).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from array_api_compat import array_namespace

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, device_of, wide_dtype
from drrho_core._validate import BOOLEAN, OPEN_UNIT_INTERVAL
from drrho_core.numerics import log


class ScalingLaw(NamedTuple):
    """Result of `fit_scaling_law`: ``error = floor + prefactor * compute ** -exponent``.

    All arrays except `fitted` have shape ().

    Attributes
    ----------
    prefactor, exponent, floor : array
        The fitted parameters. The floor is 0 if no floor was fitted.
    prefactor_interval, exponent_interval, floor_interval : tuple of two arrays
        Ends of the bootstrap intervals.
    residual : array
        Root mean square of the residuals, in natural logarithms of the error: 0.01 is about one percent.
    fitted : array of bool, shape (n,)
        The points that were fitted.
    """

    prefactor: Array
    exponent: Array
    floor: Array
    prefactor_interval: tuple[Array, Array]
    exponent_interval: tuple[Array, Array]
    floor_interval: tuple[Array, Array]
    residual: Array
    fitted: Array


def fit_scaling_law(
    compute: Array,
    error: Array,
    /,
    *,
    with_floor: bool = False,
    where: Array | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    xp: Namespace | None = None,
) -> ScalingLaw:
    """Fit ``error = a C^-beta``, or ``error = e0 + a C^-beta``, and estimate intervals of the parameters.

    Parameters
    ----------
    compute : array, shape (n,)
        C > 0, such as GFLOP x samples. The fitted points must have at least two different values.
    error : array, shape (n,)
        Errors > 0 as fractions, in the same dtype. The fit is computed in float64.
    with_floor : bool
        If True, a floor e0 is fitted, ``0 <= e0 < the smallest error``. A floor needs at least one more point, and many
        points for a narrow interval.
    where : array of bool, shape (n,), optional
        Marks the points to fit: at least 3 points, or 4 points with a floor. Other points are not read.
    confidence : float
        Confidence of the intervals, in (0, 1).
    num_resamples : int
        Number of resamples of the bootstrap, at least 2.
    seed : int
        Seed of the bootstrap: the same seed gives the same intervals on every library.
    xp : namespace, optional
        The arrays' namespace.

    Returns
    -------
    ScalingLaw
        Estimates, intervals and the points that were fitted.

    Raises
    ------
    ImportError
        If SciPy is not installed. The extra `train` installs it.
    TypeError, ValueError
        If an argument breaks these rules. Values are read, so the function cannot be traced.

    Notes
    -----
    The fit is least squares on the logarithm of the error. With a floor, `scipy.optimize.least_squares` computes the
    fit from several starting floors. Intervals are percentiles of a residual bootstrap (`scipy.stats.bootstrap`):
    residuals are scaled by ``sqrt(n / (n - parameters))``, drawn with replacement and added to the fitted values, and
    the sums are fitted again. The published fits are 5.77 C^-0.116 for OpenCLIP and 7.15 C^-0.127 for DRRho-CLIP
    (arXiv 2505.06699, code).

    Examples
    --------
    >>> import numpy as np
    >>> compute = np.asarray([1e8, 1e9, 1e10, 1e11])
    >>> law = fit_scaling_law(compute, 5.77 * compute**-0.116)
    >>> round(float(law.prefactor), 6), round(float(law.exponent), 6), law.fitted.tolist()
    (5.77, 0.116, [True, True, True, True])
    """
    call = _validate.arrays({"compute": compute, "error": error}, xp, options={"where": where})
    xp = call.xp
    for name in ("compute", "error"):
        call.array(name, axes=1, meaning="(num_points,)")
    call.same_dtype("compute", "error")
    n = int(compute.shape[0])
    call.array("error", shape=(n,), meaning="(num_points,)")
    if where is not None:
        call.array("where", BOOLEAN)
        _validate.mask("where", where, "compute", compute, xp)
        where = xp.broadcast_to(where, (n,))
    if not isinstance(with_floor, bool):
        raise TypeError(f"with_floor must be True or False, got {_validate.describe(with_floor)}")
    confidence = _validate.static_number("confidence", confidence, OPEN_UNIT_INTERVAL)
    num_resamples = _validate.integer("num_resamples", num_resamples, minimum=2)
    seed = _validate.integer("seed", seed, minimum=0)
    device, dtype = device_of(compute), wide_dtype(compute.dtype, xp)
    fitted = xp.ones((n,), dtype=xp.bool, device=device) if where is None else where
    positions = [position for position in range(n) if bool(fitted[position])]
    needed = 4 if with_floor else 3
    if len(positions) < needed:
        raise ValueError(f"compute must have at least {needed} points to fit, got {len(positions)}")
    points = {name: _points(name, array, positions) for name, array in (("compute", compute), ("error", error))}
    if math.log(max(points["compute"])) == math.log(min(points["compute"])):
        raise ValueError("compute must have at least two different values at the fitted points, got one")
    estimates = _fit(points["compute"], points["error"], with_floor, confidence, num_resamples, seed)
    results = [xp.asarray(float(value), dtype=dtype, device=device) for value in estimates]
    prefactor, exponent, floor, *ends, residual = results
    return ScalingLaw(
        prefactor=prefactor,
        exponent=exponent,
        floor=floor,
        prefactor_interval=(ends[0], ends[1]),
        exponent_interval=(ends[2], ends[3]),
        floor_interval=(ends[4], ends[5]),
        residual=residual,
        fitted=fitted,
    )


# The functions below fit data sets y (..., n) at x (n,). A data set holds the logarithms of n errors. All data sets
# share x, the logarithms of compute minus their mean. A fit is (level, slope, floor), each of shape (...), and predicts
# log error = log(floor + exp(level - slope x)).

Fit: TypeAlias = Callable[[Array, Array, tuple[float, ...], Namespace], tuple[Array, Array, Array]]


def _points(name: str, array: Array, positions: list[int]) -> list[float]:
    """Return the numbers of the fitted points, after checking that they are finite and positive."""
    numbers = [float(array[position]) for position in positions]
    for position, number in zip(positions, numbers, strict=True):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {number} at position {position}")
    return numbers


def _fit(
    compute: list[float],
    error: list[float],
    with_floor: bool,
    confidence: float,
    num_resamples: int,
    seed: int,
) -> tuple[float, ...]:
    """Return prefactor, exponent and floor, both ends of their intervals, and the root mean square of the residuals."""
    try:
        from scipy import special, stats
    except ImportError as missing:
        raise ImportError("fit_scaling_law needs SciPy: pip install 'drrho-core[train]'") from missing
    # y = log error, and x = log C minus the mean of log C. xlogy(1, c) returns log c as an array of the library that
    # SciPy uses.
    x, y = special.xlogy(1.0, compute), special.xlogy(1.0, error)
    xp = array_namespace(x)
    centre = xp.mean(x)
    x = x - centre

    # The fit, with residuals in natural logarithms of the error.
    fit_all: Fit = _fit_floor if with_floor else _fit_line
    level, slope, floor = fit_all(x, y, (0.0, 0.5, 0.9), xp)
    value = _predict(x, level, slope, floor, xp)
    residuals = y - value

    # The residuals of a fit are too small, on average by the factor sqrt((n - parameters) / n).
    parameters = 3 if with_floor else 2
    spread = residuals * math.sqrt(len(compute) / (len(compute) - parameters))

    def refit(resampled: Array, axis: int) -> Array:  # noqa: ARG001  (SciPy passes the axis; it is always the last)
        # The rows are log prefactor, exponent and floor. Percentiles of the logarithm do not overflow.
        levels, slopes, floors = fit_all(x, value + resampled, (0.5,), xp)
        return xp.stack([levels + slopes * centre, slopes, floors])

    bootstrap = stats.bootstrap(
        (spread,),
        refit,
        n_resamples=num_resamples,
        confidence_level=confidence,
        method="percentile",
        vectorized=True,
        random_state=seed,
    )
    low, high = bootstrap.confidence_interval
    return (
        *(xp.exp(level + slope * centre), slope, floor),
        *(xp.exp(low[0]), xp.exp(high[0]), low[1], high[1], low[2], high[2]),
        xp.sqrt(xp.mean(residuals * residuals)),
    )


def _predict(x: Array, level: Array, slope: Array, floor: Array, xp: Namespace) -> Array:
    """Return the logarithm of the predicted error at the points of one data set; (n,)."""
    return xp.logaddexp(log(xp.asarray(floor), xp=xp) + xp.zeros_like(x), level - slope * x)


def _fit_line(x: Array, y: Array, _starts: tuple[float, ...], xp: Namespace) -> tuple[Array, Array, Array]:
    """Fit each data set without a floor: a straight line, in closed form."""
    slope = -xp.sum(x * y, axis=-1) / xp.sum(x * x)
    level = xp.mean(y, axis=-1)
    return level, slope, xp.zeros_like(level)


def _fit_floor(x: Array, y: Array, starts: tuple[float, ...], xp: Namespace) -> tuple[Array, Array, Array]:
    """Fit each data set with a floor. The starting floors are `starts` times the smallest error of the data set."""
    fits = [_least_squares(x, row, starts, xp) for row in xp.reshape(y, (-1, y.shape[-1]))]
    level, slope, floor = (xp.reshape(xp.asarray(column), y.shape[:-1]) for column in zip(*fits, strict=True))
    return level, slope, floor


def _least_squares(x: Array, y: Array, starts: tuple[float, ...], xp: Namespace) -> tuple[float, float, float]:
    """Return the best (level, slope, floor) of several fits by a trust-region method, one fit per starting floor."""
    from scipy import optimize

    log_smallest = float(xp.min(y))

    def residual(at: Array) -> Array:
        level, slope, share = at
        return _predict(x, level, slope, share * math.exp(log_smallest), xp) - y

    def jacobian(at: Array) -> Array:
        # With q = exp(level - slope x) and m = floor + q, the derivatives of log m are q / m with respect to level,
        # -x q / m with respect to slope, and smallest error / m with respect to share = floor / smallest error.
        level, slope, share = at
        log_m = _predict(x, level, slope, share * math.exp(log_smallest), xp)
        part = xp.exp(level - slope * x - log_m)
        return xp.stack([part, -x * part, xp.exp(log_smallest - log_m)], axis=1)

    def solve(share: float) -> Any:
        # Start from the straight line through log(error - floor). The difference counts as at least 5 % of the error.
        above = xp.maximum(xp.exp(y) - share * math.exp(log_smallest), 0.05 * xp.exp(y))
        level, slope, _ = _fit_line(x, xp.log(above), (), xp)
        return optimize.least_squares(
            residual,
            [float(level), float(slope), share],
            jac=jacobian,
            bounds=([-math.inf, -math.inf, 0.0], [math.inf, math.inf, 1 - 1e-9]),
            method="dogbox",
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
        )

    best = min((solve(share) for share in starts), key=lambda candidate: candidate.cost)
    level, slope, share = map(float, best.x)
    return level, slope, share * math.exp(log_smallest)
