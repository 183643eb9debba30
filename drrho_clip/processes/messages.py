"""Values and arrays of all processes, exchanged as bytes: what a backend builds its `gather` methods from."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Exchange", "arrays_of_all", "values_of_all"]

Exchange: TypeAlias = Callable[[npt.NDArray[np.uint8]], list[npt.NDArray[np.uint8]]]
"""Returns the bytes of every process, in the order of the ranks; all processes pass equally many bytes."""

# Every exchange begins with a message of fixed size: the length of the value as text, and the text if it is short.
_FIRST, _LENGTH = 256, 8


def values_of_all(value: Any, exchange: Exchange) -> list[Any]:
    """Return the value of every process, in the order of the ranks; JSON can hold a value.

    Examples
    --------
    >>> values_of_all({"step": 3}, lambda message: [message, message])
    [{'step': 3}, {'step': 3}]
    """
    text = json.dumps(value).encode()
    room = _FIRST - _LENGTH
    first = len(text).to_bytes(_LENGTH, "little") + text[:room].ljust(room)
    received = exchange(np.frombuffer(first, dtype=np.uint8))
    lengths = [int.from_bytes(part[:_LENGTH].tobytes(), "little") for part in received]
    texts = [part[_LENGTH:] for part in received]
    # Most values are short, and need no second message.
    if max(lengths) > room:
        texts = exchange(np.frombuffer(text.ljust(max(lengths)), dtype=np.uint8))
    return [json.loads(part[:length].tobytes()) for part, length in zip(texts, lengths, strict=True)]


def arrays_of_all(array: npt.NDArray[Any], exchange: Exchange) -> list[npt.NDArray[Any]]:
    """Return the array of every process; the arrays may differ in shape and dtype.

    Examples
    --------
    >>> [part.tolist() for part in arrays_of_all(np.asarray([[1.5, 2.5]]), lambda message: [message, message])]
    [[[1.5, 2.5]], [[1.5, 2.5]]]
    """
    array = np.ascontiguousarray(array)
    described = values_of_all([array.dtype.str, list(array.shape)], exchange)
    forms = [(np.dtype(dtype), shape) for dtype, shape in described]
    sizes = [int(np.prod(shape)) * dtype.itemsize for dtype, shape in forms]
    message = np.zeros(max(sizes), dtype=np.uint8)
    message[: array.nbytes] = array.reshape(-1).view(np.uint8)
    received = exchange(message)
    return [
        part[:size].view(dtype).reshape(shape)
        for part, size, (dtype, shape) in zip(received, sizes, forms, strict=True)
    ]
