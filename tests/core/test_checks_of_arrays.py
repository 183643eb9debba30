"""Checks of arrays, axes and masks: one error that names argument, rule and received value."""

from __future__ import annotations

import math
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
from helpers.checks import ABOVE_ONE, DEVICE1


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


def test_a_namespace_that_is_too_old_is_refused() -> None:
    from types import SimpleNamespace

    old = SimpleNamespace(__array_namespace_info__=None, __name__="numpy", __array_api_version__="2023.12")
    with pytest.raises(
        TypeError, match=r"^xp must be a library that follows the array API standard's version 2024\.12"
    ):
        _array_api.namespace_of({"x": np.zeros(1)}, old)
    for xp in (numpy_namespace, torch_namespace, jnp, array_api_strict):
        assert xp.__array_api_version__ >= _array_api.OLDEST
