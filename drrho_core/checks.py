"""Checks of arguments for code outside of the core (`drrho_core`): backends, `drrho_clip`, and losses of your own.

If a wrapper uses these functions, its error messages have the form of the core's messages: argument, rule, received
value. A rule is an interval such as `POSITIVE`, which applies to numbers and to the entries of arrays. Values of an
array are checked only if reading them is free; see `values_visible`.

Examples
--------
>>> number("gamma", 1.5, UNIT_INTERVAL)
Traceback (most recent call last):
    ...
ValueError: gamma must be in (0, 1], got 1.5
>>> integer("size", 3, minimum=1)
3
"""

from drrho_core._array_api import Array, Namespace, device_of, is_array, namespace_of, values_visible
from drrho_core._validate import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    UNIT_INTERVAL,
    Rule,
    arrays,
    describe,
    integer,
    ndim,
    number,
    parameter,
    shape,
    state_dtype,
)

__all__ = [
    "BELOW_ONE",
    "NOT_NEGATIVE",
    "POSITIVE",
    "UNIT_INTERVAL",
    "Array",
    "Namespace",
    "Rule",
    "arrays",
    "describe",
    "device_of",
    "integer",
    "is_array",
    "namespace_of",
    "ndim",
    "number",
    "parameter",
    "shape",
    "state_dtype",
    "values_visible",
]
