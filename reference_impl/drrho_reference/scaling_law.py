"""The scaling law error = floor + prefactor * compute^(-exponent): a fit by least squares, and bootstrap intervals.

Source: the power law of error in compute that DRRho, arXiv 2505.06699, reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import BoolArray, FloatArray, mask, number, raw_array, real_array, whole_number

__all__ = ["ScalingLaw", "fit_scaling_law"]

Interval = tuple[float, float]


class ScalingLaw(NamedTuple):
    """The fitted law error = floor + prefactor * compute^(-exponent), bootstrap intervals, and the fitted points.

    ``residual`` is the root of the mean square of the residuals, in natural logarithms of the error; ``fitted`` marks
    the points that were fitted.
    """

    prefactor: float
    exponent: float
    floor: float
    prefactor_interval: Interval
    exponent_interval: Interval
    floor_interval: Interval
    residual: float
    fitted: BoolArray


def fit_scaling_law(
    compute: npt.ArrayLike,
    error: npt.ArrayLike,
    /,
    *,
    with_floor: bool = False,
    where: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> ScalingLaw:
    """Fit error = e0 + a C^(-beta) by least squares in the logarithm of the error.

    Parameters
    ----------
    compute : array (n,)
        C of every run, above 0.
    error : array (n,)
        The errors of the same runs, above 0.
    with_floor : bool
        With False e0 is 0, and the law is a straight line in logarithms. With True e0 is fitted too, with
        0 <= e0 < the smallest error.
    where : array (n,) of bool, optional
        The points to fit: at least 3, or at least 4 if ``with_floor`` is True. Other points are never read.
    confidence : float
        The share of bootstrap fits inside an interval, in (0, 1).
    num_resamples : int
        The number of bootstrap fits, at least 2. A fit with a floor takes some milliseconds.
    seed : int
        The seed of the bootstrap's random numbers.

    Returns
    -------
    ScalingLaw
        a, beta and e0, each with an interval; the size of the residuals; and a mask of the points that were fitted.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, values leave their domains, there are too few points, or all points have the same
        compute.

    Notes
    -----
    The residuals of a fit are too small on average, because the fit minimises them. So they are multiplied by
    sqrt(n / (n - m)), where m, the number of fitted parameters, is 2, or 3 with a floor. The bootstrap draws from these
    residuals with replacement, adds the draws to the fitted logarithms of the error, and fits again. An interval leaves
    out the share (1 - confidence) / 2 of these fits on either side. Source: the power law of error in compute
    that DRRho, arXiv 2505.06699, reports.

    Examples
    --------
    >>> law = fit_scaling_law([1.0, 4.0, 16.0, 64.0], [8.0, 4.0, 2.0, 1.0], num_resamples=2)
    >>> round(law.prefactor, 6), round(law.exponent, 6), law.floor, law.fitted.tolist()
    (8.0, 0.5, 0.0, [True, True, True, True])
    """
    compute, error = raw_array("compute", compute), raw_array("error", error)
    if compute.ndim != 1 or len(compute) == 0:
        raise ValueError(f"compute must have one axis that is not empty, got the shape {compute.shape}")
    if error.shape != compute.shape:
        raise ValueError(f"error must have the shape {compute.shape}, got {error.shape}")
    fitted = mask("where", True if where is None else where, compute.shape)
    C, e = real_array("compute", compute[fitted]), real_array("error", error[fitted])
    if not isinstance(with_floor, bool):
        raise TypeError(f"with_floor must be True or False, got {with_floor!r}")
    parameters = 3 if with_floor else 2
    if len(C) <= parameters:
        raise ValueError(f"compute must have at least {parameters + 1} points to fit, got {len(C)}")
    for argument, values in (("compute", C), ("error", e)):
        if values.min() <= 0.0:
            raise ValueError(f"{argument} must be positive, got {values.min()}")
    if len(set(C.tolist())) < 2:
        raise ValueError(f"compute must have at least 2 different values, got {sorted(set(C.tolist()))}")
    confidence, num_resamples = number("confidence", confidence), whole_number("num_resamples", num_resamples, 2)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")

    fit = _fit_with_floor if with_floor else _fit_line
    # The fit, and the residuals in natural logarithms of the error.
    prefactor, exponent, floor = fit(np.log(C), e)
    line = np.log(floor + prefactor * C**-exponent)
    residuals = np.log(e) - line
    # Bootstrap: residuals times sqrt(n / (n - parameters)) are drawn with replacement and added to the fit.
    rng = np.random.default_rng(whole_number("seed", seed, 0))
    wide = math.sqrt(len(C) / (len(C) - parameters)) * residuals
    fits = [fit(np.log(C), np.exp(line + rng.choice(wide, size=len(C)))) for _ in range(num_resamples)]
    prefactors, exponents, floors = zip(*fits, strict=True)
    return ScalingLaw(
        prefactor=prefactor,
        exponent=exponent,
        floor=floor,
        prefactor_interval=_interval(prefactors, confidence),
        exponent_interval=_interval(exponents, confidence),
        floor_interval=_interval(floors, confidence),
        residual=math.sqrt(math.fsum(residuals**2) / len(C)),
        fitted=np.array(fitted),
    )


def _interval(values: Sequence[float], confidence: float) -> Interval:
    """Return the interval that leaves out the share (1 - confidence) / 2 of the values on either side."""
    low, high = np.quantile(values, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)


def _fit_line(log_compute: FloatArray, error: FloatArray) -> tuple[float, float, float]:
    """Fit log e = log a - beta log C by least squares, slope = cov(log C, log e) / var(log C); return a, beta and 0."""
    log_error = np.log(error)
    # Both logarithms are centred, so that the sums lose no digits.
    x, y = log_compute - log_compute.mean(), log_error - log_error.mean()
    slope = math.fsum(x * y) / math.fsum(x * x)
    return math.exp(log_error.mean() - slope * log_compute.mean()), -slope, 0.0


def _fit_with_floor(log_compute: FloatArray, error: FloatArray) -> tuple[float, float, float]:
    """Return a, beta and e0: the best e0 of a grid is improved by golden-section search.

    For each floor the best a and beta are computed, so the misfit is a function of the floor alone.
    """

    def misfit(floor: float) -> float:
        return _fit_above(log_compute, error, floor)[2]

    # A grid in [0, smallest error) brackets the smallest misfit; golden sections shrink the bracket.
    grid = [0.05 * step * float(error.min()) for step in range(20)] + [float(error.min()) * (1.0 - 1e-9)]
    best = min(range(len(grid)), key=lambda step: misfit(grid[step]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-7 * float(error.min()):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if misfit(left) <= misfit(right):
            high = right
        else:
            low = left
    floor = min((low, 0.5 * (low + high), high), key=misfit)  # low may be exactly 0, the right floor of a power law
    a, beta, _ = _fit_above(log_compute, error, floor)
    return a, beta, floor


def _fit_above(log_compute: FloatArray, error: FloatArray, floor: float) -> tuple[float, float, float]:
    """Minimise the sum of squares of log e - log(e0 + a C^-beta) for a given e0; return a, beta and this sum.

    The method is Gauss-Newton. It starts from the straight line fitted to log(e - e0), which is the answer if e0 = 0.
    With q = a C^-beta and m = e0 + q the derivatives of log m are q / m in log a and -(q / m) log C in beta.
    """
    a, beta, _ = _fit_line(log_compute, error - floor)
    parameters = np.array([math.log(a), beta])

    def residuals(at: FloatArray) -> FloatArray:
        with np.errstate(over="ignore", divide="ignore"):  # a step that is far too long gives inf, and is halved
            miss: FloatArray = np.log(error) - np.log(floor + np.exp(at[0] - at[1] * log_compute))
        return miss

    def misfit(at: FloatArray) -> float:
        return math.fsum(miss**2 for miss in residuals(at))

    for _ in range(100):
        # Gauss-Newton: a linear least-squares problem in the change of (log a, beta).
        q = np.exp(parameters[0] - parameters[1] * log_compute)
        share = q / (floor + q)
        step = np.linalg.lstsq(np.stack([share, -share * log_compute], axis=1), residuals(parameters), rcond=None)[0]
        # A step that increases the misfit is halved; a short step in this direction decreases it.
        while misfit(parameters + step) > misfit(parameters) and np.any(np.abs(step) > 1e-12):
            step = step / 2.0  # the step was too long
        if np.all(np.abs(step) <= 1e-12):
            break
        parameters = parameters + step
    return math.exp(parameters[0]), float(parameters[1]), misfit(parameters)
