"""Every validation of the library and its message, in one voice: argument, rule, received value.

Shapes, dtypes, namespaces and devices are always checked. Values are checked where looking is free (see
`drrho_core._array_api.values_visible`). A check raises before anything is computed, so no state is lost.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any

from drrho_core._array_api import Array, Namespace, device_of, is_array, is_compiling, namespace_of, values_visible


def describe(value: object) -> str:
    """Say what was received, short enough for one line."""
    if is_array(value):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"  # type: ignore[attr-defined]
    text = str(value) if isinstance(value, numbers.Real) else " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def not_negative(x: Any) -> Any:
    """Tell whether x >= 0, for numbers and arrays."""
    return x >= 0


def finite_number(name: str, value: object) -> float:
    """Return a Python number after checking that it is a real, finite one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {describe(value)}")
    try:
        converted = float(value)
    except OverflowError:  # an integer beyond the largest float
        converted = math.inf
    if not math.isfinite(converted):
        raise ValueError(f"{name} must be finite, got {describe(value)}")
    return converted


def number(
    name: str, value: object, holds: Callable[[Any], Any], rule: str, *, dtype: Any = None, xp: Namespace | None = None
) -> float:
    """Return a Python number after checking that it is real, finite, keeps a rule and fits a dtype if one is given."""
    checked = finite_number(name, value)
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
        detached({name: value}, xp)
        if value.ndim != 0 or not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be a real number, got {describe(value)}")
        try:
            value = float(value.detach() if hasattr(value, "detach") else value)
        except TypeError as error:
            raise TypeError(f"{name} must be a constant where code is traced, got {describe(value)}") from error
    return number(name, value, holds, rule)


def integer(name: str, value: object, *, minimum: int) -> int:
    """Return a Python integer after checking its type and range."""
    checked = _index(name, value)
    if checked < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {checked}")
    if checked >= 2**63:
        raise ValueError(f"{name} must fit int64, got {describe(value)}")
    return checked


def _index(name: str, value: Any) -> int:
    """Return what Python takes as an index: its own integers, NumPy's, whatever has ``__index__``, but no bool."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer, got {describe(value)}")


def floating(name: str, array: Array, xp: Namespace) -> None:
    """Check that an array has a real floating dtype."""
    if not xp.isdtype(array.dtype, "real floating"):
        raise TypeError(f"{name} must have a real floating dtype, got {array.dtype}")


def state_dtype(name: str, array: Array, xp: Namespace) -> None:
    """Check that estimator state is float32 or wider: half types lose visits."""
    floating(name, array, xp)
    if xp.finfo(array.dtype).bits < 32:
        raise TypeError(f"{name} must be float32 or wider, got {array.dtype}")


def same_dtype(arrays: Mapping[str, Array]) -> None:
    """Check that all arrays share one dtype."""
    (first, reference), *rest = arrays.items()
    for name, array in rest:
        if array.dtype != reference.dtype:
            raise TypeError(f"{name} must have the dtype of {first} ({reference.dtype}), got {array.dtype}")


def same_device(arrays: Mapping[str, Array], xp: Namespace) -> None:
    """Check that all arrays live on one device (tracers have none and pass)."""
    if is_compiling(xp):
        return
    first, reference = "", None
    for name, array in arrays.items():
        device = device_of(array)
        if device is None:
            continue
        if reference is None:
            first, reference = name, device
        elif device != reference:
            raise ValueError(f"{name} must be on the device of {first} ({reference}), got {device}")


def shape(name: str, array: Array, expected: tuple[int, ...], meaning: str) -> None:
    """Check an exact shape; `meaning` spells it in names, such as ``(batch_size,)``."""
    if tuple(array.shape) != expected:
        raise ValueError(f"{name} must have shape {meaning} = {expected}, got {tuple(array.shape)}")


def ndim(name: str, array: Array, expected: int, meaning: str) -> None:
    """Check the number of axes."""
    if array.ndim != expected:
        raise ValueError(f"{name} must have {expected} axes {meaning}, got shape {tuple(array.shape)}")


def axis(value: object, name: str, array: Array) -> int:
    """Return an axis as a Python integer after checking that an array has it, and entries along it."""
    given, value = value, _index("axis", value)
    if not -array.ndim <= value < array.ndim:
        raise ValueError(f"axis must be an axis of {name}, which has shape {tuple(array.shape)}, got {describe(given)}")
    if array.shape[value] == 0:
        raise ValueError(f"{name} must have at least one entry along axis {value}, got shape {tuple(array.shape)}")
    return value


def mask(name: str, array: Array, of: str, like: Array, xp: Namespace) -> None:
    """Check that an array is boolean and broadcasts to another one's shape without growing it."""
    if not xp.isdtype(array.dtype, "bool"):
        raise TypeError(f"{name} must have dtype bool, got {array.dtype}")
    missing = like.ndim - array.ndim
    fits = missing >= 0 and all(mine in (1, its) for mine, its in zip(array.shape, like.shape[missing:], strict=True))
    if not fits:
        raise ValueError(f"{name} must broadcast to the shape of {of} {tuple(like.shape)}, got {tuple(array.shape)}")


def detached(arrays: Mapping[str, Array], xp: Namespace | None = None) -> None:
    """Refuse arrays that ask for autograd: core results are constants to it, so the gradient would be wrong.

    Where autograd is off, as inside ``torch.no_grad()`` and ``torch.inference_mode()``, no gradient is asked for.
    """
    for name, array in arrays.items():
        if getattr(array, "requires_grad", False):
            is_on = getattr(namespace_of({name: array}) if xp is None else xp, "is_grad_enabled", None)
            if is_on is not None and not is_on():
                return
            raise ValueError(
                f"{name} must not ask for autograd, because results are constants to it (detach it, or use "
                f"drrho_torch), got requires_grad={array.requires_grad}"
            )


def finite(name: str, array: Array, xp: Namespace) -> None:
    """Check that every value is finite, where looking is free."""
    # nan goes through a maximum, and two reductions take a ninth of what torch takes for all answers one by one.
    look = 0 not in array.shape and values_visible(array, xp)
    if look and bool(xp.isfinite(xp.max(array))) and bool(xp.isfinite(xp.min(array))):
        return
    values(name, array, xp.isfinite, "be finite", xp)


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
    where = f" at position {_unravel(position, tuple(array.shape))}" if array.ndim else ""
    raise ValueError(f"{name} must {rule}, got {received}{where}")


def _unravel(position: int, shape: tuple[int, ...]) -> tuple[int, ...] | int:
    """Turn a flat position into an index; a plain integer for one axis."""
    index: list[int] = []
    for size in reversed(shape):
        position, remainder = divmod(position, size)
        index.append(remainder)
    return index[0] if len(index) == 1 else tuple(reversed(index))


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
                raise TypeError(f"{label} must be an array of shape (batch_size,), got {describe(array)}")
            floating(label, array, xp)
            shape(label, array, (per_anchor,), "(batch_size,)")
            parameter_values(label, array, holds, rule, dtype, xp)
        return tuple(value)
    if is_array(value):
        floating(name, value, xp)
        if value.ndim != 0:
            either = "a scalar" if per_anchor is None else "a scalar or a pair of arrays, one value per anchor"
            raise ValueError(f"{name} must be {either}, got {describe(value)}")
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
