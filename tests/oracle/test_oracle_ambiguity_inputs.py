"""The input of the oracle's worst_case: masks, slices, dtypes, and the errors of bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drrho_reference import (
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    worst_case,
)

from helpers.oracle_ambiguity import SETS


@pytest.mark.parametrize("ambiguity_set", SETS)
def test_where_is_the_same_as_leaving_entries_out(ambiguity_set: Any) -> None:
    losses = np.array([1.0, np.nan, -2.0, np.inf, 4.0, -np.inf, 0.5])
    counted = np.isfinite(losses)
    masked, shorter = worst_case(losses, ambiguity_set, where=counted), worst_case(losses[counted], ambiguity_set)
    assert masked.risk == shorter.risk
    assert masked.dual == shorter.dual
    np.testing.assert_array_equal(masked.weights[counted], shorter.weights)
    np.testing.assert_array_equal(masked.weights[~counted], 0.0)


def test_every_slice_is_a_problem_of_its_own() -> None:
    losses = np.random.default_rng(3).normal(size=(2, 5, 3))
    counted = np.array([[True], [True], [False], [True], [True]])  # broadcasts along the first and last axis
    for axis in (1, -2):
        result = worst_case(losses, ChiSquareBall(0.6), axis=axis, where=counted)
        assert (result.risk.shape, result.weights.shape) == ((2, 3), (2, 5, 3))
        for i in range(2):
            for j in range(3):
                alone = worst_case(losses[i, :, j], ChiSquareBall(0.6), where=counted[:, 0])
                assert (result.risk[i, j], result.dual[0][i, j], result.dual[1][i, j]) == (alone.risk, *alone.dual)
                np.testing.assert_array_equal(result.weights[i, :, j], alone.weights)


def test_no_slices_give_no_risks() -> None:
    result = worst_case(np.empty((0, 3)), CVaR(0.5))
    assert (result.risk.shape, result.weights.shape) == ((0,), (0, 3))


@pytest.mark.parametrize(
    "losses", [[1, 3, 2], np.array([1, 3, 2], dtype="uint8"), np.array([1, 3, 2], dtype="float32")]
)
def test_any_real_dtype_is_read_as_float64(losses: Any) -> None:
    result = worst_case(losses, CVaR(2 / 3))
    assert (result.risk.dtype, result.weights.dtype, result.dual[0].dtype) == (np.float64,) * 3
    assert float(result.risk) == 2.5


def test_inputs_are_not_written_to() -> None:
    losses, counted = np.array([1.0, 3.0, np.nan]), np.array([True, True, False])
    worst_case(losses, KLPenalty(1.0), where=counted)
    np.testing.assert_array_equal(losses, [1.0, 3.0, np.nan])
    np.testing.assert_array_equal(counted, [True, True, False])


def test_sets_are_values() -> None:
    assert CVaR(0.5) == CVaR(np.float32(0.5)) == CVaR(np.array(0.5))
    assert len({KLBall(1), KLBall(1.0), KLBall(2.0)}) == 2
    with pytest.raises(AttributeError, match="alpha"):
        CVaR(0.5).alpha = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CVaR(0.0), ValueError, r"alpha must lie in \(0, 1\], got 0.0"),
        (lambda: CVaR(1.5), ValueError, r"alpha must lie in \(0, 1\], got 1.5"),
        (lambda: CVaR(math.nan), ValueError, "alpha must be finite, got nan"),
        (lambda: CVaR("half"), TypeError, "alpha must be a real number, got 'half'"),
        (lambda: CVaR(True), TypeError, "alpha must be a real number, got True"),
        (lambda: CVaR([0.5]), TypeError, "alpha must be a real number"),
        (lambda: KLPenalty(0.0), ValueError, "temperature must be positive, got 0.0"),
        (lambda: KLPenalty(math.inf), ValueError, "temperature must be finite, got inf"),
        (lambda: KLBall(-1.0), ValueError, "radius must be at least 0, got -1.0"),
        (lambda: ChiSquarePenalty(-1.0), ValueError, "strength must be positive, got -1.0"),
        (lambda: ChiSquareBall(-1e-9), ValueError, "radius must be at least 0, got -1e-09"),
        (lambda: CressieReadBall(1.0, 0.5), ValueError, "order must be above 1, got 1.0"),
        (lambda: CressieReadBall(2.0, -0.5), ValueError, "radius must be at least 0, got -0.5"),
        (lambda: CappedKLPenalty(0.0, 0.5), ValueError, "temperature must be positive, got 0.0"),
        (lambda: CappedKLPenalty(1.0, 1.5), ValueError, r"alpha must lie in \(0, 1\], got 1.5"),
    ],
)
def test_sets_refuse_parameters_outside_their_domain(make: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("losses", "ambiguity_set", "options", "error", "message"),
    [
        ([1.0, np.nan], CVaR(0.5), {}, ValueError, r"losses must be finite where they count, got \[1.0, nan\]"),
        ([1.0, -np.inf], CVaR(0.5), {}, ValueError, "losses must be finite"),
        (1.0, CVaR(0.5), {}, ValueError, "losses must have at least one axis, got a 0-d array"),
        ([], CVaR(0.5), {}, ValueError, "losses must have an entry that counts in every slice"),
        ([[1.0], [1.0, 2.0]], CVaR(0.5), {}, ValueError, "losses must be a rectangular array"),
        (["a"], CVaR(0.5), {}, TypeError, "losses must be an array of real numbers, got dtype <U1"),
        ([True, False], CVaR(0.5), {}, TypeError, "losses must be an array of real numbers, got dtype bool"),
        ([1j], CVaR(0.5), {}, TypeError, "losses must be an array of real numbers, got dtype complex128"),
        ([1.0], "cvar", {}, TypeError, "ambiguity_set must be one of the ambiguity sets, got 'cvar'"),
        ([1.0], CVaR, {}, TypeError, "ambiguity_set must be one of the ambiguity sets"),
        ([1.0], CVaR(0.5), {"axis": 1}, ValueError, r"axis must lie in \[-1, 1\), got 1"),
        ([1.0], CVaR(0.5), {"axis": 0.0}, TypeError, "axis must be an integer, got 0.0"),
        ([1.0], CVaR(0.5), {"axis": False}, TypeError, "axis must be an integer, got False"),
        ([1.0, 2.0], CVaR(0.5), {"where": [1, 0]}, TypeError, "where must be an array of bool, got dtype int64"),
        ([1.0, 2.0], CVaR(0.5), {"where": [True] * 3}, ValueError, r"where must broadcast to the shape \(2,\)"),
        ([[1.0], [2.0]], CVaR(0.5), {"where": [[True], [False]]}, ValueError, "entry that counts in every slice"),
    ],
)
def test_worst_case_refuses_bad_input(losses: Any, ambiguity_set: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        worst_case(losses, ambiguity_set, **options)
