"""The proof of the ambiguity sets: 264 random problems for each, by three routes that share nothing with the solvers.

- A convex solver (cvxpy, clarabel) on the primal problem as it is written in the theory: risk 1e-6, weights 1e-4.
- The duality gap. The weights, if they are feasible, bound the risk from below, the dual variables from above, whoever
  found them. Both bounds are evaluated in numbers of 50 digits, and must meet within 1e-10 of the largest loss.
- The solution itself in 50 digits, by bisection on the condition that defines it.

Run as a program, this file prints the worst error per set, library and dtype over all these problems:

    python tests/core/test_ambiguity_proof.py [--library numpy --library torch --library jax]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cvxpy as cp
import mpmath as mp
import numpy as np
import pytest

from drrho_core.ambiguity import (
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

KINDS: dict[str, type[AmbiguitySet]] = {
    kind.__name__: kind
    for kind in (CVaR, KLPenalty, KLBall, ChiSquarePenalty, ChiSquareBall, CressieReadBall, CappedKLPenalty)
}
ROWS, LONGEST = 24, 12
SIZES = (1, 2, 3, 4, 6, 9, 12)
ORDERS = (1.001, 1.2, 1.5, 2.0, 3.0, 5.0)
BALLS = (KLBall, ChiSquareBall, CressieReadBall)
DIGITS = 50


# ---------------------------------------------------------------------------------------------------------------------
# The problems
# ---------------------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Problems with one set, as rows; what does not count is nan. All losses are exact in float32."""

    ambiguity_set: AmbiguitySet
    losses: np.ndarray  # (ROWS, LONGEST)
    where: np.ndarray

    def values(self, row: int) -> np.ndarray:
        return self.losses[row][self.where[row]]


STYLES: tuple[Callable[[np.random.Generator, int], np.ndarray], ...] = (
    lambda rng, n: rng.normal(size=n),
    lambda rng, n: rng.normal(size=n) + 2,
    lambda rng, n: rng.integers(-24, 25, size=n) / 16,  # some ties
    lambda rng, n: rng.integers(-1, 3, size=n).astype(float),  # many
    lambda rng, n: np.full(n, rng.normal()),  # nothing but ties
    lambda rng, n: -5 - rng.exponential(size=n),  # all negative
    lambda rng, n: rng.normal(size=n) + 1e3,
    lambda rng, n: rng.normal(size=n) - 1e3,
    lambda rng, n: rng.standard_t(2.0, size=n),
    lambda rng, n: rng.normal(size=n) / 32 - 8 * rng.integers(0, 2, size=n),  # two plateaus
    lambda rng, n: rng.normal(size=n) / 128,
    lambda rng, n: rng.uniform(size=n) ** 4 - 0.1,
)


def parameters(kind: str, rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Eleven of them, the ends of the domain among them."""
    if kind == "CVaR":
        return [(alpha,) for alpha in (1.0, 0.5, 1 / 3, 0.05, *rng.uniform(size=7))]
    if kind == "CappedKLPenalty":
        temperatures = (1e-3, 0.1, 10.0, 1e3, *np.exp(rng.uniform(np.log(0.03), np.log(2.0), size=7)))
        return [*zip(temperatures, (0.5, 1 / 3, 0.9, 0.5, 1.0, 0.05, *rng.uniform(size=5)), strict=True)]
    small_and_large = [*np.exp(rng.uniform(np.log(0.03), np.log(2.0), size=7))]
    if kind.endswith("Penalty"):
        return [(strength,) for strength in (1e-3, 0.1, 10.0, 1e3, *small_and_large)]
    radii = [0.0, 1e-5, 0.5, 6.0, *small_and_large]
    if kind == "CressieReadBall":
        return [(ORDERS[n % len(ORDERS)], radius) for n, radius in enumerate(radii)]
    return [(radius,) for radius in radii]


@functools.cache
def groups(kind: str) -> tuple[Group, ...]:
    rng = np.random.default_rng([2025, list(KINDS).index(kind)])
    result = []
    for number, own in enumerate(parameters(kind, rng)):
        scale = {9: 1e-30, 10: 1e30}.get(number, 1.0)
        losses = np.full((ROWS, LONGEST), np.nan)
        for row in range(ROWS):
            n = int(rng.choice(SIZES))
            losses[row, :n] = scale * STYLES[row % len(STYLES)](rng, n)
            losses[row] = rng.permutation(losses[row])
        if kind.endswith("Penalty"):
            own = (own[0] * scale, *own[1:])
        losses = losses.astype(np.float32).astype(np.float64)
        result.append(Group(KINDS[kind](*map(float, own)), losses, ~np.isnan(losses)))
    return tuple(result)


def everything(kind: str) -> list[tuple[AmbiguitySet, np.ndarray, WorstCase]]:
    """Each problem of a kind with the core's answer in NumPy float64."""
    return [
        (group.ambiguity_set, group.values(row), solved(group, row)) for group in groups(kind) for row in range(ROWS)
    ]


@functools.cache
def _worst(kind: str, ambiguity_set: AmbiguitySet) -> WorstCase:
    (group,) = (group for group in groups(kind) if group.ambiguity_set == ambiguity_set)
    return worst_case(group.losses, ambiguity_set, where=group.where)


def solved(group: Group, row: int) -> WorstCase:
    worst = _worst(type(group.ambiguity_set).__name__, group.ambiguity_set)
    return WorstCase(worst.risk[row], worst.weights[row][group.where[row]], (worst.dual[0][row], worst.dual[1][row]))


# ---------------------------------------------------------------------------------------------------------------------
# A convex solver
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def convex_problem(kind: str, order: float, n: int) -> tuple[cp.Problem, cp.Variable, list[cp.Parameter]]:
    """The primal problem as it is written in the theory, compiled once: losses and size of the set are parameters."""
    p, losses, size, cap = cp.Variable(n, nonneg=True), cp.Parameter(n), *(cp.Parameter(nonneg=True) for _ in range(2))
    constraints, objective = [cp.sum(p) == 1], losses @ p
    if kind in ("CVaR", "CappedKLPenalty"):
        constraints.append(p <= cap)
    if kind != "CVaR":
        if "KL" in kind:
            divergence = cp.sum(cp.kl_div(n * p, np.ones(n))) / n
        elif kind.startswith("ChiSquare"):
            divergence = cp.sum_squares(n * p - 1) / (2 * n)
        else:
            divergence = (cp.sum(cp.power(n * p, order)) / n - 1) / (order * (order - 1))
        if kind.endswith("Penalty"):
            objective = objective - size * divergence
        else:
            constraints.append(divergence <= size)
    return cp.Problem(cp.Maximize(objective), constraints), p, [losses, size, cap]


def by_convex_solver(ambiguity_set: AmbiguitySet, x: np.ndarray) -> tuple[float, np.ndarray] | None:
    """Risk and weights, or None where the problem has no interior or a size that the solver is not made for.

    The solver stops at absolute errors, so it gets ``(x - mean) / spread``, which is the same problem.
    """
    *rest, size = dataclasses.astuple(ambiguity_set)
    n, middle, cap = len(x), float(x.mean()), 1.0
    spread = float(np.abs(x - middle).max()) or 1.0
    if isinstance(ambiguity_set, (CVaR, CappedKLPenalty)):
        cap = 1 / (ambiguity_set.alpha * n)
    if isinstance(ambiguity_set, CappedKLPenalty):
        if ambiguity_set.alpha == 1:
            return None
        (size,), rest = rest, []
    if isinstance(ambiguity_set, CVaR):
        size = cap
    elif not isinstance(ambiguity_set, BALLS):
        size /= spread
    if size < 1e-6 or size > 1e3 or rest == [1.001]:
        return None
    problem, p, given = convex_problem(type(ambiguity_set).__name__, rest[0] if rest else 2.0, n)
    for parameter, value in zip(given, ((x - middle) / spread, size, cap), strict=True):
        parameter.value = value
    value = problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return middle + spread * float(value), np.asarray(p.value)


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # where it stops early, it is compared all the same
@pytest.mark.parametrize("kind", KINDS)
def test_a_convex_solver_finds_the_same(kind: str) -> None:
    compared = 0
    for ambiguity_set, x, worst in everything(kind):
        found = by_convex_solver(ambiguity_set, x)
        if found is None:
            continue
        label = f"{ambiguity_set}, {x.tolist()}"
        assert abs(worst.risk - found[0]) <= 1e-6 * np.abs(x).max(), label
        np.testing.assert_allclose(worst.weights, found[1], rtol=0, atol=1e-4 * worst.weights.max(), err_msg=label)
        compared += 1
    assert compared >= 200


# ---------------------------------------------------------------------------------------------------------------------
# The duality gap
# ---------------------------------------------------------------------------------------------------------------------


def exact(values: Any) -> list[Any]:
    return [mp.mpf(float(value)) for value in values]


def order_of(ambiguity_set: AmbiguitySet) -> Any:
    """The order of the divergence's phi: 1 for KL, 2 for chi-square."""
    if isinstance(ambiguity_set, (KLPenalty, KLBall, CappedKLPenalty)):
        return mp.mpf(1)
    return mp.mpf(getattr(ambiguity_set, "order", 2.0))


def divergence(ambiguity_set: AmbiguitySet, weights: list[Any]) -> Any:
    """``(1/n) sum phi(n p_i)``."""
    n, k = len(weights), order_of(ambiguity_set)

    def phi(t: Any) -> Any:
        if k == 1:
            return (t * mp.log(t) if t > 0 else mp.mpf(0)) - t + 1
        return (t**k - k * t + k - 1) / (k * (k - 1))

    return mp.fsum(phi(n * p) for p in weights) / n


def value_of_weights(ambiguity_set: AmbiguitySet, x: list[Any], weights: list[Any]) -> Any:
    """What is maximised, at these weights."""
    value = mp.fdot(x, weights)
    if isinstance(ambiguity_set, (KLPenalty, ChiSquarePenalty, CappedKLPenalty)):
        strength, *_ = dataclasses.astuple(ambiguity_set)
        value -= mp.mpf(strength) * divergence(ambiguity_set, weights)
    return value


def value_of_dual(ambiguity_set: AmbiguitySet, x: list[Any], nu: Any, s: Any) -> Any:
    """``nu + s radius + s mean phi*((x - nu) / s)``, with CVaR's and the ends' own forms."""
    n, k = len(x), order_of(ambiguity_set)
    if isinstance(ambiguity_set, CVaR):
        return nu + mp.fsum(max(value - nu, mp.mpf(0)) for value in x) / n / mp.mpf(ambiguity_set.alpha)
    if mp.isinf(s):
        return mp.fsum(x) / n
    if s == 0:
        return nu

    def conjugate(y: Any) -> Any:
        if isinstance(ambiguity_set, CappedKLPenalty):
            cap = 1 / mp.mpf(ambiguity_set.alpha)
            return mp.expm1(min(y, mp.log(cap))) + cap * max(y - mp.log(cap), mp.mpf(0))
        if k == 1:
            return mp.expm1(y)
        inside = max(1 + (k - 1) * y, mp.mpf(0))
        return (inside ** (k / (k - 1)) - 1) / k

    radius = mp.mpf(ambiguity_set.radius) if isinstance(ambiguity_set, BALLS) else mp.mpf(0)
    return nu + s * radius + s * mp.fsum(conjugate((value - nu) / s) for value in x) / n


def best_value_of_dual(ambiguity_set: AmbiguitySet, x: list[Any], nu: float, s: float) -> Any:
    """The same, minimised over what may have been rounded to `nu`: it matters where s is far smaller than nu."""
    scale = mp.mpf(s)
    if s == 0 or math.isinf(s) or s > 1e-6 * abs(nu):
        return value_of_dual(ambiguity_set, x, mp.mpf(nu), scale)
    low, high = (mp.mpf(nu) + side * 2 * mp.mpf(float(np.spacing(abs(nu)))) for side in (-1, 1))
    for _ in range(100):  # a convex function of one variable, by thirds
        third = (high - low) / 3
        if value_of_dual(ambiguity_set, x, low + third, scale) < value_of_dual(ambiguity_set, x, high - third, scale):
            high -= third
        else:
            low += third
    return value_of_dual(ambiguity_set, x, low, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_dual_variables_enclose_the_risk(kind: str) -> None:
    with mp.workdps(DIGITS):
        for ambiguity_set, values, worst in everything(kind):
            x, p = exact(values), exact(worst.weights)
            small, label = 1e-10 * max(map(abs, x)), f"{ambiguity_set}, {values.tolist()}"
            assert min(p) >= 0, label
            assert abs(mp.fsum(p) - 1) <= 1e-14, label
            if isinstance(ambiguity_set, (CVaR, CappedKLPenalty)):
                assert max(p) <= 1 / mp.mpf(min(ambiguity_set.alpha, 1)) / len(p) * (1 + 1e-14) or len(set(values)) < 2
            elif isinstance(ambiguity_set, BALLS):
                furthest = divergence(ambiguity_set, [mp.mpf(1)] + [mp.mpf(0)] * (len(p) - 1))
                excess = divergence(ambiguity_set, p) - mp.mpf(ambiguity_set.radius)
                assert excess <= 1e-12 * max(furthest, 1), label
            nu, s = (float(one) for one in worst.dual)
            assert s >= 0, label
            below = value_of_weights(ambiguity_set, x, p)
            above = best_value_of_dual(ambiguity_set, x, nu, s)
            risk = mp.mpf(float(worst.risk))
            assert risk - small <= below <= risk + small, label
            assert risk - small <= above <= risk + small, label


# ---------------------------------------------------------------------------------------------------------------------
# The solution in 50 digits
# ---------------------------------------------------------------------------------------------------------------------


def normalised(values: list[Any]) -> list[Any]:
    total = mp.fsum(values)
    return [value / total for value in values]


def bisected(surplus: Callable[[Any], Any], low: Any, high: Any) -> Any:
    """Where a falling function crosses 0."""
    low, high = mp.mpf(low), mp.mpf(high)
    for _ in range(130):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
    return (low + high) / 2


def exact_weights(ambiguity_set: AmbiguitySet, x: list[Any]) -> list[Any]:
    """The worst-case weights by the condition that defines them; see docs/theory/ambiguity.md."""
    n, top, k = len(x), max(x), order_of(ambiguity_set)
    if isinstance(ambiguity_set, (CVaR, CappedKLPenalty)):
        share = mp.mpf(ambiguity_set.alpha) * n
        if abs(share - mp.nint(share)) <= 4 * mp.mpf(2) ** -52 * share:
            share = mp.nint(share)
    if isinstance(ambiguity_set, CappedKLPenalty):
        if share >= n:
            return [mp.mpf(1) / n] * n
        share, temperature = max(share, mp.mpf(1)), mp.mpf(ambiguity_set.temperature)

        def uncapped(theta: Any) -> list[Any]:
            return [mp.exp(min(mp.mpf(0), (value - theta) / temperature)) for value in x]

        # At the upper end every weight would be below the cap even if all losses were as large as the largest.
        ends = min(x) - temperature * mp.log(n), top + temperature * mp.log(n)
        theta = bisected(lambda theta: mp.fsum(uncapped(theta)) - share, *ends)
        return normalised(uncapped(theta))
    if isinstance(ambiguity_set, CVaR):
        left, weights = mp.mpf(1), [mp.mpf(0)] * n
        for level in sorted(set(x), reverse=True):
            here = [i for i in range(n) if x[i] == level]
            given = min(left, len(here) / share)
            for i in here:
                weights[i] = given / len(here)
            left -= given
        return weights
    if isinstance(ambiguity_set, KLPenalty):
        return normalised([mp.exp((value - top) / mp.mpf(ambiguity_set.temperature)) for value in x])
    if isinstance(ambiguity_set, ChiSquarePenalty):
        strength = mp.mpf(ambiguity_set.strength)
        ordered = sorted(x, reverse=True)
        for active in range(n, 0, -1):
            nu = (mp.fsum(ordered[:active]) - (n - active) * strength) / active
            if strength + ordered[active - 1] - nu > 0:
                break
        return [max(1 + (value - nu) / strength, mp.mpf(0)) / n for value in x]

    radius = mp.mpf(ambiguity_set.radius)
    at_top = normalised([mp.mpf(value == top) for value in x])
    if radius == 0:
        return [mp.mpf(1) / n] * n
    if divergence(ambiguity_set, at_top) <= radius * (1 + 8 * mp.mpf(2) ** -53):
        return at_top
    depth = [top - value for value in x]
    levels = sorted(set(depth))
    if k == 1:

        def tempered(log_s: Any) -> list[Any]:
            return normalised([mp.exp(-d / mp.exp(log_s)) for d in depth])

        ends = mp.log(levels[1]) - 10, mp.log(levels[-1]) + 100
        return tempered(bisected(lambda log_s: divergence(ambiguity_set, tempered(log_s)) - radius, *ends))

    def clipped(floor: Any, log_above: Any) -> list[Any]:
        """Weights where the threshold lies so far below the level `floor`."""
        above = mp.exp(log_above)
        return normalised([(above + floor - d) ** (1 / (k - 1)) if d <= floor else mp.mpf(0) for d in depth])

    nearly_none = -2000 * max(k - 1, mp.mpf(1))
    floor = levels[0]
    for level in levels[1:]:  # the lowest level that is active: its own weight would have to be negative without
        if divergence(ambiguity_set, clipped(level, mp.log(level) + nearly_none)) > radius:
            floor = level
    ends = mp.log(levels[-1]) + nearly_none, mp.log(levels[-1]) + 100
    return clipped(floor, bisected(lambda a: divergence(ambiguity_set, clipped(floor, a)) - radius, *ends))


def errors(ambiguity_set: AmbiguitySet, values: np.ndarray, risk: Any, weights: Any) -> tuple[float, float]:
    """Error of the risk against the largest loss, of the weights against the largest weight."""
    with mp.workdps(DIGITS):
        x = exact(values)
        wanted = exact_weights(ambiguity_set, x)
        off = mp.mpf(float(risk)) - value_of_weights(ambiguity_set, x, wanted)
        worst = max(abs(mp.mpf(float(p)) - q) for p, q in zip(weights, wanted, strict=True))
        return float(abs(off) / (max(map(abs, x)) or 1)), float(worst / max(wanted))


EXTREMES: list[tuple[list[float], tuple[float, float]]] = [
    # losses, and what they are multiplied by; penalties are in these units, too
    ([-3.0], (1e-30, 1e30)),
    ([0.0, 0.0], (1.0, 1.0)),
    ([-1.0, -1.0, -1.0], (1e-30, 1e30)),
    ([1.0, 2.0, 4.0], (1e-30, 1e30)),
    ([-1.0, -2.5, -2.0, -8.0], (1e-30, 1e30)),
    ([3.0, 3.0, 1.0, 1.0, 1.0, -2.0], (1e-30, 1e30)),
    ([1.0, 1.0, 1.0, 0.0], (1.0, 1e30)),
    ([5.0, 1e-3, -1e-3, 0.0, 0.0], (1.0, 1.0)),
]
EXTREME_SIZES: dict[str, list[tuple[float, ...]]] = {
    "CVaR": [(1.0,), (0.5,), (2 / 3,), (0.3,), (1e-9,)],
    "KLPenalty": [(1e-4,), (0.7,), (1e6,)],
    "CappedKLPenalty": [*((t, alpha) for t in (1e-4, 0.7, 1e6) for alpha in (1.0, 0.5, 2 / 3, 1e-9, 1 - 1e-9))],
    "KLBall": [(0.0,), (1e-9,), (math.log(2),), (math.log(3),), (0.3,), (50.0,)],
    "ChiSquarePenalty": [(1e-4,), (0.7,), (1e6,)],
    "ChiSquareBall": [(0.0,), (1e-9,), (0.5,), (1.0,), (0.3,), (50.0,)],
    "CressieReadBall": [
        *((k, radius) for k in (1.001, 1.5, 3.0, 20.0) for radius in (0.0, 1e-9, 0.3)),
        *((3.0, 0.5), (3.0, 4 / 3), (1.5, 50.0)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_50_digits_say_the_same_at_the_extremes(kind: str) -> None:
    for own in EXTREME_SIZES[kind]:
        for losses, scales in EXTREMES:
            for scale in scales:
                x = scale * np.asarray(losses)
                size = (own[0] * scale, *own[1:]) if kind.endswith("Penalty") else own
                ambiguity_set = KINDS[kind](*size)
                worst = worst_case(x, ambiguity_set)
                off = errors(ambiguity_set, x, worst.risk, worst.weights)
                assert max(off) <= 1e-10, (ambiguity_set, x, off)


@pytest.mark.parametrize("kind", KINDS)
def test_50_digits_say_the_same_of_random_problems(kind: str) -> None:
    chosen = everything(kind)[::7]
    assert len(chosen) >= 24
    for ambiguity_set, x, worst in chosen:
        off = errors(ambiguity_set, x, worst.risk, worst.weights)
        assert max(off) <= 1e-10, (ambiguity_set, x.tolist(), off)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_keeps_five_digits_of_random_problems(kind: str) -> None:
    for number, group in enumerate(groups(kind)):
        worst = worst_case(group.losses.astype(np.float32), group.ambiguity_set, where=group.where)
        for row in range(number % 7, ROWS, 7):
            weights = worst.weights[row][group.where[row]]
            off = errors(group.ambiguity_set, group.values(row), worst.risk[row], weights)
            assert max(off) <= 1e-5, (group.ambiguity_set, group.values(row).tolist(), off)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

NAMESPACES = {"numpy": "array_api_compat.numpy", "torch": "array_api_compat.torch", "jax": "jax.numpy"}


def worst_errors(library: str, dtype: str, kind: str) -> tuple[float, float]:
    """The largest errors of risk and weights over all random problems of a kind, in an array library."""
    xp = importlib.import_module(NAMESPACES[library])
    largest = (0.0, 0.0)
    for group in groups(kind):
        losses = xp.asarray(group.losses, dtype=getattr(xp, dtype))
        worst = worst_case(losses, group.ambiguity_set, where=xp.asarray(group.where))
        risk, weights = np.asarray(worst.risk), np.asarray(worst.weights)
        for row in range(ROWS):
            off = errors(group.ambiguity_set, group.values(row), risk[row], weights[row][group.where[row]])
            largest = (max(largest[0], off[0]), max(largest[1], off[1]))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", choices=list(NAMESPACES))
    libraries = parser.parse_args().library or list(NAMESPACES)
    if "jax" in libraries:
        importlib.import_module("jax").config.update("jax_enable_x64", True)
    print("| set | dtype | " + " | ".join(libraries) + " |\n|---|---|" + "---|" * len(libraries))
    for kind in KINDS:
        for dtype in ("float64", "float32"):
            cells = ("{:.0e} / {:.0e}".format(*worst_errors(library, dtype, kind)) for library in libraries)
            print(f"| `{kind}` | {dtype} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
