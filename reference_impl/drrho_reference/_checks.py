"""All checks of the oracle's arguments; every message has the form ``ARGUMENT must RULE, got VALUE``."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Number: TypeAlias = float | npt.ArrayLike
Pair: TypeAlias = tuple[npt.ArrayLike, npt.ArrayLike]

__all__ = [
    "BoolArray",
    "FloatArray",
    "Number",
    "Pair",
    "anchor_weights",
    "feature_pair",
    "fraction",
    "gammas",
    "log_estimates",
    "mask",
    "non_negative",
    "number",
    "number_or_pair",
    "positive",
    "raw_array",
    "real_array",
    "real_matrix",
    "reference_pair",
    "state_number",
    "temperatures",
    "whole_number",
]


def number(argument: str, value: object) -> float:
    """Return a finite real number as a float; Python and NumPy numbers and 0-d arrays are accepted, bool is not."""
    # bool is a subclass of int in Python, but True is not accepted as a number.
    item = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(item, (bool, np.bool_)) or not isinstance(item, numbers.Real):
        raise TypeError(f"{argument} must be a real number, got {value!r}")
    result = float(item)
    if not math.isfinite(result):
        raise ValueError(f"{argument} must be finite, got {result}")
    return result


def positive(argument: str, value: object) -> float:
    """Return a finite number above 0."""
    result = number(argument, value)
    if result <= 0.0:
        raise ValueError(f"{argument} must be positive, got {result}")
    return result


def non_negative(argument: str, value: object) -> float:
    """Return a finite number of at least 0."""
    result = number(argument, value)
    if result < 0.0:
        raise ValueError(f"{argument} must be at least 0, got {result}")
    return result


def fraction(argument: str, value: object) -> float:
    """Return a number in (0, 1]."""
    result = number(argument, value)
    if not 0.0 < result <= 1.0:
        raise ValueError(f"{argument} must lie in (0, 1], got {result}")
    return result


def whole_number(argument: str, value: object, smallest: int, largest: int | None = None) -> int:
    """Return an integer of at least ``smallest`` and, if ``largest`` is given, at most ``largest``; bool is refused."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument} must be an integer, got {value!r}")
    result = int(value)
    if largest is not None and not smallest <= result <= largest:
        raise ValueError(f"{argument} must lie in [{smallest}, {largest}], got {result}")
    if result < smallest:
        raise ValueError(f"{argument} must be at least {smallest}, got {result}")
    return result


def raw_array(argument: str, value: object) -> npt.NDArray[Any]:
    """Return a value as an array of integers or floats and keep the dtype; the entries are not checked."""
    try:
        result = np.asarray(value)
    except ValueError as error:  # ragged nested lists
        raise ValueError(f"{argument} must be a rectangular array of real numbers, got {value!r}") from error
    # Only integers and floats are accepted: bool, complex and object arrays are mistakes of the caller.
    if result.dtype.kind not in "iuf":
        raise TypeError(f"{argument} must be an array of real numbers, got dtype {result.dtype}")
    return result


def real_array(argument: str, value: object, shape: tuple[int, ...] | None = None) -> FloatArray:
    """Return a finite float64 array; if a shape is given, the array must have this shape."""
    result = raw_array(argument, value).astype(np.float64)
    # The shape is checked before the values: a message about a wrong shape explains more than one about an entry.
    if shape is not None and result.shape != shape:
        raise ValueError(f"{argument} must have the shape {shape}, got {result.shape}")
    if not np.all(np.isfinite(result)):
        raise ValueError(f"{argument} must be finite, got {result[~np.isfinite(result)][0]} among its entries")
    return result


def real_matrix(argument: str, value: object) -> FloatArray:
    """Return a finite float64 array with two axes, neither of them empty."""
    result = real_array(argument, value)
    if result.ndim != 2 or 0 in result.shape:
        raise ValueError(f"{argument} must have two axes, neither of them empty, got the shape {result.shape}")
    return result


def mask(argument: str, value: object, shape: tuple[int, ...]) -> BoolArray:
    """Return an array of bool, broadcast to a shape."""
    result = np.asarray(value)
    if result.dtype != np.bool_:
        raise TypeError(f"{argument} must be an array of bool, got dtype {result.dtype}")
    try:
        return np.broadcast_to(result, shape)
    except ValueError as error:
        raise ValueError(f"{argument} must broadcast to the shape {shape}, got {result.shape}") from error


def number_or_pair(argument: str, value: object, batch_size: int) -> tuple[FloatArray, FloatArray, bool]:
    """Return one entry per image anchor, one per text anchor, and whether a pair of arrays was given.

    A number is repeated for every anchor. The domain is not checked here.
    """
    # The first array of a pair is for image anchors, the second for text anchors.
    if isinstance(value, Sequence) and not isinstance(value, str):
        # A sequence of any other length than 2 is a mistake: it is not read as one number per anchor.
        if len(value) != 2:
            raise ValueError(f"{argument} must be a number or a pair of arrays, got {len(value)} entries")
        image, text = (real_array(f"{argument}[{side}]", value[side], (batch_size,)) for side in (0, 1))
        return image, text, True
    if np.ndim(np.asarray(value)) != 0:
        raise TypeError(f"{argument} must be a number or a pair of arrays, got {type(value).__name__}")
    scalar = number(argument, value)
    return np.full(batch_size, scalar), np.full(batch_size, scalar), False


def feature_pair(
    first_name: str, first: npt.ArrayLike, second_name: str, second: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Return two matrices as finite float64 arrays, after checking that both have the same shape."""
    left = real_matrix(first_name, first)
    return left, real_array(second_name, second, left.shape)


def batch_size(argument: str, rows: FloatArray) -> int:
    """Return the number of rows, after checking that it is at least 2: a single row has no negatives."""
    b = len(rows)
    if b < 2:
        raise ValueError(f"{argument} must have at least 2 rows, got {b}")
    return b


def rows_per_rank(n: int, num_shards: object) -> int:
    """Return the number of rows that each of W = ``num_shards`` ranks holds, after checking that W divides n."""
    W = whole_number("num_shards", num_shards, 1, n)
    if n % W != 0:
        raise ValueError(f"num_shards must divide the {n} rows, got {W}")
    return n // W


def reference_pair(reference_features: Pair | None, b: int) -> tuple[FloatArray, FloatArray] | None:
    """Check the reference model's features: None, or two matrices of b rows and of the same number of columns."""
    if reference_features is None:
        return None
    if not isinstance(reference_features, Sequence) or len(reference_features) != 2:
        raise TypeError(f"reference_features must be a pair of arrays, got {type(reference_features).__name__}")
    pair = feature_pair("reference_features[0]", reference_features[0], "reference_features[1]", reference_features[1])
    if pair[0].shape[0] != b:
        raise ValueError(f"reference_features must have {b} rows, got {pair[0].shape[0]}")
    return pair


def log_estimates(argument: str, value: npt.ArrayLike, b: int) -> FloatArray:
    """Check logarithms of estimates: finite, or -inf for samples that were never visited."""
    result = raw_array(argument, value).astype(np.float64)
    if result.shape != (b,):
        raise ValueError(f"{argument} must have the shape {(b,)}, got {result.shape}")
    # -inf is legal: it is the logarithm of u = 0, which stands for a sample that was never visited.
    if np.any(np.isnan(result) | (result == np.inf)):
        raise ValueError(f"{argument} must be finite or -inf, got {result.tolist()}")
    return result


def state_number(argument: str, value: object) -> float:
    """Check the logarithm of one estimate: a finite number, or -inf if no batch was seen yet."""
    array = raw_array(argument, value)
    if array.ndim != 0:
        raise TypeError(f"{argument} must be a number, got an array of the shape {array.shape}")
    return float(log_estimates(argument, array.reshape(1), 1)[0])


def temperatures(temperature: Number | Pair, b: int) -> tuple[FloatArray, FloatArray, bool]:
    """Return one temperature per image anchor, one per text anchor, and whether a pair of arrays was given."""
    image, text, per_anchor = number_or_pair("temperature", temperature, b)
    # The smallest entry of both sides is checked and named in the message.
    smallest = min(image.min(), text.min())
    if smallest <= 0.0:
        raise ValueError(f"temperature must be positive, got {smallest}")
    return image, text, per_anchor


def gammas(gamma: Number | Pair, b: int) -> tuple[FloatArray, FloatArray]:
    """Return one gamma per image anchor and per text anchor."""
    image, text, _ = number_or_pair("gamma", gamma, b)
    for value in [*image, *text]:
        if not 0.0 < value <= 1.0:
            raise ValueError(f"gamma must lie in (0, 1], got {value}")
    return image, text


def anchor_weights(anchor_weight: npt.ArrayLike | Pair | None, b: int) -> tuple[FloatArray, FloatArray]:
    """Return one factor per image anchor and one per text anchor.

    None means that all factors are 1. Entry i of a single array is the factor of image anchor i and of text anchor i.
    """
    if anchor_weight is None:
        return np.ones(b), np.ones(b)
    # A sequence of two numbers is a single array for two pairs; a sequence of two arrays has one array per side.
    if isinstance(anchor_weight, Sequence) and len(anchor_weight) == 2 and np.ndim(anchor_weight[0]) > 0:
        image, text = (real_array(f"anchor_weight[{side}]", anchor_weight[side], (b,)) for side in (0, 1))
    else:
        image = text = real_array("anchor_weight", anchor_weight, (b,))
    smallest = min(image.min(), text.min())
    if smallest < 0.0:
        raise ValueError(f"anchor_weight must be at least 0, got {smallest}")
    return image, text
