"""Namespaces, devices and every validation: one error that names argument, rule and received value."""

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
from drrho_core._validate import BOOLEAN, FINITE, FLOATING, NOT_NEGATIVE, POSITIVE, STATE, UNIT_INTERVAL, Rule

ABOVE_ONE = Rule("be > 1", low=1.0)
DEVICE1 = array_api_strict.Device("device1")


class Pretender:
    """Looks like an array and is of no library."""

    dtype, shape, ndim = np.float64, (3,), 1


# ---------------------------------------------------------------------------------------------------------------------
# Namespaces and devices
# ---------------------------------------------------------------------------------------------------------------------


def test_is_array_accepts_arrays_and_no_numbers(eager_space: Any) -> None:
    assert _array_api.is_array(eager_space.asarray(np.zeros(3)))
    assert _array_api.is_array(eager_space.asarray(np.zeros((2, 3))))
    for other in (1, 1.5, True, np.float32(1.5), np.int64(3), [1.0], (1.0,), "a", None, np.float64, object()):
        assert not _array_api.is_array(other)


def test_arrays_of_one_library_share_a_namespace(eager_space: Any) -> None:
    x = eager_space.asarray(np.zeros(3))
    assert _array_api.namespace_of({"x": x, "y": x}) is eager_space.xp
    assert _array_api.namespace_of({"x": x}, eager_space.xp) is eager_space.xp


def test_xp_may_be_the_bare_library_if_it_follows_the_standard() -> None:
    assert _array_api.namespace_of({"x": np.zeros(1)}, np) is np


@pytest.mark.parametrize(
    ("arrays", "xp", "message"),
    [
        ({"x": [1.0]}, None, "x must be an array, got list"),
        ({"x": 1.0}, None, "x must be an array, got float"),
        ({"x": np.float64(1.0)}, None, "x must be an array, got float64"),
        ({"x": Pretender()}, None, "x must be an array of a supported library, got Pretender"),
        ({"x": np.zeros(1), "y": None}, None, "y must be an array, got NoneType"),
        ({"x": np.zeros(1), "y": torch.zeros(1)}, None, r"y must come from the library of x \(numpy\), got .*torch"),
        ({"x": jnp.zeros(1), "y": np.zeros(1)}, None, r"y must come from the library of x \(jax\.numpy\), got"),
        ({"x": np.zeros(1)}, torch_namespace, r"xp must be the namespace of x \(numpy\), got torch"),
        ({"x": torch.zeros(1)}, np, r"xp must be the namespace of x \(torch\), got numpy"),
        ({"x": torch.zeros(1)}, torch, "xp must be an Array API namespace such as .*, got <module 'torch'"),
        ({"x": np.zeros(1)}, "numpy", "xp must be an Array API namespace such as .*, got 'numpy'"),
        ({"x": np.zeros(1), "y": torch.zeros(1)}, np, "y must come from the library of x"),
        # The one that differs from the others is blamed, and xp decides where it is the namespace of some.
        ({"x": np.zeros(1), "y": jnp.zeros(1), "z": jnp.zeros(1)}, None,
         r"^x must come from the library of y \(jax\.numpy\), got an array of numpy"),
        ({"x": np.zeros(1), "y": torch.zeros(1)}, torch_namespace,
         r"^x must come from the library of y \(torch\), got an array of numpy"),
    ],
)  # fmt: skip
def test_mixed_namespaces_are_refused(arrays: Any, xp: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _array_api.namespace_of(arrays, xp)


def test_library_names_leave_out_the_wrapper() -> None:
    names = [_array_api.library(xp) for xp in (numpy_namespace, torch_namespace, jnp, array_api_strict)]
    assert names == ["numpy", "torch", "jax.numpy", "array_api_strict"]


def test_only_half_types_are_widened(eager_space: Any) -> None:
    xp = eager_space.xp
    assert _array_api.wide_dtype(xp.float32, xp) == xp.float32
    assert _array_api.wide_dtype(xp.float64, xp) == xp.float64
    for narrow in ("float16", "bfloat16"):
        if hasattr(xp, narrow):
            assert _array_api.wide_dtype(getattr(xp, narrow), xp) == xp.float32


def test_values_are_visible_on_the_host_only(eager_space: Any) -> None:
    x = eager_space.asarray(np.zeros(3))
    assert _array_api.values_visible(x, eager_space.xp) == (eager_space.name in ("numpy", "torch", "jax", "strict")
                                                         and "device1" not in str(eager_space.device)
                                                         and "cuda" not in str(eager_space.device).lower())  # fmt: skip


def test_index_assignment_is_detected_without_writing() -> None:
    def answer(array: Any, xp: Any) -> bool:
        before = np.asarray(array).tolist()
        result = _array_api.supports_index_assignment(array, xp)
        assert np.asarray(array).tolist() == before
        return result

    read_only = np.zeros(3)
    read_only.flags.writeable = False
    assert answer(np.zeros(3), numpy_namespace)
    assert answer(torch.zeros(3), torch_namespace)
    assert not answer(read_only, numpy_namespace)
    assert not answer(jnp.zeros(3), jnp)
    assert not answer(array_api_strict.zeros(3), array_api_strict)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


def test_wrong_dtypes_are_refused(eager_space: Any) -> None:
    xp, x = eager_space.xp, eager_space.asarray(np.zeros(3))
    whole = eager_space.asarray(np.zeros(3, dtype=np.int64))
    _validate.floating("x", x, xp)
    _validate.state_dtype("x", x, xp)
    call = _validate.arrays({"x": x, "y": x, "z": whole}, xp)
    call.same_dtype("x", "y")
    with pytest.raises(TypeError, match=r"x must have a real floating dtype, got .*int64"):
        _validate.floating("x", whole, xp)
    with pytest.raises(TypeError, match=r"x must have a real floating dtype, got .*int64"):
        _validate.state_dtype("x", whole, xp)
    with pytest.raises(TypeError, match=r"z must have the dtype of x \(.*float.*\), got .*int64"):
        call.same_dtype("x", "y", "z")
    with pytest.raises(TypeError, match=r"z must have a real floating dtype, got .*int64"):
        call.array("z", dtype_of="x")
    for narrow in ("float16", "bfloat16"):
        if hasattr(xp, narrow):
            half = xp.astype(x, getattr(xp, narrow))
            _validate.floating("x", half, xp)
            with pytest.raises(TypeError, match=f"x must be float32 or wider, got .*{narrow}"):
                _validate.state_dtype("x", half, xp)


def test_arrays_of_one_call_share_a_device() -> None:
    xp = array_api_strict
    here, there = xp.zeros(2), xp.zeros(2, device=DEVICE1)
    assert _validate.arrays({"x": here, "y": here}).device == here.device
    assert _validate.arrays({"x": there}, options={"y": there}).device == there.device
    with pytest.raises(ValueError, match=r"y must be on the device of x \(.*CPU_DEVICE.*\), got .*device1"):
        _validate.arrays({"x": here, "y": there, "z": here})
    with pytest.raises(ValueError, match=r"y\[1\] must be on the device of x \(.*CPU_DEVICE.*\), got .*device1"):
        _validate.arrays({"x": here}, xp, options={"w": 1.0, "y": (here, there), "z": None})


def test_a_tracer_has_no_device() -> None:
    import jax

    devices = []

    def function(x: Any, y: Any) -> Any:
        devices.append(_validate.arrays({"x": x, "y": jnp.zeros(2), "z": y}, jnp).device)
        return x

    jax.jit(function)(jnp.zeros(2), jnp.zeros(1))
    assert devices == [None]


def test_a_call_holds_the_arrays_among_the_options(eager_space: Any) -> None:
    x, scalar = eager_space.asarray(np.zeros(3)), eager_space.asarray(np.asarray(0.5))
    options = {"a": 1, "b": None, "c": scalar, "d": (scalar, 2.0), "e": [x, scalar]}
    call = _validate.arrays({"x": x}, options=options)
    assert list(call.arrays) == ["x", "c", "d[0]", "e[0]", "e[1]"]
    assert call.xp is eager_space.xp
    assert call.visible == _array_api.values_visible(x, eager_space.xp)


def test_an_array_of_a_call_is_checked_at_once(eager_space: Any) -> None:
    x = eager_space.asarray(np.array([[1.0, 2.0], [3.0, -4.0]]))
    mask = eager_space.asarray(np.zeros((2, 2), dtype=bool))
    call = _validate.arrays({"x": x, "mask": mask})
    assert call.array("x", axes=2, shape=(2, 2), meaning="(b, d)", dtype_of="x", rule=FINITE) is x
    assert call.array("mask", BOOLEAN) is mask
    bad: list[tuple[str, dict[str, Any], Any, str]] = [
        ("mask", {"kind": FLOATING}, TypeError, "mask must have a real floating dtype, got .*bool"),
        ("x", {"kind": BOOLEAN}, TypeError, "x must have dtype bool, got .*float"),
        ("x", {"axes": 1, "meaning": "(b,)"}, ValueError, r"^x must have 1 axes \(b,\), got shape \(2, 2\)$"),
        (
            "x",
            {"shape": (2, 3), "meaning": "(b, d)"},
            ValueError,
            r"x must have shape \(b, d\) = \(2, 3\), got \(2, 2\)",
        ),
        ("x", {"dtype_of": "mask"}, TypeError, r"x must have the dtype of mask \(.*bool.*\), got .*float"),
    ]
    if call.visible:
        bad.append(("x", {"rule": POSITIVE}, ValueError, r"x must be > 0, got -4\.0 at position \(1, 1\)"))
    for name, options, error, message in bad:
        with pytest.raises(error, match=message):
            call.array(name, **options)


def test_the_state_is_float32_or_wider() -> None:
    call = _validate.arrays({"x": np.zeros(2, dtype="f2"), "y": np.zeros(2, dtype="f4")})
    assert call.array("y", STATE).dtype == np.float32
    assert call.array("x").dtype == np.float16
    with pytest.raises(TypeError, match="x must be float32 or wider, got float16"):
        call.array("x", STATE)


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


@pytest.mark.parametrize("rule", [FINITE, POSITIVE, NOT_NEGATIVE, UNIT_INTERVAL, ABOVE_ONE, _validate.LOG_STATE,
                                  _validate.BELOW_ONE, _validate.OPEN_UNIT_INTERVAL])  # fmt: skip
def test_a_rule_is_the_same_for_numbers_and_arrays(rule: Rule) -> None:
    tiny = 5e-324
    for x in (-math.inf, -2.0, -tiny, 0.0, tiny, 0.5, 1.0 - 2**-53, 1.0, 1.0 + 2**-52, 3.0, math.inf, math.nan):
        expected = bool(rule.holds(x))
        assert np.asarray(rule.holds(np.asarray([x, x]))).tolist() == [expected] * 2
        for checks, allowed in (
            (lambda x=x: _validate.values("x", np.asarray([x]), rule, np), expected),
            (lambda x=x: _validate.number("x", x, rule), expected and math.isfinite(x)),
        ):
            if allowed:
                checks()
            else:
                with pytest.raises(ValueError, match="x must be "):
                    checks()


def test_wrong_shapes_are_refused() -> None:
    x = np.zeros((2, 3))
    _validate.shape("x", x, (2, 3), "(batch_size, feature_dim)")
    _validate.ndim("x", x, 2, "(batch_size, feature_dim)")
    with pytest.raises(ValueError, match=r"^x must have shape \(batch_size,\) = \(2,\), got \(2, 3\)$"):
        _validate.shape("x", x, (2,), "(batch_size,)")
    with pytest.raises(ValueError, match=r"^x must have 1 axes \(batch_size,\), got shape \(2, 3\)$"):
        _validate.ndim("x", x, 1, "(batch_size,)")


class Index:
    """Neither of Python nor of NumPy, and an index."""

    def __index__(self) -> int:
        return 1


@pytest.mark.parametrize("value", [0, 1, -1, -2, np.int64(1), np.uint8(1), Index(), np.asarray(1)])
def test_an_existing_axis_becomes_an_integer(value: Any) -> None:
    got = _validate.axis(value, "losses", np.zeros((2, 3)))
    assert (got, type(got)) == (value if isinstance(value, int) else 1, int)


def test_every_function_with_an_axis_takes_a_numpy_integer(eager_space: Any) -> None:
    x = eager_space.asarray(np.asarray([[0.25, 0.75], [0.75, 0.25]]))
    y = eager_space.asarray(np.asarray([[0.1, 0.2], [0.7, 0.5]]))
    for call in (
        lambda axis: core.worst_case(y, core.CVaR(0.5), axis=axis).risk,
        lambda axis: core.drrho_risk(y, 0.5 * x, core.CVaR(0.5), axis=axis).risk,
        lambda axis: core.effective_sample_size(x, axis=axis),
        lambda axis: core.log_mean_exp_bias(y, batch_size=1, axis=axis).measured,
    ):
        for axis, plain in ((np.int64(0), 0), (np.int8(-2), 0), (Index(), 1), (np.asarray(0), 0)):
            np.testing.assert_array_equal(eager_space.to_numpy(call(axis)), eager_space.to_numpy(call(plain)))


@pytest.mark.parametrize(
    ("value", "shape", "error", "message"),
    [
        (2, (2, 3), ValueError, r"axis must be an axis of losses, which has shape \(2, 3\), got 2"),
        (-3, (2, 3), ValueError, r"axis must be an axis of losses, which has shape \(2, 3\), got -3"),
        (0, (), ValueError, r"axis must be an axis of losses, which has shape \(\), got 0"),
        (1.0, (2, 3), TypeError, r"axis must be an integer, got 1\.0"),
        (True, (2, 3), TypeError, "axis must be an integer, got True"),
        (1, (2, 0), ValueError, r"losses must have at least one entry along axis 1, got shape \(2, 0\)"),
    ],
)
def test_a_missing_axis_is_refused(value: Any, shape: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        _validate.axis(value, "losses", np.zeros(shape))


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 3), (1, 3), (2, 1)])
def test_a_mask_may_broadcast(shape: Any) -> None:
    _validate.mask("where", np.ones(shape, dtype=bool), "losses", np.zeros((2, 3)), np)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 2), (1, 2, 3), (4, 3)])
def test_a_mask_may_not_grow(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"where must broadcast to the shape of losses \(2, 3\), got \("):
        _validate.mask("where", np.ones(shape, dtype=bool), "losses", np.zeros((2, 3)), np)


def test_a_mask_is_boolean() -> None:
    with pytest.raises(TypeError, match="where must have dtype bool, got int64"):
        _validate.mask("where", np.ones(3, dtype=np.int64), "losses", np.zeros(3), np)


def test_autograd_is_refused() -> None:
    x, asks = torch.zeros(2), torch.zeros(2, requires_grad=True)
    _validate.arrays({"x": torch.nn.Parameter(x).detach()})
    with pytest.raises(
        ValueError, match=r"y must not require gradients, .*detach .*, or use drrho_torch.*got requires_grad=True"
    ):
        _validate.arrays({"x": x, "y": asks})
    assert _validate.arrays({"x": x, "y": asks}, autograd=True).arrays["y"] is asks
    with torch.no_grad():
        _validate.arrays({"x": x, "y": asks})


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1.0, np.nan, np.inf]), "x must be finite, got nan at position 1$"),
        (np.array([[1.0, 2.0], [-np.inf, np.nan]]), r"x must be finite, got -inf at position \(1, 0\)$"),
        (np.array(np.nan), "x must be finite, got nan$"),
        (np.where(np.arange(24).reshape(2, 3, 4) == 23, np.inf, 0.0), r"got inf at position \(1, 2, 3\)$"),
    ],
)  # fmt: skip
def test_the_first_value_that_breaks_a_rule_is_shown(eager_space: Any, array: np.ndarray, message: str) -> None:
    given = eager_space.asarray(np.asarray(array, dtype=eager_space.dtype_name))
    if not _array_api.values_visible(given, eager_space.xp):
        _validate.values("x", given, FINITE, eager_space.xp)
        pytest.skip("values are looked at on the host only")
    with pytest.raises(ValueError, match=message):
        _validate.values("x", given, FINITE, eager_space.xp)


def test_integers_are_shown_as_integers(eager_space: Any) -> None:
    given = eager_space.asarray(np.array([3, -7]))
    if _array_api.values_visible(given, eager_space.xp):
        with pytest.raises(ValueError, match=r"x must be >= 0, got -7 at position 1$"):
            _validate.values("x", given, NOT_NEGATIVE, eager_space.xp)
    _validate.values("x", given, Rule("be >= -7", low=-7, includes_low=True), eager_space.xp)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Under a compiler
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that a dtype cannot hold, and values that nobody can look at
# ---------------------------------------------------------------------------------------------------------------------


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


def test_a_namespace_that_is_too_old_is_refused() -> None:
    from types import SimpleNamespace

    old = SimpleNamespace(__array_namespace_info__=None, __name__="numpy", __array_api_version__="2023.12")
    with pytest.raises(
        TypeError, match=r"^xp must be a library that follows the array API standard's version 2024\.12"
    ):
        _array_api.namespace_of({"x": np.zeros(1)}, old)
    for xp in (numpy_namespace, torch_namespace, jnp, array_api_strict):
        assert xp.__array_api_version__ >= _array_api.OLDEST
