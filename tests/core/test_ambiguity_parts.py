"""The functions that the solvers of the ambiguity sets are made of, one by one, in NumPy."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest

from drrho_core import ChiSquarePenalty, CressieReadBall, CVaR, KLBall, worst_case
from drrho_core.ambiguity import balls, checks, rounding, search, searched, slices

FLOAT32 = np.finfo(np.float32)


def sorted_slices(losses: Any, number: int | None = None) -> slices.Slices:
    """Slices from the largest loss to the smallest, of which the first `number` count."""
    losses = np.asarray(losses, dtype=np.float64)
    n = losses.shape[-1]
    counted = np.broadcast_to(np.arange(n) < (n if number is None else number), losses.shape)
    count = np.sum(counted, axis=-1, keepdims=True)
    return slices.Slices(losses, counted, count, count.astype(np.float64), losses[..., :1])


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def test_all_losses_must_have_one_shape() -> None:
    arrays = {"loss": np.zeros((2, 3)), "reference_loss": np.zeros((3, 2))}
    with pytest.raises(ValueError, match=r"^reference_loss must have shape loss.shape = \(2, 3\), got \(3, 2\)$"):
        checks.check_losses(arrays, None, None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_are_checked_only_if_they_count(bad: float) -> None:
    losses = np.asarray([1.0, bad, 2.0])
    call = checks.check_losses({"losses": losses}, None, None)
    checks.check_values(call, "losses", losses, -1, np.asarray([True, False, True]))
    for where in (None, np.asarray([False, True, True])):
        with pytest.raises(ValueError, match="losses must be finite and at most"):
            checks.check_values(call, "losses", losses, -1, where)


def test_masked_slices_of_three_axes_are_problems_of_their_own() -> None:
    generator = np.random.default_rng(4)
    losses, where = generator.normal(size=(2, 3, 7)), generator.random((2, 3, 7)) < 0.7
    where[..., 0] = True
    for ambiguity_set in (CVaR(0.4), ChiSquarePenalty(0.5), CressieReadBall(1.5, 0.3)):
        together = worst_case(losses, ambiguity_set, where=where)
        for place in np.ndindex(2, 3):
            alone = worst_case(losses[place], ambiguity_set, where=where[place])
            assert float(together.risk[place]) == pytest.approx(float(alone.risk), rel=1e-13)
            np.testing.assert_allclose(together.weights[place], alone.weights, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dual_variables_of_cvar_have_shape_and_dtype_of_the_risk(dtype: str) -> None:
    worst = worst_case(np.arange(6, dtype=dtype).reshape(2, 3), CVaR(0.5))
    assert [(dual.shape, dual.dtype) for dual in worst.dual] == [(worst.risk.shape, worst.risk.dtype)] * 2
    assert worst.risk.dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------


def test_long_axes_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "piece_length", lambda: 128)

    def lengths(*shape: int) -> list[int]:
        whole = sorted_slices(np.zeros(shape))
        parts = slices.cut(whole, xp)
        np.testing.assert_array_equal(np.concatenate([part.losses for part in parts], axis=-1), whole.losses)
        assert all(part.counted.shape == part.losses.shape for part in parts)
        assert (parts == [whole]) == (len(parts) == 1)
        return [part.losses.shape[-1] for part in parts]

    def alone(*shape: int) -> bool:
        whole = sorted_slices(np.zeros(shape))
        return slices.cut(whole, xp)[0] is whole

    assert alone(128)
    assert alone(0, 64)
    assert lengths(300) == [128, 128, 44]
    assert lengths(4, 40) == [32, 8]
    assert lengths(1000, 5) == [2, 2, 1]  # many rows, but not one by one


def test_pieces_below_the_lowest_active_loss_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "piece_length", lambda: 4)
    ordered = sorted_slices([[9.0, 8, 7, 6, 5, 4, 3, 2]])

    def kept(lowest: float) -> list[float]:
        return [float(part.losses[0, 0]) for part in slices.cut_down_to(ordered, np.asarray([[lowest]]), xp)]

    assert kept(2.5) == [9.0, 5.0]
    assert kept(5.0) == [9.0, 5.0]  # the first of a part is its largest, and counts itself
    assert kept(5.5) == [9.0]
    monkeypatch.setattr(slices, "piece_length", lambda: 8)
    assert kept(9.5) == [9.0]  # one part stays, whatever is in it


def test_pieces_are_joined_and_summed() -> None:
    one, other = np.asarray([[1.0, 2.0]]), np.asarray([[3.0]])
    assert slices.join([one], xp) is one
    np.testing.assert_array_equal(slices.join([one, other], xp), [[1.0, 2.0, 3.0]])
    row = (np.asarray([[1.0]]), np.asarray([[10.0]]))
    assert slices.totals([row], xp) is row
    first, second = slices.totals([row, (np.asarray([[2.0]]), np.asarray([[20.0]]))], xp)
    assert (first.tolist(), second.tolist()) == ([[3.0]], [[30.0]])


def test_thinned_losses_are_means_of_runs() -> None:
    ordered = sorted_slices([[9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1]], number=9)
    thin = search.thinned(ordered, xp)
    assert thin.losses.tolist() == [[7.5, 3.5]]  # what is left over at the end is nobody's
    assert (thin.number.tolist(), thin.size.tolist(), thin.top.tolist()) == ([[2]], [[2.0]], [[7.5]])
    assert thin.size.dtype == np.float64
    assert thin.counted.tolist() == [[True, True]]
    few = search.thinned(sorted_slices([[3.0, 2, 1, 0]], number=3), xp)
    assert (few.number.tolist(), few.counted.tolist()) == ([[1]], [[True]])
    narrow = search.thinned(ordered._replace(losses=ordered.losses.astype(np.float32)), xp)
    assert narrow.size.dtype == np.float32


@pytest.mark.parametrize("early", [True, False], ids=["ends early", "all steps"])
@pytest.mark.parametrize("piece", [8, 10**6], ids=["thinned", "whole"])
def test_last_active_loss_is_found(piece: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "piece_length", lambda: piece)
    if not early:  # compiled code takes every step, and one too many must not move it
        repeat = search.repeat
        monkeypatch.setattr(search, "repeat", lambda *arguments, finished: repeat(*arguments))
    n, calls = 200, []
    losses = np.sort(np.random.default_rng(0).normal(size=n))[::-1].copy()
    ordered = sorted_slices(losses[None, :])
    for last in (0, 1, 2, 3, 4, 5, 7, 50, 98, 99, 100, 101, 150, 196, 197, 198, 199):

        def is_active(searched_slices: slices.Slices, loss: Any, border: float = float(losses[last])) -> Any:
            if searched_slices.losses.shape[-1] == n:
                calls.append(loss)
            return loss >= border

        calls.clear()
        assert search.last_active(ordered, is_active, xp).tolist() == [[last]]
        if early and piece == 8:  # the thinned losses have said where, to a few places
            assert len(calls) <= 6


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_product_minus_is_exact_where_it_cancels(dtype: Any) -> None:
    rng, eps = np.random.default_rng(1), float(np.finfo(dtype).eps)
    longest = 2**19 - 1  # with float32 that leaves five bits for a piece of the factor
    for factor in (*rng.uniform(0.0, 2.0, 40), 1 / 3, 2.0, 1e-7):
        for count in (longest, 1, int(rng.integers(1, longest))):
            other = round(factor * count)
            got = rounding.product_minus(factor, np.asarray([count], dtype), np.asarray([other], dtype), longest, xp)
            exact = Fraction(factor) * count - other
            assert got.dtype == dtype
            assert (
                abs(Fraction(float(got[0])) - exact)
                <= 4 * Fraction(eps) * abs(exact) + Fraction(factor) * count / 2**58
            )


def test_parameters_beyond_float32_get_a_unit() -> None:
    like, largest, smallest = np.zeros(1, np.float32), float(FLOAT32.max), float(FLOAT32.smallest_normal)
    for parameter, unit in ((1.0, 1.0), (largest, 1.0), (smallest, 1.0), (1e50, 2.0**100), (1e-60, 2.0**-100)):
        value, used = rounding.in_units(parameter, like, xp)
        assert used == unit
        assert value * used == parameter
    assert rounding.in_units(1e300, like, xp) == (largest, 2.0**100)
    assert rounding.in_units(1e-300, like, xp) == (smallest, 2.0**-100)


def test_distances_in_a_tiny_unit_are_capped() -> None:
    distance = np.asarray([0.5, 1.5, 1e30])
    assert rounding.distance_in_units(distance, 1.0, xp).tolist() == [0.5, 1.5, 1e30]
    assert rounding.distance_in_units(distance, 4.0, xp).tolist() == [0.125, 0.375, 2.5e29]
    assert rounding.distance_in_units(distance, 0.25, xp).tolist() == [2.0, 4.0, 4.0]


def test_products_beyond_the_dtype_are_infinite() -> None:
    largest = FLOAT32.max
    scale = np.asarray([largest * np.float32(0.75), np.float32(3.0), largest / np.float32(4)], np.float32)
    for unit, expected in ((1.0, scale.tolist()), (4.0, [np.inf, 12.0, np.inf]), (0.5, (scale / 2).tolist())):
        got = rounding.product_or_inf(scale, np.asarray(unit, np.float32), xp)
        assert got.tolist() == expected


def test_a_balance_below_its_rounding_error_is_zero() -> None:
    eps = float(np.finfo(np.float64).eps)
    for sign in (1.0, -1.0):

        def balance(total: float, sign: float = sign) -> float:
            # The terms are 1, -3 and 2, whose sizes sum to 6.
            return float(balls.balance(np.asarray(sign * (1.0 + total)), (-sign * 3.0, np.asarray(sign * 2.0)), xp))

        assert balance(eps) == 0.0
        assert balance(2 * eps) == sign * 2 * eps
    assert float(balls.balance(np.asarray(0.0), (np.asarray(0.0), 0.0), xp)) == 0.0


def test_growth_beyond_every_axis_is_capped() -> None:
    assert balls.exp_minus_one(1e9) == math.expm1(50.0)
    assert balls.exp_minus_one(1e-20) == 1e-20


@pytest.mark.parametrize("ambiguity_set", [KLBall(0.5), CressieReadBall(3.0, 0.5), CressieReadBall(1.5, 0.1)], ids=repr)
def test_a_search_ends_early_when_it_has_converged(ambiguity_set: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, root = [], searched.find_root

    def counted(surplus: Any, *arguments: Any) -> Any:
        def each(position: Any) -> Any:
            steps.append(position)
            return surplus(position)

        return root(each, *arguments)

    monkeypatch.setattr(searched, "find_root", counted)
    worst_case(np.random.default_rng(2).normal(size=1000), ambiguity_set)
    assert 2 <= len(steps) <= 8


def test_a_strength_beyond_float32_has_the_dual_of_the_mean() -> None:
    losses = np.asarray([-1.0, 0.5, 2.0], np.float32)
    for strength in (1e6, 1e50):  # both leave the weights uniform, and then nu is the mean
        found = worst_case(losses, ChiSquarePenalty(strength))
        assert float(found.dual[0]) == pytest.approx(0.5, abs=1e-6)
        assert float(found.dual[1]) == pytest.approx(min(strength, float(FLOAT32.max)))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_last_newton_step_removes_the_rounding_of_the_logarithm(scale: float) -> None:
    # log(1e30) is 69, half a unit of which is 4e-6 of s in float32.
    for seed in range(8):
        losses = np.random.default_rng(seed).normal(size=40).astype(np.float32)
        exact = float(worst_case(losses.astype(np.float64), KLBall(0.5)).dual[1])
        got = float(worst_case((losses * scale).astype(np.float32), KLBall(0.5)).dual[1])
        assert got / scale == pytest.approx(exact, rel=1e-6)
