"""Checks of the arguments of public functions. All error messages have one form: argument, rule, received value.

A public function calls `arrays` once. The result is a `Call`, which holds the arrays, their library and device, and
says whether all values can be read. Each method of a `Call` checks one argument. A rule is a named interval
(`POSITIVE`, `UNIT_INTERVAL`, ...), which is the same for a number and for the entries of an array.

Shapes, dtypes, namespaces and devices are always checked. Values are checked only if they can be read at no cost (see
`drrho_core._array_api.all_visible`). All checks run before anything is computed, so an error changes no state.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from drrho_core._array_api import (
    Array,
    Namespace,
    all_on_host,
    common_namespace,
    is_array,
    is_compiling,
    values_visible,
)


class Rule(NamedTuple):
    """An interval in which numbers and entries of arrays have to lie, and the words that follow "must" in the message.

    A rule is an interval and not a function, because then only the smallest and the largest entry of an array have to
    be compared with the bounds. In torch these two reductions take a ninth of the time that a test of each entry takes.
    """

    words: str
    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = False
    includes_high: bool = False

    def holds(self, x: Any) -> Any:
        """Return whether x lies in the interval, elementwise for an array; False for nan."""
        above = x >= self.low if self.includes_low else x > self.low
        below = x <= self.high if self.includes_high else x < self.high
        # `&` works for arrays, and for the bools that comparisons of Python numbers return.
        return above & below


FINITE = Rule("be finite")
POSITIVE = Rule("be > 0", low=0.0)
NOT_NEGATIVE = Rule("be >= 0", low=0.0, includes_low=True)
FINITE_NOT_NEGATIVE = NOT_NEGATIVE._replace(words="be finite and >= 0")
FINITE_POSITIVE = POSITIVE._replace(words="be finite and > 0")
UNIT_INTERVAL = Rule("be in (0, 1]", low=0.0, high=1.0, includes_high=True)
BELOW_ONE = Rule("be in [0, 1)", low=0.0, high=1.0, includes_low=True)
OPEN_UNIT_INTERVAL = Rule("be in (0, 1)", low=0.0, high=1.0)
LOG_STATE = Rule("be finite, or -inf for a sample that was never visited", includes_low=True)
"""The rule for logarithms of inner estimates: -inf marks a sample that was never visited."""

FLOATING = "real floating"
"""Kind of dtype: float16, bfloat16, float32 or float64."""

STATE = "float32 or wider"
"""Kind of dtype of the estimator's state. Half types (float16 and bfloat16) would round small updates away."""

BOOLEAN = "bool"
"""Kind of dtype of masks."""


def at_most_in_size(limit: float, words: str) -> Rule:
    """Return the rule ``-limit <= x <= limit``."""
    return Rule(words, -limit, limit, True, True)


class Call(NamedTuple):
    """The arrays of one call of a public function, and facts that hold for all of them; `arrays` builds this object."""

    arrays: Mapping[str, Array]
    xp: Namespace
    device: Any  # None under tracing
    visible: bool  # whether the values of every array can be read at no cost

    def array(
        self,
        name: str,
        kind: str = FLOATING,
        *,
        axes: int | None = None,
        shape: tuple[int, ...] | None = None,
        meaning: str = "",
        dtype_of: str | None = None,
        rule: Rule | None = None,
    ) -> Array:
        """Return an array of the call after checking it.

        Parameters
        ----------
        name : str
            The name of the argument.
        kind : str
            `FLOATING`, `STATE` or `BOOLEAN`.
        axes : int, optional
            The number of axes.
        shape : tuple of int, optional
            The exact shape.
        meaning : str
            The names of the axes, such as ``(batch_size, feature_dim)``.
        dtype_of : str, optional
            The name of another array of the call, whose dtype this array has to share.
        rule : Rule, optional
            The rule that every entry has to obey.
        """
        array, xp = self.arrays[name], self.xp
        # The dtype: nearly every array has float32 or float64, and then no other check is needed.
        if kind == BOOLEAN:
            if array.dtype != xp.bool:
                raise TypeError(f"{name} must have dtype bool, got {array.dtype}")
        elif array.dtype not in (xp.float32, xp.float64):
            floating(name, array, xp) if kind == FLOATING else state_dtype(name, array, xp)
        if dtype_of is not None and array.dtype != self.arrays[dtype_of].dtype:
            self.same_dtype(dtype_of, name)
        # The shape: first the number of axes, because the message about a wrong shape assumes the right number.
        if axes is not None and array.ndim != axes:
            raise ValueError(f"{name} must have {axes} axes {meaning}, got shape {tuple(array.shape)}")
        if shape is not None and tuple(array.shape) != shape:
            raise ValueError(f"{name} must have shape {meaning} = {shape}, got {tuple(array.shape)}")
        if rule is not None:
            # The values: if some array of the call cannot be read, this array may still be readable.
            if self.visible:
                visible_values(name, array, rule, xp)
            else:
                self.values(name, array, rule)
        return array

    def values(self, name: str, array: Array, rule: Rule) -> None:
        """Check that all entries of an array obey a rule, if they can be read at no cost; the array may be a result."""
        if self.visible or values_visible(array, self.xp):
            visible_values(name, array, rule, self.xp)

    def same_dtype(self, first: str, *others: str) -> None:
        """Check that arrays of the call share one dtype."""
        expected = self.arrays[first].dtype
        for name in others:
            if self.arrays[name].dtype != expected:
                raise TypeError(f"{name} must have the dtype of {first} ({expected}), got {self.arrays[name].dtype}")

    def option(
        self,
        name: str,
        value: Any,
        rule: Rule,
        dtype: Any,
        *,
        per_anchor: int | None = None,
        sides: tuple[str, str] = ("image", "text"),
    ) -> Any:
        """Check a parameter as `parameter` does and return it ready for computation.

        A number is returned as a Python float, which does not change the dtype of an array in an operation. An array is
        cast to `dtype`. If its values cannot be read, entries that break the rule become nan.
        """
        if type(value) is float and dtype in (self.xp.float32, self.xp.float64):
            # Nearly every option is a float of usual size inside the rule's interval, or 0 if the rule allows 0.
            inside = rule.low < value < rule.high and 1e-30 <= abs(value) <= 1e30
            if inside or (value == rule.low == 0.0 and rule.includes_low):
                return value
        if isinstance(value, (float, int)):
            return number(name, value, rule, dtype=dtype, xp=self.xp)
        # `within` gets the cast array, because an entry may leave the rule's interval when it is rounded to the dtype.
        checked = parameter(name, value, rule, self.xp, per_anchor=per_anchor, sides=sides, dtype=dtype)
        if isinstance(checked, float):
            return checked
        if isinstance(checked, tuple):
            return tuple(within(self.xp.astype(side, dtype), rule, self.xp) for side in checked)
        return within(self.xp.astype(checked, dtype), rule, self.xp)


def arrays(
    required: Mapping[str, Any],
    xp: Namespace | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    autograd: bool = False,
) -> Call:
    """Check that the arrays of a public call fit together, and determine the facts that hold for all of them.

    Parameters
    ----------
    required : mapping of str to array
        Arguments that have to be arrays, by name.
    xp : namespace, optional
        The caller's namespace. While torch.compile traces, this namespace is used without a check of the arrays.
    options : mapping, optional
        Arguments that may be arrays, numbers, None or pairs of these. Arrays among them are added to `required`; the
        arrays of a pair get the names ``name[0]`` and ``name[1]``.
    autograd : bool
        If True, arrays may require gradients of autograd. Wrappers that return such gradients pass True.

    Raises
    ------
    TypeError
        If an argument is no plain array, or the arrays come from different libraries: see `namespace_of`.
    ValueError
        If the arrays lie on different devices, or an array requires gradients although `autograd` is False.
    """
    # Step 1: the arrays among the options are added to the required ones.
    named = dict(required)
    for name, value in (options or {}).items():
        if isinstance(value, (tuple, list)):
            named.update({f"{name}[{place}]": member for place, member in enumerate(value) if is_array(member)})
        elif not isinstance(value, (float, int)) and value is not None and is_array(value):
            named[name] = value
    # Step 2: find the library. While torch.compile traces, this is the caller's; otherwise the arrays decide.
    compiling = xp is not None and is_compiling(xp)
    if not compiling:
        caller_xp, xp = xp, common_namespace(named, xp)
        compiling = caller_xp is None and is_compiling(xp)
    # Step 3: one loop checks autograd and the device.
    first, device = "", None
    for name, array in named.items():
        if not autograd and getattr(array, "requires_grad", False):
            _refuse_autograd(name, array, xp)
        # Tracers have no device, and the device of an array under torch.compile may be wrong.
        here = None if compiling else getattr(array, "device", None)
        if here is None or here == device:
            continue
        if device is not None:
            raise ValueError(f"{name} must be on the device of {first} ({device}), got {here}")
        first, device = name, here
    return Call(named, xp, device, not compiling and all_on_host(named.values(), xp))


def describe(value: object) -> str:
    """Describe a received value for a message, short enough for one line."""
    if is_array(value):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"  # type: ignore[attr-defined]
    text = str(value) if isinstance(value, numbers.Real) else " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def number(
    name: str,
    value: object,
    rule: Rule,
    *,
    dtype: Any = None,
    xp: Namespace | None = None,
) -> float:
    """Check that a number is real and finite, obeys a rule and fits `dtype` (if given), and return it as a float."""
    # Nearly every number is a float or a small integer; other types need more checks.
    if type(value) is float or (type(value) is int and -(2**53) < value < 2**53):
        checked = float(value)
    else:
        checked = _real(name, value)
    # `rule.holds` is not used here, because it would be one more call per option in every step.
    if (
        not (
            (rule.low < checked < rule.high)
            or (rule.includes_low and checked == rule.low)
            or (rule.includes_high and checked == rule.high)
        )
        or abs(checked) == math.inf
    ):
        unmet = rule.words if math.isfinite(checked) else "be finite"
        raise ValueError(f"{name} must {unmet}, got {describe(value)}")
    # A number of usual size fits into float32 and float64. Only other numbers are compared with the dtype's limits.
    if dtype is not None and not (
        (checked == 0.0 or 1e-30 <= abs(checked) <= 1e30) and dtype in (xp.float32, xp.float64)  # type: ignore[union-attr]
    ):
        fits(name, checked, rule, dtype, xp)
    return checked


def _real(name: str, value: object) -> float:
    """Return a real number as a float; an integer beyond the largest float becomes infinite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {describe(value)}")
    # Every real type of Python and NumPy has __float__.
    try:
        return float(value)
    except OverflowError:
        return math.inf


def fits(name: str, value: float, rule: Rule, dtype: Any, xp: Namespace) -> None:
    """Check that a dtype can hold a number and, if the rule excludes 0, the inverse of this number, too."""
    fit = _fitting(rule, dtype, xp)
    if not fit.holds(value):
        raise ValueError(f"{name} must {fit.words}, got {value}")


def _fitting(rule: Rule, dtype: Any, xp: Namespace) -> Rule:
    """Return the interval of the numbers that a dtype can hold for a parameter.

    A parameter that cannot be 0 is a divisor. A library may multiply by the inverse instead, and may replace numbers
    below the smallest normal number by 0. So the parameter must not be below this number, nor its inverse below 4 times
    this number.
    """
    info = xp.finfo(dtype)
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]
    if rule.holds(0.0):
        return at_most_in_size(float(info.max), f"fit {name}")
    smallest = float(info.smallest_normal)
    return Rule(f"fit {name}, and so must its inverse", smallest, 0.25 / smallest, True, True)


def within(value: Any, rule: Rule, xp: Namespace) -> Any:
    """Return an array parameter; if its values cannot be read, entries that break the rule are replaced by nan.

    Under tracing no error can be raised for a wrong value. Instead the results that depend on this value become nan.
    """
    if isinstance(value, tuple):
        return tuple(within(member, rule, xp) for member in value)
    # Numbers, and values that can be read, have been checked already.
    if not is_array(value) or values_visible(value, xp):
        return value
    return xp.where(xp.isfinite(value) & rule.holds(value), value, xp.nan)


def static_number(name: str, value: Any, rule: Rule) -> float:
    """Return a number or an array of shape () as a float; if code is traced, the array has to be a constant."""
    if not isinstance(value, (float, int)) and is_array(value):
        xp = arrays({name: value}).xp
        if value.ndim != 0 or not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be a real number, got {describe(value)}")
        # A tracer has no value: JAX raises a TypeError when a tracer is converted to a float.
        try:
            value = float(value.detach() if hasattr(value, "detach") else value)
        except TypeError as error:
            raise TypeError(f"{name} must be a constant when code is traced, got {describe(value)}") from error
    return number(name, value, rule)


def integer(name: str, value: object, *, minimum: int) -> int:
    """Return a Python integer after checking its type and range."""
    checked = _index(name, value)
    if checked < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {checked}")
    if checked >= 2**63:
        raise ValueError(f"{name} must fit int64, got {describe(value)}")
    return checked


def _index(name: str, value: Any) -> int:
    """Return a value of any type with ``__index__``, such as an integer of NumPy, as an int; a bool is refused."""
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
    """Check that the estimator's state is float32 or wider: half types would round small updates away."""
    floating(name, array, xp)
    if xp.finfo(array.dtype).bits < 32:
        raise TypeError(f"{name} must be float32 or wider, got {array.dtype}")


def _refuse_autograd(name: str, array: Array, xp: Namespace) -> None:
    """Refuse an array that requires gradients: autograd would treat results as constants and return wrong gradients.

    If autograd is off, as inside ``torch.no_grad()`` and ``torch.inference_mode()``, the array is accepted.
    """
    is_on = getattr(xp, "is_grad_enabled", None)
    if is_on is None or is_on():
        raise ValueError(
            f"{name} must not require gradients, because results are constants for autograd (detach {name}, or use "
            f"drrho_torch), got requires_grad={array.requires_grad}"
        )


def shape(name: str, array: Array, expected: tuple[int, ...], meaning: str) -> None:
    """Check that an array has the expected shape; `meaning` names the axes, such as ``(batch_size,)``."""
    if tuple(array.shape) != expected:
        raise ValueError(f"{name} must have shape {meaning} = {expected}, got {tuple(array.shape)}")


def ndim(name: str, array: Array, expected: int, meaning: str) -> None:
    """Check the number of axes."""
    if array.ndim != expected:
        raise ValueError(f"{name} must have {expected} axes {meaning}, got shape {tuple(array.shape)}")


def axis(value: object, name: str, array: Array) -> int:
    """Return an axis as a Python integer after checking that an array has this axis and entries along it."""
    raw, value = value, _index("axis", value)
    if not -array.ndim <= value < array.ndim:
        raise ValueError(f"axis must be an axis of {name}, which has shape {tuple(array.shape)}, got {describe(raw)}")
    if array.shape[value] == 0:
        raise ValueError(f"{name} must have at least one entry along axis {value}, got shape {tuple(array.shape)}")
    return value


def mask(name: str, array: Array, of: str, like: Array, xp: Namespace) -> None:
    """Check that an array is boolean and can be broadcast to the shape of the array `like`, whose name is `of`."""
    if not xp.isdtype(array.dtype, "bool"):
        raise TypeError(f"{name} must have dtype bool, got {array.dtype}")
    # Broadcasting compares the sizes of axes, the last axis first: each size has to be 1 or that of `like`.
    missing = like.ndim - array.ndim
    if missing < 0 or any(size not in (1, full) for size, full in zip(array.shape, like.shape[missing:], strict=True)):
        raise ValueError(f"{name} must broadcast to the shape of {of} {tuple(like.shape)}, got {tuple(array.shape)}")


def values(name: str, array: Array, rule: Rule, xp: Namespace) -> None:
    """Check the entries of an array as `visible_values` does, if they can be read at no cost."""
    if values_visible(array, xp):
        visible_values(name, array, rule, xp)


def visible_values(name: str, array: Array, rule: Rule, xp: Namespace) -> None:
    """Check that all entries of an array obey a rule; the message shows the first entry that does not obey the rule."""
    if 0 in array.shape:
        return
    # Only the smallest and the largest entry are compared. If any entry is nan, both are nan and fail the comparison.
    low, high = float(xp.min(array)), float(xp.max(array))
    if (rule.low < low or (rule.includes_low and low == rule.low)) and (
        high < rule.high or (rule.includes_high and high == rule.high)
    ):
        return
    # Find the first entry that breaks the rule. In a half type the comparison rounds the bounds, and may then find no
    # such entry. In this case no error is raised.
    flat = xp.reshape(array, (-1,))
    if xp.isdtype(array.dtype, "integral"):
        # The standard does not define comparisons of integer arrays with floats, so Python compares.
        broken = [place for place in range(flat.shape[0]) if not rule.holds(int(flat[place]))][:1]
    else:
        good = rule.holds(flat)
        broken = [] if bool(xp.all(good)) else [int(xp.argmax(xp.astype(~good, xp.int8)))]
    # `broken` holds at most one place.
    for place in broken:
        received = int(flat[place]) if xp.isdtype(array.dtype, "integral") else float(flat[place])
        where = f" at position {_unravel(place, tuple(array.shape))}" if array.ndim else ""
        raise ValueError(f"{name} must {rule.words}, got {received}{where}")


def _unravel(position: int, shape: tuple[int, ...]) -> tuple[int, ...] | int:
    """Turn a position in the flat array into an index: a tuple, or an integer for an array with one axis."""
    # Divide by the size of each axis, the last axis first; the remainders are the index.
    index: list[int] = []
    for size in reversed(shape):
        position, remainder = divmod(position, size)
        index.append(remainder)
    return index[0] if len(index) == 1 else tuple(reversed(index))


def parameter(
    name: str,
    value: Any,
    rule: Rule,
    xp: Namespace,
    *,
    per_anchor: int | None = None,
    sides: tuple[str, str] = ("image", "text"),
    dtype: Any = None,
) -> Any:
    """Check a number, a 0-d array or, if `per_anchor` is given, a pair of arrays with one value per anchor.

    Parameters
    ----------
    name : str
        The name of the argument.
    value : number, array of shape () or pair of arrays of shape (per_anchor,)
        The received value; a number is returned as a float.
    rule : Rule
        The rule that every number has to obey.
    xp : namespace
        The arrays' namespace.
    per_anchor : int, optional
        The length of the arrays of a pair; None if a pair is not allowed.
    sides : pair of str
        The names of the anchors that the first and the second array of a pair belong to.
    dtype : dtype, optional
        The dtype of the computation. Numbers that do not fit it are refused, also if they are entries of an array of a
        wider dtype; see `fits`.
    """
    # A pair of arrays, one per direction.
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
            parameter_values(label, array, rule, dtype, xp)
        return tuple(value)
    # An array of shape ().
    if is_array(value):
        floating(name, value, xp)
        if value.ndim != 0:
            either = "a scalar" if per_anchor is None else "a scalar or a pair of arrays, one value per anchor"
            raise ValueError(f"{name} must be {either}, got {describe(value)}")
        parameter_values(name, value, rule, dtype, xp)
        return value
    return number(name, value, rule, dtype=dtype, xp=xp)


def parameter_values(name: str, array: Array, rule: Rule, dtype: Any, xp: Namespace) -> None:
    """If an array can be read at no cost, check that its entries are finite, obey a rule and fit a dtype."""
    if not values_visible(array, xp):
        return
    # The rule is checked first, because its message is the more helpful one.
    visible_values(name, array, rule, xp)
    if dtype is not None:
        fit = _fitting(rule, dtype, xp)
        # The limits of a wider dtype would overflow in a comparison with an array of a half type.
        largest = min(fit.high, float(xp.finfo(array.dtype).max))
        visible_values(name, array, fit._replace(low=max(fit.low, -largest), high=largest), xp)
