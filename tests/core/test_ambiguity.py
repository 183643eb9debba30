"""The ambiguity sets: against the oracle, their duals, the facts that hold for all of them, every bad input.

Problems are drawn as rows of one array, so that a library is called once for many of them, with one shape, so that
jax.jit compiles once for each set.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as np_namespace
import array_api_compat.torch as torch_namespace
import array_api_strict as strict
import drrho_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import ambiguity, extend
from drrho_core._array_api import values_visible
from drrho_core._routines import repeat
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

jax.config.update("jax_enable_x64", True)

ROWS, N = 24, 6
# One of each kind first: under jit only these are compiled.
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


def jax_loop(count: int, body: Any, carry: Any) -> Any:
    """What a backend registers: the library's own loop where code is traced."""
    if not isinstance(carry[0], jax.core.Tracer):
        return extend.plain_loop(count, body, carry)
    return jax.lax.fori_loop(0, count, lambda _, inner: body(inner), carry)


@pytest.fixture(autouse=True)
def jitted_solvers_compile_fast(register_routines: Any) -> None:
    register_routines("jax.numpy", loop=jax_loop)


def tolerance(space: Any) -> float:
    return 1e-10 if space.dtype_name == "float64" else 1e-5


@functools.cache
def compiled(jit: Callable[..., Any], ambiguity_set: AmbiguitySet) -> Callable[..., Any]:
    return jit(lambda losses, where: worst_case(losses, ambiguity_set, where=where))


def solve(space: Any, ambiguity_set: AmbiguitySet, losses: Any, where: Any = None) -> WorstCase:
    """Solve one problem or several as rows in a space and bring everything back as float64.

    Rows of zeros fill up the one shape that is compiled.
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
    """Rows of every kind, and what counts in them; what does not count is nan or infinite."""
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
    """The oracle's answer, row by row, to what an array of that dtype really holds."""
    x, where = problem_rows()
    rounded = np.asarray(x, dtype=dtype).astype(np.float64)
    theirs = getattr(drrho_reference, type(ambiguity_set).__name__)(*dataclasses.astuple(ambiguity_set))
    return [drrho_reference.worst_case(rounded[i], theirs, where=where[i]) for i in range(ROWS)]


def sets_for(space: Any, kind: str) -> list[AmbiguitySet]:
    return SETS[kind] if space.jit is None else SETS[kind][:1]


# ---------------------------------------------------------------------------------------------------------------------
# Right answers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_agrees_with_the_oracle(space: Any, kind: str) -> None:
    x, where = problem_rows()
    for ambiguity_set in sets_for(space, kind):
        got = solve(space, ambiguity_set, x, where)
        for i, expected in enumerate(oracle_rows(ambiguity_set, space.dtype_name)):
            size, label = np.abs(x[i][where[i]]).max(), f"{ambiguity_set}, row {i}"
            np.testing.assert_allclose(got.risk[i], expected.risk, rtol=0, atol=tolerance(space) * size, err_msg=label)
            largest = expected.weights.max()
            np.testing.assert_allclose(
                got.weights[i], expected.weights, rtol=0, atol=tolerance(space) * largest, err_msg=label
            )
            assert (got.weights[i][~where[i]] == 0).all()


def dual_value(ambiguity_set: AmbiguitySet, x: np.ndarray, nu: float, s: float) -> float:
    """Evaluate ``nu + s radius + s mean phi*((x - nu) / s)`` as docs/theory has it, at one point of the dual."""
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_dual_certifies_the_risk(space: Any, kind: str) -> None:
    x, where = problem_rows()
    x = space.rounded(x)
    for ambiguity_set in sets_for(space, kind):
        got = solve(space, ambiguity_set, x, where)
        for i in range(ROWS):
            values = x[i][where[i]]
            size, (nu, s) = np.abs(values).max(), (got.dual[0][i], got.dual[1][i])
            assert s >= 0
            if 0 < s < 1e3 * np.finfo(space.dtype_name).eps * size:
                continue  # nu, rounded, is not known to a fraction of s
            gap = dual_value(ambiguity_set, values, nu, s) - got.risk[i]
            assert abs(gap) <= tolerance(space) * size, (ambiguity_set, i, gap)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dual_is_a_minimum_and_says_what_the_weights_are(kind: str) -> None:
    # Elsewhere in the dual nothing is smaller, and the weights are (phi*)'((x - nu) / s) / n.
    x = np.random.default_rng(3).normal(size=7)
    ambiguity_set = SETS[kind][0]
    worst = worst_case(x, ambiguity_set)
    nu, s = float(worst.dual[0]), float(worst.dual[1])
    best = dual_value(ambiguity_set, x, nu, s)
    for shift in (-0.1, -1e-3, 1e-3, 0.1):
        assert dual_value(ambiguity_set, x, nu + shift, s) >= best - 1e-15
        if kind in BALLS:
            assert dual_value(ambiguity_set, x, nu, s * (1 + shift)) >= best - 1e-15
    y = (x - nu) / s if s > 0 else x
    k = getattr(ambiguity_set, "order", 2.0)
    if kind != "CVaR":
        likelihood = np.exp(y) if "KL" in kind else np.maximum(1 + (k - 1) * y, 0) ** (1 / (k - 1))
        likelihood = np.minimum(likelihood, 1 / getattr(ambiguity_set, "alpha", 1e-9))
        np.testing.assert_allclose(worst.weights, likelihood / 7, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_the_derivative_of_the_risk(eager_space: Any, kind: str) -> None:
    # Danskin's theorem, by central differences; all 2 n shifted problems are rows of one array.
    if eager_space.dtype_name == "float32":
        pytest.skip("differences need float64")
    x, h = np.random.default_rng(5).normal(size=N), 1e-5
    rows = np.concatenate([x + h * np.eye(N), x - h * np.eye(N)])
    for ambiguity_set in SETS[kind][:2]:
        risk = solve(eager_space, ambiguity_set, rows).risk
        weights = solve(eager_space, ambiguity_set, x).weights
        np.testing.assert_allclose((risk[:N] - risk[N:]) / (2 * h), weights, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("losses", "ambiguity_set", "risk", "weights"),
    [
        # k = 1.5: all of the largest, half of the next.
        ([1.0, 4.0, 2.0], CVaR(0.5), 10 / 3, [0, 2 / 3, 1 / 3]),
        # k = 2, one loss above the quantile, three tied at it share the second place.
        ([5.0, 1.0, 3.0, 3.0, 3.0, 0.0], CVaR(1 / 3), 4.0, [1 / 2, 0, 1 / 6, 1 / 6, 1 / 6, 0]),
        # 0.1 times 30 is a little more than 3 in floating point, and means 3.
        ([0.0] * 26 + [1.0, 2.0, 3.0, 4.0], CVaR(0.1), 3.0, [0] * 27 + [1 / 3] * 3),
        ([math.log(1), math.log(5)], KLPenalty(1.0), math.log(3), [1 / 6, 5 / 6]),
        # k = 2: the largest is capped at 1/2, the others share the rest as 1 : 2 : 3, nu = log 3.
        (
            [0.0, math.log(2), math.log(3), math.log(40)],
            CappedKLPenalty(1.0, 0.5),
            math.log(60) / 2,
            [1 / 12, 1 / 6, 1 / 4, 1 / 2],
        ),
        # s = 1: mean log-likelihood ratio of (1/6, 5/6) against uniform weights.
        (
            [math.log(1), math.log(5)],
            KLBall((math.log(2 / 6) + 5 * math.log(10 / 6)) / 6),
            5 / 6 * math.log(5),
            [1 / 6, 5 / 6],
        ),
        # n p = 1 + (x - nu) / s = (0, 1/2, 3/2, 2).
        ([0.0, 1.0, 3.0, 4.0], ChiSquarePenalty(2.0), 3.25 - 2 * 0.3125, [0, 1 / 8, 3 / 8, 1 / 2]),
        ([0.0, 1.0, 3.0, 4.0], ChiSquareBall(0.3125), 2 + math.sqrt(2 * 0.3125 * 2.5), [0, 1 / 8, 3 / 8, 1 / 2]),
        # One loss clipped: p = (0, 1/4, 3/4), n sum p^2 = 15/8.
        ([-9.0, 1.0, 3.0], ChiSquareBall(0.4375), 2.5, [0, 1 / 4, 3 / 4]),
        # p proportional to sqrt(x): 3^2 sum p^3 = 1 + 6 radius with p = (0, 1/3, 2/3).
        ([0.0, 1.0, 4.0], CressieReadBall(3.0, 1 / 3), 3.0, [0, 1 / 3, 2 / 3]),
        # p proportional to x^2: (3 sum p^1.5)^2 ... with p = (0, 1/5, 4/5), n^0.5 sum p^1.5 = 1 + 0.75 radius.
        (
            [0.0, 1.0, 2.0],
            CressieReadBall(1.5, (math.sqrt(3) * (0.2**1.5 + 0.8**1.5) - 1) / 0.75),
            1.8,
            [0, 1 / 5, 4 / 5],
        ),
    ],
)
def test_hand_worked_numbers(losses: list[float], ambiguity_set: AmbiguitySet, risk: float, weights: list) -> None:
    worst = worst_case(np.asarray(losses), ambiguity_set)
    np.testing.assert_allclose(worst.risk, risk, rtol=1e-14)
    np.testing.assert_allclose(worst.weights, weights, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# Facts that hold for every set, as properties
# ---------------------------------------------------------------------------------------------------------------------

EXAMPLES = {"numpy": 40, "torch": 10, "strict": 5, "strict-device1": 5, "jax": 2, "jax-jit": 10}


def for_all(space: Any, check: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    """Run a property, with fewer examples where calls are slow."""
    settings(max_examples=min(EXAMPLES.get(space.name, 10), settings().max_examples))(given(*strategies)(check))()


# Multiples of 1/16: shifts by whole numbers, doubling and halves of sums are exact in float32, and ties frequent.
sixteenths = st.integers(-64, 64).map(lambda i: i / 16)
losses_and_others = st.tuples(
    st.lists(sixteenths, min_size=N, max_size=N).map(np.asarray),
    st.lists(sixteenths, min_size=N, max_size=N).map(np.asarray),
    st.lists(st.booleans(), min_size=N, max_size=N).map(np.asarray),
    st.permutations(range(N)),
    st.integers(-100, 100),
)


@pytest.mark.parametrize("kind", KINDS)
def test_facts_of_every_set(space: Any, kind: str) -> None:
    ambiguity_set = SETS[kind][0]

    def check(drawn: tuple[Any, ...]) -> None:
        x, y, where, order, shift = drawn
        where = where | (np.arange(N) == 2)
        above = x + np.abs(y)
        rows = np.stack([x, x + shift, 2 * x, x[order], above, y, (x + y) / 2, np.full(N, x[0])])
        masks = np.stack([where] * 8)
        masks[3] = where[order]
        risk, weights, _ = solve(space, ambiguity_set, rows, masks)
        small = tolerance(space) * (1 + np.abs(rows).max())
        assert (risk >= np.where(masks, rows, 0.0).sum(axis=1) / masks.sum(axis=1) - small).all()
        assert (risk <= np.where(masks, rows, -np.inf).max(axis=1) + small).all()
        assert abs(risk[1] - risk[0] - shift) <= small
        np.testing.assert_allclose(weights[1], weights[0], rtol=0, atol=tolerance(space))
        if kind in BALLS or kind == "CVaR":
            assert abs(risk[2] - 2 * risk[0]) <= small
            np.testing.assert_allclose(weights[2], weights[0], rtol=0, atol=tolerance(space))
        assert abs(risk[3] - risk[0]) <= small
        np.testing.assert_allclose(weights[3], weights[0][list(order)], rtol=0, atol=tolerance(space))
        assert risk[4] >= risk[0] - small
        assert risk[6] <= (risk[0] + risk[5]) / 2 + small
        np.testing.assert_allclose(weights[7], where / where.sum(), rtol=0, atol=tolerance(space))
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=0, atol=tolerance(space))
        for i in range(8):
            assert_feasible(ambiguity_set, weights[i][masks[i]], tolerance(space))
            for loss in set(rows[i][masks[i]]):  # equal losses, equal weights, to the bit
                assert len(set(weights[i][masks[i] & (rows[i] == loss)])) == 1

    for_all(space, check, losses_and_others)


def divergence(ambiguity_set: AmbiguitySet, weights: np.ndarray) -> float:
    """D(p || 1/n) with the phi of a ball."""
    t = weights * len(weights)
    if isinstance(ambiguity_set, KLBall):
        phi = np.where(t > 0, t * np.log(np.where(t > 0, t, 1.0)), 0.0) - t + 1
    else:
        k = getattr(ambiguity_set, "order", 2.0)
        phi = (t**k - k * t + k - 1) / (k * (k - 1))
    return float(phi.mean())


def assert_feasible(ambiguity_set: AmbiguitySet, weights: np.ndarray, small: float) -> None:
    if isinstance(ambiguity_set, CVaR):
        assert weights.max() <= 1 / min(ambiguity_set.alpha * len(weights), len(weights)) + small or (
            ambiguity_set.alpha * len(weights) < 1
        )
    elif isinstance(ambiguity_set, CappedKLPenalty):
        assert weights.max() <= 1 / max(ambiguity_set.alpha * len(weights), 1) + small
    elif type(ambiguity_set).__name__ in BALLS:
        assert divergence(ambiguity_set, weights) <= ambiguity_set.radius + 10 * small


growing = st.lists(st.floats(1e-3, 3.0), min_size=2, max_size=2, unique=True).map(sorted)


@pytest.mark.parametrize(
    ("build", "sign"),
    [
        (lambda p: CVaR(p / 3), -1),
        (KLPenalty, -1),
        (lambda p: CappedKLPenalty(p, 0.4), -1),
        (lambda p: CappedKLPenalty(0.5, p / 3), -1),
        (ChiSquarePenalty, -1),
        (KLBall, 1),
        (ChiSquareBall, 1),
        (lambda p: CressieReadBall(3.0, p), 1),
        (lambda p: CressieReadBall(1.2, p), 1),
    ],
)
def test_a_larger_set_has_a_larger_risk(eager_space: Any, build: Callable[[float], AmbiguitySet], sign: int) -> None:
    def check(parameters: list[float], x: list[float]) -> None:
        low, high = (solve(eager_space, build(parameter), x).risk for parameter in parameters)
        assert sign * (high - low) >= -tolerance(eager_space) * 4

    for_all(eager_space, check, growing, st.lists(sixteenths, min_size=N, max_size=N))


@pytest.mark.parametrize("a", [1e-30, 1e-3, 7.0, 1e30])
@pytest.mark.parametrize("build", [KLPenalty, ChiSquarePenalty, lambda t: CappedKLPenalty(t, 0.4)])
def test_a_penalty_is_in_units_of_the_losses(eager_space: Any, build: Callable[..., Any], a: float) -> None:
    x, small = np.random.default_rng(8).normal(size=(4, N)), tolerance(eager_space)
    plain, scaled = solve(eager_space, build(0.3), x), solve(eager_space, build(0.3 * a), a * x)
    np.testing.assert_allclose(scaled.risk / a, plain.risk, rtol=0, atol=3 * small)
    np.testing.assert_allclose(scaled.weights, plain.weights, rtol=0, atol=small)


LIMITS = [
    ("mean", [CVaR(1.0), KLPenalty(1e12), ChiSquarePenalty(1e12), KLBall(1e-26), ChiSquareBall(1e-26)]),
    ("mean", [CressieReadBall(1.2, 1e-26), CressieReadBall(3.0, 1e-26), KLPenalty(1e300), ChiSquarePenalty(1e300)]),
    ("mean", [KLBall(0.0), ChiSquareBall(1e-300), CressieReadBall(3.0, 1e-300), KLBall(1e-300)]),
    ("mean", [CappedKLPenalty(1e-3, 1.0), CappedKLPenalty(1e300, 1.0), CappedKLPenalty(1e12, 0.5)]),
    ("mean", [CappedKLPenalty(1e300, 1e-3), CappedKLPenalty(1e-300, 1.0), CappedKLPenalty(1e300, 1 - 1e-12)]),
    ("max", [CappedKLPenalty(1e-9, 1e-9), CappedKLPenalty(1e-300, 1 / 6), CappedKLPenalty(1e-30, 1e-300)]),
    ("max", [CVaR(1e-9), KLPenalty(1e-9), ChiSquarePenalty(1e-9), KLBall(9.0), ChiSquareBall(9.0)]),
    ("max", [CressieReadBall(1.2, 9.0), CressieReadBall(3.0, 99.0), KLPenalty(1e-300), ChiSquarePenalty(1e-300)]),
    ("max", [KLBall(1e308), ChiSquareBall(1e308), CressieReadBall(3.0, 1e308), CressieReadBall(1.0001, 1e308)]),
]


@pytest.mark.parametrize(("limit", "sets"), LIMITS)
def test_the_mean_and_the_maximum_are_the_ends(eager_space: Any, limit: str, sets: list[AmbiguitySet]) -> None:
    x = np.asarray([[0.5, 0.25, -1.0, 2.0, 1.5, 2.0], [3.0, 1.0, 0.0, 2.0, -1.0, -2.0]])
    weights = np.full((2, N), 1 / N) if limit == "mean" else (x == x.max(axis=1, keepdims=True)).astype(float)
    weights = weights / weights.sum(axis=1, keepdims=True)
    for ambiguity_set in sets:
        got = solve(eager_space, ambiguity_set, x)
        np.testing.assert_allclose(got.risk, (weights * x).sum(axis=1), rtol=0, atol=1e-6, err_msg=str(ambiguity_set))
        np.testing.assert_allclose(got.weights, weights, rtol=0, atol=1e-6, err_msg=str(ambiguity_set))


def test_a_capped_penalty_lies_between_kl_and_cvar(eager_space: Any) -> None:
    x, where = problem_rows()
    small = tolerance(eager_space)
    for capped, plain in (
        (CappedKLPenalty(0.5, 1e-3), KLPenalty(0.5)),
        (CappedKLPenalty(0.5, 1 / 6), KLPenalty(0.5)),  # a cap of 1
        (CappedKLPenalty(1e-44, 0.5), CVaR(0.5)),
        (CappedKLPenalty(1e-44, 0.3), CVaR(0.3)),
        (CappedKLPenalty(1e-300, 1 / 3), CVaR(1 / 3)),
    ):
        got, expected = (solve(eager_space, one, x, where) for one in (capped, plain))
        size = np.abs(np.where(where, x, 0.0)).max(axis=1)
        np.testing.assert_allclose(got.weights, expected.weights, rtol=0, atol=small, err_msg=str(capped))
        for a, b in ((got.risk, expected.risk), (got.dual[0], expected.dual[0])):
            np.testing.assert_allclose(a / size, b / size, rtol=0, atol=small, err_msg=str(capped))
    for temperature in (1e-30, 0.5, 1e9, 1e30):
        got = solve(eager_space, CappedKLPenalty(temperature, 1.0), x, where)
        np.testing.assert_array_equal(got.weights, solve(eager_space, CVaR(1.0), x, where).weights)
        lowest = np.where(where, eager_space.rounded(x), np.inf).min(axis=1)
        assert (np.abs(got.dual[0] - lowest) <= small * size).all()


@pytest.mark.parametrize("radius", [1e-4, 0.1, 0.5, 0.7, 2.0])
def test_order_2_is_chi_square_and_order_near_1_is_kl(eager_space: Any, radius: float) -> None:
    x, where = problem_rows()
    small = tolerance(eager_space)
    two, chi = (solve(eager_space, s, x, where) for s in (CressieReadBall(2.0, radius), ChiSquareBall(radius)))
    np.testing.assert_allclose(two.weights, chi.weights, rtol=0, atol=small)
    one, kl = (solve(eager_space, s, x, where) for s in (CressieReadBall(1 + 1e-11, radius), KLBall(radius)))
    np.testing.assert_allclose(one.weights, kl.weights, rtol=0, atol=small)
    for ours, theirs in ((two, chi), (one, kl)):
        for a, b in zip(ours.dual, theirs.dual, strict=True):
            np.testing.assert_allclose(a, b, rtol=100 * small, atol=0)


def test_chi_square_is_the_mean_and_the_standard_deviation_while_nothing_is_clipped() -> None:
    x = np.random.default_rng(1).normal(size=50)
    for radius in (1e-12, 1e-4, 0.05):
        expected = x.mean() + math.sqrt(2 * radius * x.var())
        np.testing.assert_allclose(worst_case(x, ChiSquareBall(radius)).risk, expected, rtol=0, atol=1e-15)
        strength = math.sqrt(x.var() / (2 * radius))  # the ball's own multiplier
        penalised = worst_case(x, ChiSquarePenalty(strength)).risk
        np.testing.assert_allclose(penalised, x.mean() + x.var() / (2 * strength), rtol=0, atol=1e-15)


def test_a_ball_and_the_penalty_of_its_multiplier_have_one_answer(eager_space: Any) -> None:
    x, small = np.random.default_rng(2).normal(size=N), tolerance(eager_space)
    for ball, penalty in ((KLBall(0.4), KLPenalty), (ChiSquareBall(0.8), ChiSquarePenalty)):
        worst = solve(eager_space, ball, x)
        scale = float(worst.dual[1])
        again = solve(eager_space, penalty(scale), x)
        np.testing.assert_allclose(again.weights, worst.weights, rtol=0, atol=small)
        np.testing.assert_allclose(again.risk + scale * ball.radius, worst.risk, rtol=0, atol=4 * small)


# ---------------------------------------------------------------------------------------------------------------------
# Where digits are lost
# ---------------------------------------------------------------------------------------------------------------------


def test_ties_are_ties_of_the_losses_as_they_came() -> None:
    # The difference to the largest loss is the same for both in float32; only the second one is at the quantile.
    x = np.asarray([1e8, 1.0, 2.0, 3.0], dtype=np.float32)
    assert worst_case(x, CVaR(0.5)).weights.tolist() == [0.5, 0.0, 0.0, 0.5]
    assert worst_case(x, CVaR(0.625)).weights.tolist() == pytest.approx([0.4, 0.0, 0.2, 0.4])


def test_a_share_that_is_a_whole_number_but_for_rounding_is_that_number() -> None:
    # 0.1 of 30 losses is 3 + 4e-16 of them in floating point: no fourth loss gets a weight, nor is it the quantile.
    worst = worst_case(np.asarray([0.0] * 26 + [1.0, 2.0, 3.0, 4.0]), CVaR(0.1))
    assert worst.weights[:27].tolist() == [0.0] * 27
    assert float(worst.dual[0]) == 2.0


@pytest.mark.parametrize("temperature", [1e-12, 0.05])
def test_a_cap_for_a_whole_number_of_losses_is_that_of_the_number(temperature: float) -> None:
    # As for CVaR: 0.1 of 30 losses is 3. The third gets what the 27 below leave it, none of them more than their due.
    x = np.asarray([0.0] * 26 + [1.0, 2.0, 3.0, 4.0])
    worst = worst_case(x, CappedKLPenalty(temperature, 0.1))
    free = np.exp((x[:-2] - 2.0) / temperature)
    np.testing.assert_allclose(worst.weights[:-2], free / free.sum() / 3, rtol=1e-12, atol=1e-300)
    assert worst.weights[-2:].tolist() == [1 / 3, 1 / 3]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_cap_counts_a_large_sample_without_rounding(dtype: str) -> None:
    # k = alpha n is 27182.81828; what is left for the free losses would be wrong by 1e-3 of a cap in float32.
    n, alpha = 100_000, 0.2718281828
    x = np.arange(n, dtype=dtype)
    weights = worst_case(x, CappedKLPenalty(1.0, alpha)).weights.astype(float) * (alpha * n)
    np.testing.assert_allclose(weights[-27182:], 1.0, rtol=1e-6)
    left = alpha * n - 27182  # 0.81828, which the others share as a geometric series
    ratio = np.exp(-np.arange(20.0))
    np.testing.assert_allclose(weights[-27202:-27182][::-1], left * ratio / ratio.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3, 1.0, 1e7, 1e30, 1e300])
@pytest.mark.parametrize("alpha", [1e-300, 1 / 6, 0.3, 0.5 + 1e-15, 0.5 - 1e-15, 1 - 1e-9, 1 - 1e-16, 1.0])
def test_a_capped_penalty_is_finite_at_all_sizes(dtype: str, temperature: float, alpha: float) -> None:
    x, where = problem_rows()
    worst = worst_case(np.where(where, x, 0.0).astype(dtype), CappedKLPenalty(temperature, alpha), where=where)
    assert all(np.isfinite(array).all() for array in (worst.risk, worst.weights, worst.dual[0]))
    np.testing.assert_allclose(worst.weights.sum(axis=1), 1.0, rtol=1e-6 if dtype == "float32" else 1e-14)
    size, number = np.abs(x).max(axis=1, where=where, initial=0.0), where.sum(axis=1)
    small = 1e-6 if dtype == "float32" else 1e-14
    assert (worst.weights.max(axis=1) <= (1 + small) / np.maximum(alpha * number, 1)).all()
    mean = np.where(where, x, 0.0).sum(axis=1) / number
    assert (worst.risk >= mean - small * size).all()
    assert (worst.risk <= (np.where(where, x, 0.0) * worst.weights).sum(axis=1) + small * size).all()
    if temperature >= 1e30 and alpha < 0.9:  # as for KLPenalty, also where a loss over the temperature is 0 in float32
        assert (np.abs(worst.dual[0] - mean) <= small * size)[size < 1e9].all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cvar_counts_a_large_sample_without_rounding(dtype: str) -> None:
    # alpha n is 27182.81828: in float32 the product alone would be wrong by 1e-3 of the weight at the quantile.
    n, alpha = 100_000, 0.2718281828
    x = np.arange(n, dtype=dtype)
    weights = worst_case(x, CVaR(alpha)).weights.astype(float)
    largest = 1 / (alpha * n)
    np.testing.assert_allclose(weights[-27182:], largest, rtol=1e-6)
    np.testing.assert_allclose(weights[-27183], 0.81828 * largest, rtol=1e-6 if dtype == "float32" else 1e-9)
    assert (weights[:-27183] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "ambiguity_set", [ChiSquareBall(0.1), ChiSquareBall(0.5), CressieReadBall(3.0, 0.5), KLBall(math.log(2) + 1e-9)]
)
def test_digits_are_kept_on_a_plateau(dtype: str, ambiguity_set: AmbiguitySet) -> None:
    # Far below the cluster on top lies the rest, and the radius is that of uniform weights on the cluster: what decides
    # between its members is then the square root of a rounding error, unless there is none.
    members = 5 if ambiguity_set == ChiSquareBall(0.1) else 3
    top = np.asarray([1.0, 1.125, 1.25, 1.0625, 1.1875])[:members]
    x = np.concatenate([top, np.full(1 if members == 5 else 3, -1e6)]).astype(dtype)
    theirs = getattr(drrho_reference, type(ambiguity_set).__name__)(*dataclasses.astuple(ambiguity_set))
    expected = drrho_reference.worst_case(x.astype(np.float64), theirs)
    got = worst_case(x, ambiguity_set)
    np.testing.assert_allclose(got.weights, expected.weights, rtol=0, atol=1e-5 if dtype == "float32" else 1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_of_many_scales_at_once(dtype: str) -> None:
    reach = 60 if dtype == "float64" else 12
    rng = np.random.default_rng(12)
    for _ in range(60):
        n = int(rng.integers(2, 7))
        x = (rng.choice([0, -1, 1], size=n) * 10.0 ** (reach * rng.uniform(-1, 1, size=n))).astype(dtype)
        for ambiguity_set in (KLBall(0.3), ChiSquareBall(0.3), CressieReadBall(1.3, 0.3), CressieReadBall(4.0, 0.3)):
            got = worst_case(x, ambiguity_set)
            wide = np.asarray(got.weights, dtype=np.float64)
            assert abs(wide.sum() - 1) <= 1e-6
            assert divergence(ambiguity_set, wide) <= ambiguity_set.radius + 1e-5
            size = np.abs(x).max()
            nu, s = float(got.dual[0]), float(got.dual[1])
            if s == 0 or s > 1e3 * np.finfo(dtype).eps * size:
                gap = dual_value(ambiguity_set, x.astype(np.float64), nu, s) - float(got.risk)
                assert abs(gap) <= (1e-10 if dtype == "float64" else 1e-5) * size


@pytest.mark.parametrize("build", [KLPenalty, ChiSquarePenalty, lambda t: CappedKLPenalty(t, 0.5)])
@pytest.mark.parametrize("parameter", [1e-320, 1e-60, 1e-42, 1e37, 1e39, 1e60, 1e300])
def test_a_parameter_that_float32_cannot_hold(build: Callable[[float], AmbiguitySet], parameter: float) -> None:
    x = np.asarray([[1.0, -2.0, 0.5], [3e36, -1e36, 0.0], [2e-30, 1e-30, 1e-30]])
    narrow, wide = worst_case(x.astype(np.float32), build(parameter)), worst_case(x, build(parameter))
    size = np.abs(x).max(axis=1)
    np.testing.assert_allclose(narrow.risk / size, wide.risk / size, rtol=0, atol=1e-6)
    np.testing.assert_allclose(narrow.weights, wide.weights, rtol=0, atol=1e-6)


def test_a_dual_scale_that_float32_cannot_hold_is_infinite() -> None:
    x = np.asarray([1e34, -3e34, 0.0], dtype=np.float32)
    for ambiguity_set in (KLBall(1e-14), CressieReadBall(1.5, 1e-14)):
        worst = worst_case(x, ambiguity_set)
        assert math.isinf(worst.dual[1])
        np.testing.assert_allclose(worst.dual[0], x.mean(), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, axes, masks, dtypes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ambiguity_set", [SETS[kind][0] for kind in KINDS], ids=KINDS)
@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_any_axis(ambiguity_set: AmbiguitySet, axis: int) -> None:
    x = np.random.default_rng(7).normal(size=(3, 4, 5))
    worst = worst_case(x, ambiguity_set, axis=axis)

    def one_by_one(pick: Callable[[WorstCase], Any]) -> np.ndarray:
        return np.apply_along_axis(lambda v: pick(worst_case(v, ambiguity_set)), axis, x)

    for pick in (lambda a: a.risk, lambda a: a.weights, lambda a: a.dual[0], lambda a: a.dual[1]):
        np.testing.assert_allclose(pick(worst), one_by_one(pick), rtol=0, atol=1e-14)


def test_shapes_and_masks_that_broadcast(eager_space: Any) -> None:
    if eager_space.name == "jax":
        pytest.skip("XLA compiles every operation for every shape; under jit the one shape is enough")
    x = eager_space.asarray(np.arange(6.0).reshape(2, 3))
    for axis, where, shape in ((0, [[True], [False]], (3,)), (1, [True, True, False], (2,)), (-2, True, (3,))):
        mask = eager_space.asarray(np.asarray(where))
        got = worst_case(x, CVaR(0.5), axis=axis, where=mask)
        full = eager_space.asarray(np.broadcast_to(np.asarray(where), (2, 3)))
        expected = worst_case(x, CVaR(0.5), axis=axis, where=full)
        assert [tuple(array.shape) for array in flat(got)] == [shape, (2, 3), shape, shape]
        for a, b in zip(flat(got), flat(expected), strict=True):
            np.testing.assert_array_equal(eager_space.to_numpy(a), eager_space.to_numpy(b))
    assert worst_case(x[0, :], CVaR(0.5)).risk.shape == ()
    assert worst_case(x[:0, :], CVaR(0.5)).weights.shape == (0, 3)


def test_nothing_is_written_to() -> None:
    x, where = problem_rows()
    x, where = x.copy(), where.copy()
    x.flags.writeable = where.flags.writeable = False
    before = x.copy()
    for ambiguity_set in ALL:
        worst = worst_case(x, ambiguity_set, where=where)
        assert not np.shares_memory(worst.weights, x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(
    ("xp", "dtype", "unit"),
    [
        (np_namespace, "float16", 2.0**-11),
        (torch_namespace, "float16", 2.0**-11),
        (torch_namespace, "bfloat16", 2.0**-8),
        (jnp, "bfloat16", 2.0**-8),
    ],
)
def test_half_types_are_computed_in_float32(xp: Any, dtype: str, unit: float) -> None:
    x = np.random.default_rng(9).normal(size=(ROWS, N)) + 2
    half = xp.asarray(x, dtype=getattr(xp, dtype))

    def back(array: Any) -> np.ndarray:
        return np.asarray(xp.astype(array, xp.float64))

    for ambiguity_set in (sets[0] for sets in list(SETS.values())[: 1 if xp is jnp else None]):
        got, expected = worst_case(half, ambiguity_set), worst_case(back(half), ambiguity_set)
        for a, b in zip(flat(got), flat(expected), strict=True):
            assert a.dtype == half.dtype
            np.testing.assert_allclose(back(a), b, rtol=1.01 * unit, atol=1e-6)


def test_a_dual_scale_that_a_half_type_cannot_hold_is_infinite() -> None:
    worst = worst_case(np.asarray([1.0, 2.0, 4.0], dtype=np.float16), ChiSquareBall(1e-12))
    assert math.isinf(worst.dual[1])
    assert float(worst.risk) == pytest.approx(7 / 3, rel=1e-3)
    assert float(worst_case(np.full(2, 65504.0, dtype=np.float16), KLPenalty(1.0)).risk) == 65504


# ---------------------------------------------------------------------------------------------------------------------
# Tracing and compiling
# ---------------------------------------------------------------------------------------------------------------------


def bad_rows() -> tuple[np.ndarray, np.ndarray]:
    x, where = problem_rows()
    x, where = x.copy(), where.copy()
    x[0, 1], x[1, 2], x[2, 3] = np.nan, np.inf, -np.inf
    where[3] = False
    return x, where


@pytest.mark.parametrize("kind", KINDS)
def test_where_values_cannot_be_seen_a_bad_slice_is_nan_and_no_other(space: Any, kind: str) -> None:
    if space.jit is None and values_visible(space.asarray([0.0]), space.xp):
        pytest.skip("values are seen here")
    x, where = bad_rows()
    ambiguity_set = SETS[kind][0]
    got, good = solve(space, ambiguity_set, x, where), solve(space, ambiguity_set, *problem_rows())
    for array, fine in zip(flat(got), flat(good), strict=True):
        assert np.isnan(array[:4]).all()
        np.testing.assert_array_equal(array[4:], fine[4:])


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask_a_bad_slice_that_nobody_sees_is_nan_and_no_other(kind: str) -> None:
    x = np.asarray([[1.0, 2.0, 4.0], [np.nan, 2.0, 4.0], [1.0, np.inf, 4.0], [1.0, 2.0, -np.inf]])
    worst = worst_case(strict.asarray(x, device=strict.Device("device1")), SETS[kind][0])
    for array, fine in zip(flat(worst), flat(worst_case(x[:1], SETS[kind][0])), strict=True):
        got = np.asarray(strict.asarray(array, device=strict.Device("CPU_DEVICE")))
        np.testing.assert_array_equal(got[:1], fine)
        assert np.isnan(got[1:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_jit_moves_nothing_between_host_and_device(kind: str) -> None:
    function = compiled(jax.jit, SETS[kind][0])
    arguments = tuple(jax.device_put(a, jax.devices("cpu")[0]) for a in problem_rows())
    function(*arguments)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(function(*arguments))


def test_a_set_may_be_a_static_argument_of_jit() -> None:
    function = jax.jit(worst_case, static_argnums=1)
    assert float(function(jnp.asarray([1.0, 3.0]), CVaR(0.5)).risk) == 3.0
    assert float(function(jnp.asarray([1.0, 3.0]), CVaR(1.0)).risk) == 2.0


@pytest.mark.parametrize(("kind", "masked"), [("CVaR", False), *((kind, True) for kind in KINDS)])
def test_torch_compiles_it_as_one_graph(monkeypatch: pytest.MonkeyPatch, kind: str, masked: bool) -> None:
    # Unrolled steps are all alike: two of them show that it compiles, in a tenth of the time.
    monkeypatch.setattr(ambiguity, "_steps", lambda: 2)
    ambiguity_set = SETS[kind][0]
    x = torch.asarray(np.random.default_rng(1).normal(size=(2, 3)))
    where = torch.asarray([[True, True, True], [True, False, True]]) if masked else None
    torch._dynamo.reset()
    function = torch.compile(
        lambda a, b: worst_case(a, ambiguity_set, where=b, xp=torch_namespace), backend="aot_eager", fullgraph=True
    )
    got, expected = function(x, where), worst_case(x, ambiguity_set, where=where)
    for a, b in zip(flat(got), flat(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_without_a_registered_loop_steps_are_unrolled(register_routines: Any) -> None:
    register_routines("jax.numpy")
    x, where = (jnp.asarray(a) for a in problem_rows())
    got = jax.jit(lambda a, b: worst_case(a, ChiSquareBall(0.3), where=b))(x, where)
    np.testing.assert_allclose(got.weights, compiled(jax.jit, ChiSquareBall(0.3))(x, where).weights, rtol=0, atol=1e-14)


def test_a_registered_loop_is_used(register_routines: Any) -> None:
    counts = []

    def loop(count: int, body: Any, carry: Any) -> Any:
        counts.append(count)
        return extend.plain_loop(count, body, carry)

    import array_api_strict as xp

    register_routines("array_api_strict", loop=loop)
    # Where a look costs something, nobody looks whether the steps are over.
    worst_case(xp.zeros(6, device=xp.Device("device1")), CressieReadBall(3.0, 0.2))
    assert counts == [3, ambiguity._steps()]  # a search over 6 losses, Newton's method


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(300,), (3, 150)])
def test_many_losses_are_worked_on_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, kind: str, shape: tuple[int, ...]
) -> None:
    """Pieces that end anywhere: within ties, among losses that do not count, with no active loss in them."""
    rng = np.random.default_rng(len(shape))
    x = np.round(rng.normal(size=shape) * rng.choice([0.1, 3.0], size=shape), 1)
    where = rng.random(size=shape) < 0.7
    for ambiguity_set in SETS[kind]:
        for mask in (None, where):
            monkeypatch.undo()
            whole = worst_case(x, ambiguity_set, where=mask)
            monkeypatch.setattr(ambiguity, "_piece", lambda: 64)
            cut = worst_case(x, ambiguity_set, where=mask)
            for a, b in zip(flat(cut), flat(whole), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_steps_end_early_where_a_look_is_free() -> None:
    import array_api_compat.numpy as xp

    taken = []

    def step(carry: Any) -> Any:
        taken.append(carry)
        return (carry[0] / 2,)

    assert repeat(9, step, (np.asarray([1.0, 4.0]),), xp, finished=lambda carry: carry[0] <= 0.5)[0].tolist() == [
        0.125,
        0.5,
    ]
    assert len(taken) == 3
    assert repeat(2, step, (np.asarray([4.0]),), xp, finished=lambda carry: carry[0] <= 0.5)[0].tolist() == [1.0]


def test_registering_a_loop(register_routines: Any) -> None:
    assert extend.registered("some.library") == extend.Extensions()
    register_routines("some.library", loop=extend.plain_loop)
    assert extend.registered("some.library").loop is extend.plain_loop
    assert extend.plain_loop(3, lambda carry: (carry[0] + 1,), (4,)) == (7,)


# ---------------------------------------------------------------------------------------------------------------------
# Sets as objects, and bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_sets_are_frozen_hashable_values() -> None:
    assert len({CVaR(0.5), CVaR(alpha=0.5), CVaR(np.float64(0.5)), CVaR(0.25)}) == 2
    assert KLBall(0.5) != ChiSquareBall(0.5)
    assert repr(CressieReadBall(3, 1)) == "CressieReadBall(order=3.0, radius=1.0)"
    for ambiguity_set in ALL:
        assert pickle.loads(pickle.dumps(ambiguity_set)) == ambiguity_set
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(ambiguity_set, dataclasses.fields(ambiguity_set)[0].name, 0.5)
    with pytest.raises(TypeError, match="abstract"):
        AmbiguitySet()  # type: ignore[abstract]


@pytest.mark.parametrize("xp", [np, torch, jnp, strict], ids=["numpy", "torch", "jax", "strict"])
def test_a_parameter_may_be_an_array_without_axes(xp: Any) -> None:
    parameter = xp.asarray(0.25)
    assert CVaR(parameter) == CVaR(0.25)
    assert type(CVaR(parameter).alpha) is float


BUILDERS: list[tuple[str, Callable[[Any], AmbiguitySet]]] = [
    ("alpha", CVaR),
    ("temperature", KLPenalty),
    ("temperature", lambda temperature: CappedKLPenalty(temperature, 0.5)),
    ("alpha", lambda alpha: CappedKLPenalty(0.5, alpha)),
    ("radius", KLBall),
    ("strength", ChiSquarePenalty),
    ("radius", ChiSquareBall),
    ("order", lambda order: CressieReadBall(order, 0.5)),
    ("radius", lambda radius: CressieReadBall(2.0, radius)),
]


@pytest.mark.parametrize(("name", "build"), BUILDERS)
def test_parameters_are_checked_when_a_set_is_built(name: str, build: Callable[[Any], AmbiguitySet]) -> None:
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"^{name} must be finite, got {value}$"):
            build(value)
    for value in (True, None, "0.5", 0.5j, [0.5], np.asarray([0.5]), torch.tensor(True)):
        with pytest.raises(TypeError, match=f"^{name} must be a real number, got "):
            build(value)
    with pytest.raises(ValueError, match=f"^{name} must .*, got -1"):
        build(-1)
    with pytest.raises(ValueError, match=f"^{name} must not ask for autograd"):
        build(torch.tensor(1.5, requires_grad=True))
    with pytest.raises(TypeError, match=f"^{name} must be a constant where code is traced, got "):
        jax.jit(build)(0.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CVaR(0), r"^alpha must lie in \(0, 1\], got 0$"),
        (lambda: CVaR(1.0000001), r"^alpha must lie in \(0, 1\], got 1.0000001$"),
        (lambda: KLPenalty(0.0), r"^temperature must be positive, got 0.0$"),
        (lambda: CappedKLPenalty(0.0, 0.5), r"^temperature must be positive, got 0.0$"),
        (lambda: CappedKLPenalty(0.5, 0), r"^alpha must lie in \(0, 1\], got 0$"),
        (lambda: CappedKLPenalty(0.5, 1.0000001), r"^alpha must lie in \(0, 1\], got 1.0000001$"),
        (lambda: ChiSquarePenalty(0.0), r"^strength must be positive, got 0.0$"),
        (lambda: KLBall(-1e-9), r"^radius must be at least 0, got -1e-09$"),
        (lambda: ChiSquareBall(-1e-9), r"^radius must be at least 0, got -1e-09$"),
        (lambda: CressieReadBall(2.0, -1e-9), r"^radius must be at least 0, got -1e-09$"),
        (lambda: CressieReadBall(1.0, 0.1), r"^order must be greater than 1, got 1.0$"),
    ],
)
def test_the_edges_of_a_domain(build: Callable[[], AmbiguitySet], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_an_axis_of_one_entry_stays() -> None:
    worst = worst_case(np.asarray([[1.0, 2.0, 6.0]]), KLBall(0.1))
    assert [array.shape for array in flat(worst)] == [(1,), (1, 3), (1,), (1,)]


def test_orders_whose_product_with_the_radius_is_huge_fill_their_ball() -> None:
    ambiguity_set = CressieReadBall(1e8, 0.5)
    worst = worst_case(np.asarray([1.0, 2.0, 6.0]), ambiguity_set)
    assert divergence(ambiguity_set, worst.weights) == pytest.approx(0.5, rel=1e-5)


def test_the_edges_that_belong_to_a_domain() -> None:
    for ambiguity_set in (CVaR(1), CappedKLPenalty(0.5, 1), KLBall(0), ChiSquareBall(0), CressieReadBall(1.5, 0)):
        assert float(worst_case(np.asarray([1.0, 2.0, 6.0]), ambiguity_set).risk) == 3.0


X = np.asarray([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
YES = np.ones((2, 3), dtype=bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: worst_case(X, CVaR), TypeError, r"^ambiguity_set must be an ambiguity set .* CVaR\(0.1\), got <class"),
        (lambda: worst_case(X, 0.1), TypeError, r"^ambiguity_set must be an ambiguity set .* CVaR\(0.1\), got 0.1$"),
        (lambda: worst_case([1.0, 2.0], CVaR(0.5)), TypeError, "^losses must be an array, got list$"),
        (lambda: worst_case(1.0, CVaR(0.5)), TypeError, "^losses must be an array, got float$"),
        (
            lambda: worst_case(np.asarray([1, 2]), CVaR(0.5)),
            TypeError,
            "^losses must have a real floating dtype, got int64$",
        ),
        (lambda: worst_case(X, CVaR(0.5), xp=jnp), TypeError, r"^xp must be the namespace of losses .*, got jax"),
        (lambda: worst_case(X, CVaR(0.5), axis=0.0), TypeError, "^axis must be an integer, got 0.0$"),
        (lambda: worst_case(X, CVaR(0.5), axis=True), TypeError, "^axis must be an integer, got True$"),
        (
            lambda: worst_case(X, CVaR(0.5), axis=2),
            ValueError,
            r"^axis must be an axis of losses, which has shape \(2, 3\), got 2$",
        ),
        (
            lambda: worst_case(X, CVaR(0.5), axis=-3),
            ValueError,
            r"^axis must be an axis of losses, which has shape \(2, 3\), got -3$",
        ),
        (
            lambda: worst_case(np.asarray(1.0), CVaR(0.5)),
            ValueError,
            r"^axis must be an axis of losses, which has shape \(\), got -1$",
        ),
        (
            lambda: worst_case(X[:, :0], CVaR(0.5)),
            ValueError,
            r"^losses must have at least one entry along axis -1, got shape \(2, 0\)$",
        ),
        (lambda: worst_case(X, CVaR(0.5), where=True), TypeError, "^where must be an array, got bool$"),
        (
            lambda: worst_case(X, CVaR(0.5), where=torch.asarray(YES)),
            TypeError,
            r"^where must come from the library of losses \(numpy\), got an array of torch$",
        ),
        (lambda: worst_case(X, CVaR(0.5), where=X), TypeError, "^where must have dtype bool, got float64$"),
        (
            lambda: worst_case(X, CVaR(0.5), where=YES[:, :2]),
            ValueError,
            r"^where must broadcast to the shape of losses \(2, 3\), got \(2, 2\)$",
        ),
        (
            lambda: worst_case(X[0], CVaR(0.5), where=YES),
            ValueError,
            r"^where must broadcast to the shape of losses \(3,\), got \(2, 3\)$",
        ),
        (
            lambda: worst_case(X, CVaR(0.5), where=np.asarray([[True], [False]])),
            ValueError,
            "^where must mark at least one entry of every slice along axis -1, got 1 of 2 slices without any$",
        ),
        (
            lambda: worst_case(X, CVaR(0.5), axis=0, where=np.asarray([True, False, False])),
            ValueError,
            "^where must mark at least one entry of every slice along axis 0, got 2 of 3 slices without any$",
        ),
        (
            lambda: worst_case(np.where(X == 3, np.nan, X), CVaR(0.5)),
            ValueError,
            r"^losses must be finite and at most .* in size, got nan at position \(0, 2\)$",
        ),
        (
            lambda: worst_case(np.where(X == 3, -np.inf, X), CVaR(0.5)),
            ValueError,
            r"^losses must be finite and at most .* in size, got -inf at position \(0, 2\)$",
        ),
        (
            lambda: worst_case((1e37 * X).astype(np.float32), CVaR(0.5)),
            ValueError,
            r"^losses must be finite and at most 1.42e\+37 in size, got 1.99\S*e\+37 at position \(0, 1\)$",
        ),
        (
            lambda: worst_case(torch.asarray(X).requires_grad_(), CVaR(0.5)),
            ValueError,
            "^losses must not ask for autograd, .* got requires_grad=True$",
        ),
        (
            lambda: worst_case(
                strict.asarray(X), CVaR(0.5), where=strict.asarray(YES, device=strict.Device("device1"))
            ),
            ValueError,
            "^where must be on the device of losses .*, got .*device1",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_losses_up_to_the_limit_are_fine() -> None:
    limit = float(np.finfo(np.float32).max) / (8 * 3)
    x = np.asarray([1.0, -1.0, 0.5], dtype=np.float32) * np.float32(0.999 * limit)
    for ambiguity_set in ALL:
        if not isinstance(ambiguity_set, (KLPenalty, CappedKLPenalty, ChiSquarePenalty)):
            scaled, plain = worst_case(x, ambiguity_set), worst_case(np.asarray([1.0, -1.0, 0.5]), ambiguity_set)
            np.testing.assert_allclose(scaled.weights, plain.weights, rtol=0, atol=1e-5, err_msg=str(ambiguity_set))


def test_the_namespace_may_be_given() -> None:
    assert float(worst_case(X[0], CVaR(0.5), xp=np_namespace).risk) == pytest.approx(8 / 3)


@pytest.mark.parametrize("ambiguity_set", ALL, ids=repr)
def test_a_bad_slice_is_nan_and_spoils_no_other(ambiguity_set: AmbiguitySet) -> None:
    # What compiled code does, where no error can be raised: here without a compiler.
    losses = np.asarray([[1.0, 2.0, 4.0], [np.nan, 1.0, 2.0], [0.0, -5.0, 1.0], [1e308, 0.0, 1.0], [-1e308, 0.0, 1.0]])
    nothing_seen = np.asarray([[True, True, True]] * 2 + [[False] * 3] + [[True] * 3] * 2)
    everything = np.ones((5, 3), dtype=bool)
    for where, good in ((None, (0, 2)), (everything, (0, 2)), (nothing_seen, (0,))):
        found = ambiguity.solve(losses, ambiguity_set, -1, where, np.float64, np_namespace)
        columns = ambiguity.solve(
            losses.T, ambiguity_set, 0, None if where is None else where.T, np.float64, np_namespace
        )
        np.testing.assert_array_equal(columns.weights.T, found.weights)
        for row in range(5):
            if row in good:
                expected = worst_case(losses[row], ambiguity_set)
                np.testing.assert_allclose(found.risk[row], expected.risk, rtol=1e-12, atol=1e-12)
                np.testing.assert_allclose(found.weights[row], expected.weights, rtol=1e-9, atol=1e-12)
            else:
                assert np.isnan(found.risk[row])
                assert np.isnan(found.weights[row]).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_usable_loss_is_usable(sign: float) -> None:
    limit = ambiguity._largest_usable(np.zeros(3), 0, np_namespace)
    losses = np.asarray([0.0, sign * limit, 0.0])
    for where in (None, np.asarray([True, True, False])):
        assert np.isfinite(worst_case(losses, CVaR(0.5), where=where).risk)
        with pytest.raises(ValueError, match="losses must be finite and at most"):
            worst_case(losses * 1.0001, CVaR(0.5), where=where)
