"""The ambiguity sets traced, compiled, in loops of a library, and piece by piece."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as np_namespace
import array_api_compat.torch as torch_namespace
import array_api_strict as strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from drrho_core import (
    AmbiguitySet,
    ChiSquareBall,
    CressieReadBall,
    CVaR,
    extend,
    worst_case,
)
from drrho_core._array_api import values_visible
from drrho_core._routines import repeat
from drrho_core.ambiguity import search, slices
from drrho_core.ambiguity.worst_case import solve_unchecked
from helpers.ambiguity import (
    ALL,
    KINDS,
    SETS,
    compiled,
    flat,
    problem_rows,
    solve,
)


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
    monkeypatch.setattr(search, "newton_steps", lambda: 2)
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
    # If reading a value costs a synchronisation, the loop does not test whether the steps may end early.
    worst_case(xp.zeros(6, device=xp.Device("device1")), CressieReadBall(3.0, 0.2))
    assert counts == [3, search.newton_steps()]  # a search over 6 losses, Newton's method


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
            monkeypatch.setattr(slices, "piece_length", lambda: 64)
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


@pytest.mark.parametrize("ambiguity_set", ALL, ids=repr)
def test_a_bad_slice_is_nan_and_spoils_no_other(ambiguity_set: AmbiguitySet) -> None:
    # What compiled code does, where no error can be raised: here without a compiler.
    losses = np.asarray([[1.0, 2.0, 4.0], [np.nan, 1.0, 2.0], [0.0, -5.0, 1.0], [1e308, 0.0, 1.0], [-1e308, 0.0, 1.0]])
    nothing_seen = np.asarray([[True, True, True]] * 2 + [[False] * 3] + [[True] * 3] * 2)
    everything = np.ones((5, 3), dtype=bool)
    for where, good in ((None, (0, 2)), (everything, (0, 2)), (nothing_seen, (0,))):
        found = solve_unchecked(losses, ambiguity_set, -1, where, np.float64, np_namespace)
        columns = solve_unchecked(
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
