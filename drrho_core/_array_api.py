"""Functions that the Array API standard lacks: namespace, dtype and device of arrays, and whether values can be read.

The type aliases `Array`, `Namespace`, `Scalar` and `PerAnchor` are defined here and nowhere else.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""An array of any namespace that follows the Array API standard."""

Namespace: TypeAlias = Any
"""A module that follows the Array API standard, such as ``array_api_compat.torch``."""

Scalar: TypeAlias = float | Array
"""A number or an array of shape ()."""

PerAnchor: TypeAlias = Scalar | tuple[Array, Array]
"""A scalar, or a pair of arrays (b,): one value per image anchor, and one value per text anchor, of a batch of b pairs.

An anchor is the image (or the text) that a loss compares with the texts (or the images) of the other pairs."""

OLDEST = "2024.12"
"""The oldest version of the Array API standard that a namespace may follow; newer ones are accepted, too."""

_NAMESPACES: dict[type, Namespace] = {}
"""The namespaces of all array types that have passed the check. Later arrays of such a type need only a look-up."""

_DENSE = "pass it as a dense array"
_NOT_PLAIN = {
    "MaskedArray": "pass its data, with where=~mask if the function has `where`, else without the masked entries",
    "MaskedNDArray": "pass its data, with where=~mask if the function has `where`, else without the masked entries",
    "MaskedTensor": "pass its data, with where=mask if the function has `where`, else without the masked entries",
    "matrix": "pass it as an array (asarray), because its products and axes are not those of arrays",
    "SparseArray": _DENSE,
    "JAXSparse": _DENSE,
    "spmatrix": _DENSE,
    "sparray": _DENSE,
}
"""Names of classes that look like arrays but behave differently, and for each the advice that the message gives. These
classes are the masked arrays of NumPy, astropy and torch, NumPy's matrix, and the sparse arrays of PyData, JAX, CuPy
and SciPy. Names are compared so that none of these libraries has to be imported."""


def is_array(value: object) -> bool:
    """Tell whether `value` has the attributes of an array and is no number; `namespace_of` is the full check.

    The function of array-api-compat is not used, because it has a cache, and torch.compile warns about caches.
    """
    # A NumPy scalar has these attributes, too, but is a number. A class of arrays has them, too, but is no array.
    has_attributes = hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "ndim")
    return has_attributes and not isinstance(value, (numbers.Real, type))


def is_compiling(xp: Namespace) -> bool:
    """Tell whether torch.compile is tracing functions of `xp`; the arrays themselves do not show this."""
    compiler = getattr(xp, "compiler", None)
    return compiler is not None and bool(compiler.is_compiling())


def device_of(array: Array) -> Any:
    """Return the array's device, or None for a tracer without one."""
    # array_api_compat.device is not used, because it has a cache, and torch.compile warns about caches.
    return getattr(array, "device", None)


def values_visible(array: Array, xp: Namespace) -> bool:
    """Tell whether the array's values can be read at no cost; see `all_visible`.

    The answer holds for this array only. A result that is computed from this array and from an array under a `vmap`
    cannot be read, although this array can. So call this function with the very array that is read, as `known` does.
    """
    return all_visible((array,), xp)


def all_visible(arrays: Iterable[Array], xp: Namespace) -> bool:
    """Tell whether the values of every array can be read at no cost: the arrays are concrete and lie on the host.

    A program that reads from an accelerator has to wait for it. Under tracing there are no values yet, and under a
    `vmap` without a compiler one array stands for many.
    """
    return not is_compiling(xp) and all_on_host(arrays, xp)


def all_on_host(arrays: Iterable[Array], xp: Namespace) -> bool:
    """Return the same as `all_visible`, for callers that know that torch.compile is not tracing."""
    for array in arrays:
        device = getattr(array, "device", None)
        # NumPy's devices are strings; other libraries' devices name their platform or type.
        if device != "cpu":
            kind = getattr(device, "platform", None) or getattr(device, "type", None) or str(device)
            if "cpu" not in str(kind).lower():
                return False
        # The wrappers of torch.func report the host as their device, but have no memory of their own.
        if hasattr(array, "untyped_storage") and not has_memory(array):
            return False
    # Under jax.jit the given arrays may be concrete, but every result computed from them is a tracer without values. In
    # this case a new array is a tracer as well, and a tracer has no device.
    return getattr(xp.zeros(()), "device", None) is not None


def has_values(array: Array, xp: Namespace) -> bool:
    """Tell whether the array has values, which the host can read if it waits for the device."""
    # As in `all_on_host`, a new array has no device under jax.jit.
    return not is_compiling(xp) and has_memory(array) and getattr(xp.zeros(()), "device", None) is not None


def has_memory(array: Array) -> bool:
    """Tell whether the numbers of a torch tensor lie in memory; for arrays of other libraries return True."""
    # The wrappers of torch.func have this method, but it raises an error.
    memory = getattr(array, "untyped_storage", None)
    if memory is not None:
        try:
            memory()
        except NotImplementedError:
            return False
    return True


def known(condition: Array, xp: Namespace) -> bool:
    """Tell whether a condition is known to hold for all entries; False may also mean that it cannot be read."""
    return values_visible(condition, xp) and bool(xp.all(condition))


def namespace_of(arrays: Mapping[str, Array], xp: Namespace | None = None) -> Namespace:
    """Return the one namespace of all `arrays`.

    Parameters
    ----------
    arrays : mapping of str to array
        Arguments by name.
    xp : namespace, optional
        The caller's namespace. Under torch.compile it is returned without a check of the arrays.

    Raises
    ------
    TypeError
        If an argument is no array or not a plain one (masked, sparse, of dtype object, or a matrix), if the arrays come
        from different libraries, if a library follows a version of the standard older than `OLDEST`, or if `xp` is not
        the namespace of the arrays.
    """
    return xp if xp is not None and is_compiling(xp) else common_namespace(arrays, xp)


def common_namespace(arrays: Mapping[str, Array], xp: Namespace | None = None) -> Namespace:
    """Return the one namespace of all `arrays` as `namespace_of` does; `xp` must not be compiling."""
    if xp is not None and not hasattr(xp, "__array_namespace_info__"):
        raise TypeError(f"xp must be an Array API namespace such as array_api_compat.torch, got {xp!r}")
    common: Namespace | None = None
    for name, array in arrays.items():
        # Find the library, and check that the type is that of a plain array.
        namespace = _NAMESPACES.get(type(array))
        if namespace is None:
            namespace = _namespace_of_type(name, array)
        # The type alone is not enough: sparse and nested tensors have the type of plain tensors, and a NumPy array can
        # hold objects.
        strided = getattr(namespace, "strided", None)
        if strided is not None and (array.layout is not strided or array.is_nested):
            kind = "a nested tensor" if array.is_nested else f"a tensor of layout {array.layout}"
            raise TypeError(f"{name} must be a plain array, got {kind}: {_DENSE}")
        if getattr(array.dtype, "kind", "") == "O":
            raise TypeError(f"{name} must be a plain array, got dtype object: pass numbers of a floating dtype")
        if common is None:
            common = namespace
        elif namespace is not common:
            raise TypeError(_stranger(arrays, xp))
    # Check the version of the standard; the string "none" is larger than every version.
    if not OLDEST <= getattr(common, "__array_api_version__", "none") < "none":
        raise TypeError(_outdated(next(iter(arrays)), common))
    if xp is None or xp is common:
        return common
    # A caller may name the bare library, such as numpy instead of array_api_compat.numpy.
    if library(xp) != library(common):
        raise TypeError(f"xp must be the namespace of {next(iter(arrays))} ({library(common)}), got {library(xp)}")
    if not OLDEST <= getattr(xp, "__array_api_version__", "none") < "none":
        raise TypeError(_outdated("xp", xp))
    return xp


def _namespace_of_type(name: str, array: Any) -> Namespace:
    """Return the namespace of an array of a new type, after checking that this is the type of a plain array."""
    # Base classes are checked, too, because a masked array of astropy is a subclass of a plain array.
    kind = type(array)
    for base in kind.__mro__:
        if base.__name__ in _NOT_PLAIN:
            remedy = _NOT_PLAIN[base.__name__]
            raise TypeError(f"{name} must be a plain array, got {kind.__module__}.{kind.__qualname__}: {remedy}")
    if not is_array(array):
        raise TypeError(f"{name} must be an array, got {kind.__name__}")
    try:
        namespace = array_api_compat.array_namespace(array)
    except TypeError as error:
        raise TypeError(f"{name} must be an array of a supported library, got {kind.__name__}") from error
    _NAMESPACES[kind] = namespace
    return namespace


def _stranger(arrays: Mapping[str, Array], xp: Namespace | None) -> str:
    """Return the message about the first array that is not of the expected library.

    The expected library is that of `xp`, or that of most arrays if no array is of the library of `xp`.
    """
    libraries = {
        name: library(_NAMESPACES.get(type(array)) or _namespace_of_type(name, array)) for name, array in arrays.items()
    }
    # The array that differs from most of the others is probably the mistake.
    every = list(libraries.values())
    expected = library(xp) if xp is not None and library(xp) in every else max(every, key=every.count)
    home = next(name for name, value in libraries.items() if value == expected)
    name, other = next((name, value) for name, value in libraries.items() if value != expected)
    return f"{name} must come from the library of {home} ({expected}), got an array of {other}"


def _outdated(name: str, xp: Namespace) -> str:
    """Return the message about a namespace whose version of the standard is too old."""
    subject = "xp must be" if name == "xp" else f"{name} must be an array of"
    return (
        f"{subject} a library that follows the array API standard's version {OLDEST} or a newer one, "
        f"got {library(xp)}, which reports version {getattr(xp, '__array_api_version__', 'none')}"
    )


def library(xp: Namespace) -> str:
    """Return the name of a namespace's library: ``torch`` for ``array_api_compat.torch``."""
    return str(xp.__name__).removeprefix("array_api_compat.")


def wide_dtype(dtype: Any, xp: Namespace) -> Any:
    """Return the dtype in which numbers of `dtype` are summed: float32 for float16 and bfloat16, else `dtype`."""
    return xp.float32 if xp.finfo(dtype).bits < 32 else dtype


def power_of_two(size: Array, xp: Namespace) -> Array:
    """Return ``2^floor(log2 size)``, or 1 for a size of 0; ``size`` divided by this number is exact and below 2."""
    size = xp.where(size > 0, size, xp.ones_like(size))
    return xp.pow(xp.full_like(size, 2.0), xp.floor(xp.log2(size)))


def supports_index_assignment(array: Array, xp: Namespace) -> bool:
    """Tell whether ``array[integer_array] = values`` works in place; the standard does not require this."""
    if not array_api_compat.is_writeable_array(array):
        return False
    # The assignment has to be tried, because array-api-strict accepts other kinds of assignment but not this kind.
    probe, value = (xp.zeros((1,), dtype=array.dtype, device=device_of(array)) for _ in range(2))
    try:
        probe[xp.zeros((1,), dtype=xp.int64, device=device_of(array))] = value
    except (IndexError, TypeError, ValueError):
        return False
    return True
