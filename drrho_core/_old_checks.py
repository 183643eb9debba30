"""Checks that take a rule as a pair (function, text): here until every caller has switched to `_validate.Rule`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, is_array, namespace_of, values_visible


def number(
    name: str, value: object, holds: Callable[[Any], Any], rule: str, *, dtype: Any = None, xp: Namespace | None = None
) -> float:
    """Return a Python number after checking that it is real, finite, keeps a rule and fits a dtype if one is given."""
    checked = _validate.finite_number(name, value)
    if not holds(checked):
        raise ValueError(f"{name} must {rule}, got {value}")
    if dtype is not None:
        fits(name, checked, holds, dtype, xp)
    return checked


def fits(name: str, value: float, holds: Callable[[Any], Any], dtype: Any, xp: Namespace) -> None:
    """Check that a number stays finite in a dtype and, where its rule excludes 0, apart from 0, and its inverse too."""
    size = abs(value)
    if (size == 0 or 1e-30 <= size <= 1e30) and dtype in (xp.float32, xp.float64):
        return  # nearly always, and the limits need not be asked for
    smallest, largest, rule = _range(holds, dtype, xp)
    if not smallest <= size <= largest:
        raise ValueError(f"{name} must {rule}, got {value}")


def _range(holds: Callable[[Any], Any], dtype: Any, xp: Namespace) -> tuple[float, float, str]:
    """Return how small and how large a parameter may be in a dtype, and this in words.

    One that excludes 0 is divided by, and a library may multiply by the inverse instead, and may take what is below the
    smallest normal number for 0. So the inverse is a normal number, and a fourth of it.
    """
    info = xp.finfo(dtype)
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]
    if holds(0.0):
        return 0.0, float(info.max), f"fit {name}"
    smallest = float(info.smallest_normal)
    return smallest, 0.25 / smallest, f"fit {name}, and so must its inverse"


def within(value: Any, holds: Callable[[Any], Any], xp: Namespace) -> Any:
    """Return an array parameter with nan in place of what is outside its domain, where nobody could look.

    Under tracing no error can be raised; nan says that something is wrong, a number that looks right would not.
    """
    if isinstance(value, tuple):
        return tuple(within(member, holds, xp) for member in value)
    if not is_array(value) or values_visible(value, xp):
        return value
    return xp.where(xp.isfinite(value) & holds(value), value, xp.nan)


def static_number(name: str, value: Any, holds: Callable[[Any], Any], rule: str) -> float:
    """Return a Python number for a parameter that stays fixed; an array without axes is read once, where it can be."""
    if is_array(value):
        xp = namespace_of({name: value})
        _validate.detached({name: value}, xp)
        if value.ndim != 0 or not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be a real number, got {_validate.describe(value)}")
        try:
            value = float(value.detach() if hasattr(value, "detach") else value)
        except TypeError as error:
            raise TypeError(
                f"{name} must be a constant where code is traced, got {_validate.describe(value)}"
            ) from error
    return number(name, value, holds, rule)


def values(name: str, array: Array, holds: Callable[[Any], Any], rule: str, xp: Namespace) -> None:
    """Check a rule that holds elementwise, where looking is free, and show the first value that breaks it."""
    if not values_visible(array, xp):
        return
    good = holds(array)
    if bool(xp.all(good)):
        return
    position = int(xp.argmax(xp.astype(xp.reshape(~good, (-1,)), xp.int8)))
    first = xp.reshape(array, (-1,))[position]
    received = int(first) if xp.isdtype(array.dtype, "integral") else float(first)
    where = f" at position {_validate._unravel(position, tuple(array.shape))}" if array.ndim else ""
    raise ValueError(f"{name} must {rule}, got {received}{where}")


def parameter(
    name: str,
    value: Any,
    holds: Callable[[Any], Any],
    rule: str,
    xp: Namespace,
    *,
    per_anchor: int | None = None,
    sides: tuple[str, str] = ("image", "text"),
    dtype: Any = None,
) -> Any:
    """Check a number, a 0-d array or, where `per_anchor` is given, a pair of arrays with one value per anchor.

    Parameters
    ----------
    name : str
        The argument.
    value : number, array of shape () or pair of arrays of shape (per_anchor,)
        What was received; numbers come back as floats.
    holds : callable
        The rule, on floats and elementwise on arrays.
    rule : str
        The rule in words.
    xp : namespace
        The arrays' namespace.
    per_anchor : int, optional
        The length of the arrays of a pair; None where a pair is not allowed.
    sides : pair of str
        Whose anchors the first and the second array of a pair belong to.
    dtype : dtype, optional
        What the value is computed with: a number too large for it is refused, and one so small that it or its inverse
        is lost there, where the rule excludes 0. So are the values of a wider array.
    """
    if per_anchor is not None and isinstance(value, (tuple, list)):
        if len(value) != 2:
            pair = ", ".join(sides)
            raise ValueError(f"{name} must be a scalar or a pair ({pair} anchors), got {len(value)} entries")
        for position, array in enumerate(value):
            label = f"{name}[{position}]"
            if not is_array(array):
                raise TypeError(f"{label} must be an array of shape (batch_size,), got {_validate.describe(array)}")
            _validate.floating(label, array, xp)
            _validate.shape(label, array, (per_anchor,), "(batch_size,)")
            parameter_values(label, array, holds, rule, dtype, xp)
        return tuple(value)
    if is_array(value):
        _validate.floating(name, value, xp)
        if value.ndim != 0:
            either = "a scalar" if per_anchor is None else "a scalar or a pair of arrays, one value per anchor"
            raise ValueError(f"{name} must be {either}, got {_validate.describe(value)}")
        parameter_values(name, value, holds, rule, dtype, xp)
        return value
    return number(name, value, holds, rule, dtype=dtype, xp=xp)


def parameter_values(
    name: str, array: Array, holds: Callable[[Any], Any], rule: str, dtype: Any, xp: Namespace
) -> None:
    """Check, where looking is free, that an array is finite, keeps a rule and fits a dtype as a number has to."""

    def keeps(x: Array) -> Array:
        return xp.isfinite(x) & holds(x)

    if dtype is None:
        values(name, array, keeps, rule, xp)
        return
    smallest, largest, fit = _range(holds, dtype, xp)
    # A half type cannot hold more, nor can a comparison with it.
    largest = min(largest, float(xp.finfo(array.dtype).max))

    def keeps_and_fits(x: Array) -> Array:
        return keeps(x) & (xp.abs(x) >= smallest) & (xp.abs(x) <= largest)

    try:
        values(name, array, keeps_and_fits, fit, xp)
    except ValueError:
        values(name, array, keeps, rule, xp)  # the rule is the better reason, where that is broken, too
        raise
