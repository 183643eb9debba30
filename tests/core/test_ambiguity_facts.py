"""Facts that hold for every ambiguity set, as properties: bounds, shifts, order, limits, relations between sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import (
    AmbiguitySet,
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    worst_case,
)
from helpers.ambiguity import (
    BALLS,
    KINDS,
    SETS,
    N,
    divergence,
    problem_rows,
    solve,
    tolerance,
)

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
