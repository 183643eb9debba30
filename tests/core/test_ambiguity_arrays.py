"""Axes, masks, shapes and dtypes of the ambiguity sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as np_namespace
import array_api_compat.torch as torch_namespace
import jax.numpy as jnp
import numpy as np
import pytest

from drrho_core import (
    AmbiguitySet,
    CVaR,
    KLBall,
    WorstCase,
    worst_case,
)
from helpers.ambiguity import (
    ALL,
    KINDS,
    ROWS,
    SETS,
    N,
    flat,
    problem_rows,
)


@pytest.mark.parametrize("ambiguity_set", [SETS[kind][0] for kind in KINDS], ids=KINDS)
@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_an_axis_gives_the_same_as_slices_one_by_one(ambiguity_set: AmbiguitySet, axis: int) -> None:
    x = np.random.default_rng(7).normal(size=(3, 4, 5))
    worst = worst_case(x, ambiguity_set, axis=axis)

    def one_by_one(pick: Callable[[WorstCase], Any]) -> np.ndarray:
        return np.apply_along_axis(lambda v: pick(worst_case(v, ambiguity_set)), axis, x)

    for pick in (lambda a: a.risk, lambda a: a.weights, lambda a: a.dual[0], lambda a: a.dual[1]):
        np.testing.assert_allclose(pick(worst), one_by_one(pick), rtol=0, atol=1e-14)


def test_masks_broadcast_to_the_shape_of_the_losses(eager_space: Any) -> None:
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


def test_arguments_are_not_written_to() -> None:
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


def test_an_axis_of_one_entry_is_not_squeezed() -> None:
    worst = worst_case(np.asarray([[1.0, 2.0, 6.0]]), KLBall(0.1))
    assert [array.shape for array in flat(worst)] == [(1,), (1, 3), (1,), (1,)]


def test_namespace_can_be_passed() -> None:
    assert float(worst_case(np.asarray([1.0, 2.0, 3.0]), CVaR(0.5), xp=np_namespace).risk) == pytest.approx(8 / 3)
