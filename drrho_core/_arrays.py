"""What the Array API standard leaves open: which namespace, which dtype, which device, what can be read now."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""An array of any namespace that follows the Array API standard."""

Namespace: TypeAlias = Any
"""A module that follows the Array API standard, such as ``array_api_compat.torch``."""


def is_array(value: object) -> bool:
    """Tell whether `value` looks like an array (numbers and numpy's scalars do not); `namespace_of` knows for sure.

    Looks decide, because torch.compile warns when it traces array-api-compat's own, cached question.
    """
    looks = all(hasattr(value, name) for name in ("dtype", "shape", "ndim"))
    return looks and not isinstance(value, (numbers.Real, type))


def is_compiling(xp: Namespace) -> bool:
    """Tell whether `xp` is being traced by a compiler that hides itself from the arrays (torch.compile)."""
    compiler = getattr(xp, "compiler", None)
    return compiler is not None and bool(compiler.is_compiling())


def device_of(array: Array) -> Any:
    """Return the array's device; None where a tracer has none."""
    return getattr(array, "device", None)  # array_api_compat.device asks through a cache that torch.compile warns of


def values_visible(array: Array, xp: Namespace) -> bool:
    """Tell whether looking at values is free of charge: a concrete array that lives on the host.

    On an accelerator a look costs a synchronisation. Under tracing there is nothing to look at yet, and under a `vmap`
    without a compiler an array stands for many. That holds for this array only: what is computed from it and from
    another may be mapped although it is not, so ask for the very array that is looked at (`known`).
    """
    if is_compiling(xp):
        return False
    device = device_of(array)
    kind = getattr(device, "platform", None) or getattr(device, "type", None) or str(device)
    if "cpu" not in str(kind).lower():
        return False
    # torch.func's wrappers say that they live on the host, but have no memory of their own.
    if not has_memory(array):
        return False
    # jax.jit lets concrete arrays in, but whatever is computed from them is a tracer: a fresh array tells.
    return device_of(xp.zeros(())) is not None


def has_memory(array: Array) -> bool:
    """Tell whether a tensor's numbers lie somewhere; other libraries' arrays are not asked."""
    memory = getattr(array, "untyped_storage", None)
    if memory is not None:
        try:
            memory()
        except NotImplementedError:
            return False
    return True


def known(condition: Array, xp: Namespace) -> bool:
    """Tell whether a condition holds everywhere, as far as a look is free; False may mean that nobody knows."""
    return values_visible(condition, xp) and bool(xp.all(condition))


def namespace_of(arrays: Mapping[str, Array], xp: Namespace | None = None) -> Namespace:
    """Return the one namespace of all `arrays`.

    Parameters
    ----------
    arrays : mapping of str to array
        Arguments by name.
    xp : namespace, optional
        What the caller says; under torch.compile the arrays themselves are not asked.

    Raises
    ------
    TypeError
        If an argument is no array, the arrays come from different libraries, or `xp` is not theirs.
    """
    if xp is not None:
        if not hasattr(xp, "__array_namespace_info__"):
            raise TypeError(f"xp must be an Array API namespace such as array_api_compat.torch, got {xp!r}")
        if is_compiling(xp):
            return xp
    first = ""
    found: Namespace | None = None
    for name, array in arrays.items():
        if not is_array(array):
            raise TypeError(f"{name} must be an array, got {type(array).__name__}")
        try:
            its = array_api_compat.array_namespace(array)
        except TypeError as error:
            raise TypeError(f"{name} must be an array of a supported library, got {type(array).__name__}") from error
        if found is None:
            first, found = name, its
        elif its is not found:
            raise TypeError(
                f"{name} must come from the library of {first} ({library(found)}), got an array of {library(its)}"
            )
    if xp is None:
        return found
    if library(xp) != library(found):
        raise TypeError(f"xp must be the namespace of {first} ({library(found)}), got {library(xp)}")
    return xp


def library(xp: Namespace) -> str:
    """Return a namespace's name without the wrapper's: ``torch`` for ``array_api_compat.torch``."""
    return str(xp.__name__).removeprefix("array_api_compat.")


def wide_dtype(dtype: Any, xp: Namespace) -> Any:
    """Return the dtype that sums of `dtype` are kept in: float32 for half types, else `dtype`."""
    return xp.float32 if xp.finfo(dtype).bits < 32 else dtype


def supports_index_assignment(array: Array, xp: Namespace) -> bool:
    """Tell whether ``array[integer_array] = values`` works in place; the standard does not promise it."""
    if not array_api_compat.is_writeable_array(array):
        return False
    probe, value = (xp.zeros((1,), dtype=array.dtype, device=device_of(array)) for _ in range(2))
    try:
        probe[xp.zeros((1,), dtype=xp.int64, device=device_of(array))] = value
    except (IndexError, TypeError, ValueError):
        return False
    return True
