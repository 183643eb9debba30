"""Problems, answers and tolerances that the tests of the ambiguity sets share.

Problems are rows of one array. A library is called once for many problems, always with the same shape, so that jax.jit
compiles once per set.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import drrho_jax  # noqa: F401  (registers a loop: jitted solvers compile quickly)
import drrho_reference
import jax
import numpy as np

from drrho_core import (
    AmbiguitySet,
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    WorstCase,
    worst_case,
)

jax.config.update("jax_enable_x64", True)

ROWS, N = 24, 6
# Under jit only the first set of each kind is compiled.
SETS: dict[str, list[AmbiguitySet]] = {
    "CVaR": [CVaR(0.3), CVaR(0.5), CVaR(1 / 3), CVaR(1.0), CVaR(1e-3), CVaR(1e-300)],
    "KLPenalty": [KLPenalty(0.5), KLPenalty(1e-3), KLPenalty(1e4)],
    "CappedKLPenalty": [
        CappedKLPenalty(*parameters)
        for parameters in (
            *((0.5, 0.3), (0.5, 0.5), (1e-3, 1 / 3), (1e4, 0.9), (0.5, 1.0), (1e6, 1.0), (0.5, 1e-3)),
            *((1e-30, 0.4), (1e30, 0.4), (0.3, 1 - 1e-9)),
        )
    ],
    "KLBall": [KLBall(0.2), KLBall(0.0), KLBall(1e-6), KLBall(0.6), KLBall(math.log(3)), KLBall(300.0)],
    "ChiSquarePenalty": [ChiSquarePenalty(0.5), ChiSquarePenalty(1e-3), ChiSquarePenalty(20.0)],
    "ChiSquareBall": [ChiSquareBall(r) for r in (0.3, 0.0, 1e-6, 0.02, 0.5, 1.0, 1e300)],
    "CressieReadBall": [
        CressieReadBall(*parameters)
        for parameters in (
            *((3.0, 0.2), (1.001, 0.3), (1.5, 0.4), (2.0, 0.5), (5.0, 0.05), (20.0, 0.01), (1.5, 1e-6), (3.0, 0.0)),
            *((1 + 1e-12, 0.3), (3.0, 0.5)),
        )
    ],
}
EXTREMES = [CressieReadBall(*parameters) for parameters in ((100.0, 1e-3), (1e6, 1e-9), (1e200, 0.1), (3.0, 1e300))]
KINDS = list(SETS)
ALL = [*(ambiguity_set for sets in SETS.values() for ambiguity_set in sets), *EXTREMES]
BALLS = ("KLBall", "ChiSquareBall", "CressieReadBall")


def tolerance(space: Any) -> float:
    return 1e-10 if space.dtype_name == "float64" else 1e-5


@functools.cache
def compiled(jit: Callable[..., Any], ambiguity_set: AmbiguitySet) -> Callable[..., Any]:
    return jit(lambda losses, where: worst_case(losses, ambiguity_set, where=where))


def solve(space: Any, ambiguity_set: AmbiguitySet, losses: Any, where: Any = None) -> WorstCase:
    """Solve one or several problems, rows of losses, in a space; return the answers in NumPy float64.

    Rows of zeros are added up to the number of rows that is compiled.
    """
    losses = np.asarray(losses, dtype=float)
    rows, masks = np.zeros((ROWS, N)), np.ones((ROWS, N), dtype=bool)
    rows[: losses.size // N] = losses
    masks[: losses.size // N] = True if where is None else where
    x, mask = space.asarray(rows), space.asarray(masks)
    if space.jit is None:
        worst = worst_case(x, ambiguity_set, where=mask)
    else:
        worst = compiled(space.jit, ambiguity_set)(x, mask)
    for array, shape in zip(flat(worst), [(ROWS,), (ROWS, N), (ROWS,), (ROWS,)], strict=True):
        assert (tuple(array.shape), array.dtype, array.device) == (shape, x.dtype, x.device)
    risk, weights, nu, scale = (
        np.asarray(space.to_numpy(a), dtype=np.float64)[: losses.size // N].reshape(losses.shape[:-1] + a.shape[1:])
        for a in flat(worst)
    )
    return WorstCase(risk, weights, (nu, scale))


def flat(worst: WorstCase) -> tuple[Any, ...]:
    return worst.risk, worst.weights, *worst.dual


@functools.cache
def problem_rows() -> tuple[np.ndarray, np.ndarray]:
    """Return losses of every kind, one problem per row, and a mask; entries outside the mask are nan or infinite."""
    rng = np.random.default_rng(20)
    x, where = rng.normal(size=(ROWS, N)), np.ones((ROWS, N), dtype=bool)
    x[2:5] = rng.integers(-1, 3, size=(3, N))  # ties
    x[5] = -0.7  # all equal
    x[6] = [1.0, 1.001, -2.0, 1.0, -2.5, -2.0]  # close together above a gap
    x[7] = [0.0, -1e-3, -1.0, -30.0, -1000.0, -1e4]
    x[8:10] = -5 - rng.exponential(size=(2, N))  # all negative
    x[10:12] += 1e3
    x[12] -= 1e6
    x[13:15] *= 1e-30
    x[15:17] *= 1e30
    x[17] = rng.standard_t(1.5, size=N)
    where[18] = [False, False, True, False, False, False]  # n = 1
    where[19] = [True, False, True, False, False, False]
    where[20:] = rng.random((ROWS - 20, N)) < 0.6
    where[20:, 3] = True
    x[22] = np.round(x[22])
    x[18:][~where[18:]] = rng.choice([np.nan, np.inf, -np.inf], size=(~where).sum())
    return x, where


@functools.cache
def oracle_rows(ambiguity_set: AmbiguitySet, dtype: str) -> list[Any]:
    """Return the answers of the oracle, the NumPy implementation, for all rows after rounding to the dtype."""
    x, where = problem_rows()
    rounded = np.asarray(x, dtype=dtype).astype(np.float64)
    oracle_set = getattr(drrho_reference, type(ambiguity_set).__name__)(*dataclasses.astuple(ambiguity_set))
    return [drrho_reference.worst_case(rounded[i], oracle_set, where=where[i]) for i in range(ROWS)]


def sets_for(space: Any, kind: str) -> list[AmbiguitySet]:
    return SETS[kind] if space.jit is None else SETS[kind][:1]


def dual_value(ambiguity_set: AmbiguitySet, x: np.ndarray, nu: float, s: float) -> float:
    """Evaluate the dual objective of docs/theory, ``nu + s radius + s mean phi*((x - nu) / s)``, at a pair (nu, s)."""
    kind = type(ambiguity_set).__name__
    if kind == "CVaR":
        return nu + np.maximum(x - nu, 0).mean() / ambiguity_set.alpha
    if s == 0:
        return nu
    if math.isinf(s):
        return float(x.mean())
    y = (x - nu) / s
    if kind.startswith("KL"):
        conjugate = np.expm1(y)
    elif kind == "CappedKLPenalty":
        log_cap = -math.log(ambiguity_set.alpha)
        conjugate = np.expm1(np.minimum(y, log_cap)) + np.maximum(y - log_cap, 0) / ambiguity_set.alpha
    else:
        k = getattr(ambiguity_set, "order", 2.0)
        inside = (k - 1) * y > -1
        power = np.expm1(k / (k - 1) * np.log1p(np.where(inside, (k - 1) * y, 0.0)))
        conjugate = np.where(inside, power, -1.0) / k
    radius = ambiguity_set.radius if kind in BALLS else 0.0
    return float(nu + s * radius + s * conjugate.mean())


def divergence(ambiguity_set: AmbiguitySet, weights: np.ndarray) -> float:
    """Return D(p || 1/n) with the function phi of the ball."""
    t = weights * len(weights)
    if isinstance(ambiguity_set, KLBall):
        phi = np.where(t > 0, t * np.log(np.where(t > 0, t, 1.0)), 0.0) - t + 1
    else:
        k = getattr(ambiguity_set, "order", 2.0)
        phi = (t**k - k * t + k - 1) / (k * (k - 1))
    return float(phi.mean())
