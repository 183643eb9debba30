"""Checks of numbers and parameters: one error that names argument, rule and received value."""

from __future__ import annotations

import math
import re
from typing import Any

import array_api_compat.numpy as numpy_namespace
import array_api_compat.torch as torch_namespace
import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import drrho_core as core
from drrho_core import _array_api, _validate
from drrho_core._validate import FINITE, NOT_NEGATIVE, POSITIVE, UNIT_INTERVAL, Rule
from helpers.checks import ABOVE_ONE, DEVICE1


def test_descriptions_are_one_short_line() -> None:
    assert _validate.describe(np.zeros((2, 3))) == "ndarray of shape (2, 3) and dtype float64"
    assert _validate.describe("warm") == "'warm'"
    assert _validate.describe(list(range(100)))[-3:] == "..."
    assert len(_validate.describe(list(range(100)))) == 80
    assert _validate.describe("x" * 78) == repr("x" * 78)
    assert "\n" not in _validate.describe((np.zeros((2, 2)), np.ones((2, 2))))


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int8(2), np.float64(2)])
def test_every_real_type_becomes_a_float(value: Any) -> None:
    assert _validate.number("x", value, ABOVE_ONE) == 2.0
    assert type(_validate.number("x", value, FINITE)) is float


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (True, TypeError, "x must be a real number, got True"),
        (np.bool_(True), TypeError, "x must be a real number, got bool"),
        ("2", TypeError, "x must be a real number, got '2'"),
        (None, TypeError, "x must be a real number, got None"),
        (2j, TypeError, "x must be a real number, got 2j"),
        (np.zeros(2), TypeError, r"x must be a real number, got ndarray of shape \(2,\) and dtype float64"),
        (math.nan, ValueError, "x must be finite, got nan"),
        (-math.inf, ValueError, "x must be finite, got -inf"),
        pytest.param(10**400, ValueError, r"x must be finite, got 1000.*\.\.\.$", id="huge"),
        (1, ValueError, "x must be > 1, got 1"),
    ],
)
def test_bad_numbers_are_refused(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        _validate.number("x", value, ABOVE_ONE)


def test_static_numbers_may_be_arrays_without_axes(eager_space: Any) -> None:
    x = eager_space.asarray(np.asarray(2.5, dtype=eager_space.dtype_name))
    got = _validate.static_number("x", x, ABOVE_ONE)
    assert (got, type(got)) == (2.5, float)
    assert _validate.static_number("x", eager_space.asarray(np.asarray(3)), ABOVE_ONE) == 3.0


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.zeros(1), TypeError, r"x must be a real number, got ndarray of shape \(1,\)"),
        (np.asarray(True), TypeError, "x must be a real number, got ndarray of shape .* bool"),
        (np.asarray(0.5), ValueError, r"x must be > 1, got 0\.5"),
        (np.asarray(np.nan), ValueError, "x must be finite, got nan"),
        (torch.tensor(2.0, requires_grad=True), ValueError, "x must not require gradients"),
        ("2", TypeError, "x must be a real number, got '2'"),
    ],
)
def test_bad_static_numbers_are_refused(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        _validate.static_number("x", value, ABOVE_ONE)


def test_static_numbers_cannot_be_traced() -> None:
    import jax

    with pytest.raises(TypeError, match="x must be a constant when code is traced, got "):
        jax.jit(lambda x: _validate.static_number("x", x, ABOVE_ONE))(2.0)


def test_integers_are_checked_for_type_and_range() -> None:
    assert _validate.integer("x", np.int64(3), minimum=3) == 3
    assert type(_validate.integer("x", np.int64(3), minimum=3)) is int
    for bad, error, message in (
        (2, ValueError, "x must be at least 3, got 2"),
        (3.0, TypeError, r"x must be an integer, got 3\.0"),
        (True, TypeError, "x must be an integer, got True"),
        (None, TypeError, "x must be an integer, got None"),
    ):
        with pytest.raises(error, match=message):
            _validate.integer("x", bad, minimum=3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_option_comes_back_ready_to_compute_with(dtype: str) -> None:
    call = _validate.arrays({"x": np.zeros(3)})
    for value, expected in ((0.25, 0.25), (1, 1.0), (np.float32(0.5), 0.5), (1.0, 1.0)):
        got = call.option("p", value, UNIT_INTERVAL, np.dtype(dtype))
        assert (got, type(got)) == (expected, float)
    assert call.option("p", 0.0, NOT_NEGATIVE, np.dtype(dtype)) == 0.0
    assert call.option("p", np.asarray(0.5, dtype="f2"), UNIT_INTERVAL, np.dtype(dtype)).dtype == dtype
    pair = call.option("p", [np.ones(3), np.ones(3, dtype="f4")], UNIT_INTERVAL, np.dtype(dtype), per_anchor=3)
    assert [side.dtype for side in pair] == [dtype, dtype]
    for value, message in (
        (0.0, r"p must be in \(0, 1\], got 0\.0"),
        (-1.0, r"p must be in \(0, 1\], got -1\.0"),
        (1.5, r"p must be in \(0, 1\], got 1\.5"),
        (math.nan, "p must be finite, got nan"),
        (np.asarray(2.0), r"p must be in \(0, 1\], got 2\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call.option("p", value, UNIT_INTERVAL, np.dtype(dtype))
    with pytest.raises(ValueError, match="p must fit float32, and so must its inverse, got 1e-300"):
        call.option("p", 1e-300, UNIT_INTERVAL, np.dtype("float32"))


def parameter(value: Any, per_anchor: int | None = 3) -> Any:
    return _validate.parameter("tau", value, POSITIVE, np, per_anchor=per_anchor)


def test_parameters_are_returned_as_floats_arrays_or_pairs() -> None:
    assert parameter(np.float32(0.5)) == 0.5
    assert type(parameter(2)) is float
    scalar, pair = np.asarray(0.5), [np.ones(3), np.ones(3)]
    assert parameter(scalar) is scalar
    got = parameter(pair)
    assert type(got) is tuple
    assert got[0] is pair[0]
    assert got[1] is pair[1]


@pytest.mark.parametrize(
    ("value", "per_anchor", "error", "message"),
    [
        (0.0, 3, ValueError, r"tau must be > 0, got 0\.0"),
        (math.nan, 3, ValueError, "tau must be finite, got nan"),
        ("1", 3, TypeError, "tau must be a real number, got '1'"),
        (np.asarray(-1.0), 3, ValueError, r"tau must be > 0, got -1\.0"),
        (np.asarray(np.inf), 3, ValueError, "tau must be > 0, got inf"),
        (np.asarray(1), 3, TypeError, "tau must have a real floating dtype, got int64"),
        (np.ones(3), 3, ValueError, r"tau must be a scalar or a pair of arrays, one value per anchor, got"),
        (np.ones(3), None, ValueError, r"tau must be a scalar, got ndarray of shape \(3,\)"),
        ((np.ones(3),), 3, ValueError, r"tau must be a scalar or a pair \(image, text anchors\), got 1 entries"),
        ((np.ones(3),) * 3, 3, ValueError, "tau must be a scalar or a pair .*, got 3 entries"),
        ((np.ones(3), np.ones(2)), 3, ValueError, r"tau\[1\] must have shape \(batch_size,\) = \(3,\), got \(2,\)"),
        ((0.5, np.ones(3)), 3, TypeError, r"tau\[0\] must be an array of shape \(batch_size,\), got 0\.5"),
        ((np.ones(3), np.ones(3, dtype=int)), 3, TypeError, r"tau\[1\] must have a real floating dtype, got int64"),
        ((np.ones(3), np.array([1.0, 0, 1])), 3, ValueError, r"tau\[1\] must be > 0, got 0\.0 at position 1"),
        ((np.array([1, 1, np.nan]), np.ones(3)), 3, ValueError, r"tau\[0\] must be > 0, got nan at position 2"),
        ((np.array([1, 1, np.inf]), np.ones(3)), 3, ValueError, r"tau\[0\] must be > 0, got inf at position 2"),
        ((np.ones(3), np.ones(3)), None, TypeError, "tau must be a real number, got "),
    ],
)  # fmt: skip
def test_bad_parameters_are_refused(value: Any, per_anchor: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        parameter(value, per_anchor)


def test_arrays_are_not_inspected_while_a_compiler_traces() -> None:
    """torch.compile traces through this code, which no coverage sees: a namespace that says it is compiling."""
    from types import SimpleNamespace

    compiling = SimpleNamespace(
        __array_namespace_info__=None, compiler=SimpleNamespace(is_compiling=lambda: True), __name__="compiling"
    )
    assert _array_api.is_compiling(compiling)
    assert not _array_api.is_compiling(SimpleNamespace(compiler=SimpleNamespace(is_compiling=lambda: False)))
    assert not any(map(_array_api.is_compiling, (numpy_namespace, torch_namespace, jnp, array_api_strict)))
    assert _array_api.namespace_of({"x": object()}, compiling) is compiling
    assert not _array_api.values_visible(np.zeros(1), compiling)
    here, there = array_api_strict.zeros(1), array_api_strict.zeros(1, device=DEVICE1)
    call = _validate.arrays({"x": here, "y": there}, compiling)
    assert (call.xp, call.device, call.visible) == (compiling, None, False)
    _validate.values("x", np.full(1, np.nan), FINITE, compiling)


def fitting(value: Any, rule: Rule = POSITIVE) -> Any:
    return _validate.parameter("tau", value, rule, np, per_anchor=1, dtype=np.float32)


@pytest.mark.parametrize(
    "value", [1.2e-38, 2e37, 0.5, np.asarray(1.2e-38), np.asarray(2e37), np.asarray(1, dtype="float16")]
)
def test_numbers_are_accepted_if_the_dtype_holds_them_and_their_inverse(value: Any) -> None:
    assert fitting(value) == value
    assert fitting((np.full(1, float(value)),) * 2)[0] == value
    assert fitting(0.0, NOT_NEGATIVE) == 0
    assert fitting(3e38, NOT_NEGATIVE) == 3e38
    assert fitting(1e-45, NOT_NEGATIVE) == 1e-45


@pytest.mark.parametrize("value", [1e300, 1e-50, 1e-40, 2.2e37])
def test_numbers_that_the_dtype_does_not_hold_are_refused(value: float) -> None:
    message = rf"must fit float32, and so must its inverse, got {re.escape(str(value))}"
    for given in (value, np.asarray(value), (np.full(1, value), np.ones(1))):
        with pytest.raises(ValueError, match=message):
            fitting(given)


def test_a_broken_rule_is_reported_before_a_dtype_that_is_too_small() -> None:
    with pytest.raises(ValueError, match=r"tau must be > 0, got -1e\+300"):
        fitting(np.asarray(-1e300))
    with pytest.raises(ValueError, match=r"tau must fit float32, got 1e\+300"):
        fitting(1e300, NOT_NEGATIVE)
    with pytest.raises(ValueError, match="tau must be finite, got 1000"):
        fitting(10**400)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: core.excess_loss(x, x, reference_weight=1e300),
        lambda x: core.log_mean_exp_bias(x, batch_size=1, temperature=1e300),
        lambda x: core.generalization_bound(x, x, radius=1e300, num_samples=3),
        lambda x: core.generalization_bound(x, x, radius=1, num_samples=10**400),
        lambda x: core.moving_average_kl(x, x, 0.0, temperature=1e-300),
        lambda x: core.moving_average_kl(x, x, 1e300, temperature=1),
        lambda x: core.moving_average_kl(x, x, 0.0, temperature=1, gamma=1e-300),
        lambda x: core.scent_gamma(x, log_alpha=1e300),
        lambda x: core.log_inner_from_libauc_v1(x, temperature=1e-300, positive_similarity=x),
        lambda x: core.GlobalTemperature(0.5, like=x, maximum=1e300),
        lambda x: core.GlobalTemperature(0.5, like=x).update(1e300, learning_rate=0.1),
        lambda x: core.GlobalTemperature(0.5, like=x).update(1.0, learning_rate=1e300),
        lambda x: core.PerSampleTemperature(3, 0.5, like=x, minimum=1e-300),
        lambda x: core.InnerEstimator(10**400, like=x),
    ],
)
def test_a_number_too_large_or_too_small_for_its_type_is_refused(call: Any) -> None:
    for x in (np.full(2, 0.5, dtype="float32"), torch.full((2,), 0.5), jnp.full(2, 0.5, dtype="float32")):
        with pytest.raises(ValueError, match=r" must (fit |be finite|be finite and at most 1\.7e\+38)"):
            call(x)


def test_a_parameter_outside_its_domain_gives_nan_under_tracing() -> None:
    import jax

    x = jnp.asarray([0.5, 0.25])
    functions = {
        "gamma above 1": lambda p: core.moving_average_kl(x, x, 0.0, temperature=1, gamma=1 + p).risk,
        "gamma 0, never visited": lambda p: core.moving_average_kl(x, x, -jnp.inf, temperature=1, gamma=1 - p).risk,
        "temperature": lambda p: core.moving_average_kl(x, x, 0.0, temperature=1 - 2 * p).risk,
        "state": lambda p: core.moving_average_kl(x, x, jnp.where(p > 0, jnp.inf, p), temperature=1.0).risk,
        "reference_weight": lambda p: core.excess_loss(x, x, reference_weight=1 - 2 * p),
        "floor": lambda p: core.scent_gamma(x, log_alpha=1.0, gamma_floor=1 + p),
        "floor, never visited": lambda p: core.scent_gamma(x - jnp.inf, log_alpha=1.0, gamma_floor=1 - p),
        "radius": lambda p: core.generalization_bound(x, x, radius=1 - 2 * p, num_samples=3),
        "bias": lambda p: core.log_mean_exp_bias(x, batch_size=1, temperature=1 - 2 * p).measured,
        "rate": lambda p: core.update_temperature_rows(
            core.TemperatureRows(x, x), x, learning_rate=1 - 2 * p).temperature,
    }  # fmt: skip
    for name, function in functions.items():
        assert not np.isnan(np.asarray(jax.jit(function)(jnp.asarray(0.0)))).any(), name
        assert np.isnan(np.asarray(jax.jit(function)(jnp.asarray(1.0)))).all(), name


def test_a_pair_outside_its_domain_becomes_nan_under_tracing() -> None:
    import jax

    def inside(x: Any) -> Any:
        return _validate.within((x, 0.5), POSITIVE, jnp)[0]

    assert np.isnan(np.asarray(jax.jit(inside)(jnp.asarray([1.0, -1.0])))).tolist() == [False, True]
