"""Arguments as JAX users have them: NumPy arrays beside JAX's, mapped axes, meshes with explicit axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from drrho_core import _validate
from drrho_core._array_api import is_array, namespace_of
from drrho_core.state.table import check_index


def taken(name: str, value: Any, like: Any = None) -> Any:
    """Return a NumPy array as a JAX array, as JAX does: without 64-bit types float64 becomes float32.

    Parameters
    ----------
    name : str
        The argument, for messages.
    value : object
        A JAX array, a number or None is returned as it is; so is whatever the core's own checks refuse, such as a list.
    like : array, optional
        The NumPy array is put on the device of this JAX array.

    Raises
    ------
    TypeError
        If the value is an array of another library, a masked array or a matrix, or holds no numbers.
    ValueError
        If a number does not fit into the type that JAX converts to, such as 2**40 into int32.
    """
    if isinstance(value, jax.Array) or not is_array(value):
        return value
    namespace_of({name: value})  # refuses masked, sparse and other arrays that are not plain
    if type(value) not in (np.ndarray, np.memmap):
        raise TypeError(f"{name} must be an array of JAX or NumPy, got {type(value).__name__}")
    if value.dtype.hasobject or value.dtype.kind in "SUMm":
        raise TypeError(f"{name} must hold numbers, got {_validate.describe(value)}")
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    if dtype != value.dtype:
        _check_fits(name, value, dtype)
    return jnp.asarray(value, dtype=dtype, device=_one_device(like))


def taken_option(name: str, value: Any, like: Any = None) -> Any:
    """Return a number, an array or a pair of arrays, each NumPy array in it as `taken` returns it.

    A NumPy array without axes, which is how `numpy.load` returns a saved number, becomes a number: its value is then
    checked under tracing too, and it promotes nothing.
    """
    if isinstance(value, (tuple, list)):
        return tuple(taken(f"{name}[{side}]", member, like) for side, member in enumerate(value))
    if isinstance(value, np.generic) or (type(value) is np.ndarray and value.ndim == 0):
        return value.item()
    return taken(name, value, like)


def taken_index(sample_index: Any, num_samples: int, like: Any) -> Any:
    """Return a NumPy index as a JAX array after checking its values, which are readable even where code is traced.

    Raises
    ------
    TypeError, ValueError
        As `drrho_core.state.table.check_index` does.
    """
    if type(sample_index) in (np.ndarray, np.memmap):
        check_index(sample_index, num_samples, like=np.zeros(1), xp=np)
    return taken("sample_index", sample_index, like)


def _check_fits(name: str, value: np.ndarray, dtype: np.dtype) -> None:
    """Check that no number changes beyond rounding when it becomes `dtype`."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = value.astype(dtype)
        bad = np.isinf(narrow) & np.isfinite(value) if dtype.kind in "fc" else narrow != value
    if np.any(bad):
        position = np.unravel_index(int(np.argmax(bad)), value.shape)
        place = ", ".join(str(int(axis)) for axis in position)
        rule = f"{name} must fit into {dtype.name}, because jax_enable_x64 is off"
        raise ValueError(f"{rule}, got {value[position]} at position {place}")


def _one_device(like: Any) -> Any:
    """Return the device of a concrete array that lives on one device; None lets JAX choose."""
    if not isinstance(like, jax.Array) or isinstance(like, jax.core.Tracer):
        return None
    devices = like.devices()
    return next(iter(devices)) if len(devices) == 1 else None


def check_unmapped() -> None:
    """Check that the code is not inside `jax.shard_map` or `jax.pmap`, where a device sees its own shard only.

    `jax.vmap` is no such place: it maps over whole problems, and its axis is not one of the mesh.

    Raises
    ------
    ValueError
        If an axis of the mesh is mapped; the message names it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    mapped = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual]
    if mapped:
        names = ", ".join(repr(name) for name in mapped)
        raise ValueError(
            "contrastive_loss must be called outside jax.shard_map and jax.pmap, because each device would see the "
            "negatives of its own shard only (under jax.jit a sharded batch gives the loss of the whole batch), got "
            f"the mapped axis {names}"
        )


def check_placement(arrays: Any) -> None:
    """Check that the concrete arrays of a pytree can meet without a compiler: on single devices, or all placed alike.

    Raises
    ------
    ValueError
        If an array lies on several devices and another array lies elsewhere.
    """
    leaves = jax.tree.leaves(arrays)
    placed = [x.sharding for x in leaves if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    different = list(dict.fromkeys(placed))
    if len(different) > 1 and any(len(sharding.device_set) > 1 for sharding in different):
        one, other = (getattr(sharding, "spec", sharding) for sharding in different[:2])
        raise ValueError(
            "contrastive_loss must be called under jax.jit if its arrays lie on several devices in different ways, got "
            f"{one} and {other}"
        )


def on_auto_axes(function: Callable[..., Any], outputs_like: Any, /, *arrays: Any) -> Any:
    """Call `function` on arrays; where their mesh has explicit axes, let the compiler shard the inside.

    Explicit axes ask for a sharding of every intermediate result, and the logits have none: their rows and columns
    would lie on the same axis, that of the batch. Automatic axes ask for nothing.

    Parameters
    ----------
    function : callable
        Pure function of `arrays`.
    outputs_like : pytree
        The structure of the results: an array whose sharding the result gets, or None for a result on every device.
    arrays : pytrees of arrays

    Raises
    ------
    NotImplementedError
        If the axes are explicit and this version of JAX cannot leave them.
    """
    leaves, structure = jax.tree.flatten(arrays)
    shardings = [sharding for sharding in map(_explicit_sharding, leaves) if sharding is not None]
    context = jax.sharding.get_abstract_mesh()
    if not shardings and AxisType.Explicit not in context.axis_types:
        return function(*arrays)
    auto_axes = getattr(jax.sharding, "auto_axes", None)
    if auto_axes is None:
        raise NotImplementedError(
            "contrastive_loss must be given a mesh with AxisType.Auto in this version of JAX, got explicit axes"
        )
    mesh = shardings[0].mesh if shardings else context
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]

    def sharding_like(array: Any) -> Any:
        return _explicit_sharding(array) or everywhere

    # Only arrays are traced: numbers stay numbers, so that the core can check them.
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def inside(*traced: Any) -> Any:
        merged = list(leaves)
        for place, leaf in zip(places, traced, strict=True):
            merged[place] = leaf
        return function(*jax.tree.unflatten(structure, merged))

    outputs = jax.tree.map(sharding_like, outputs_like, is_leaf=lambda x: x is None)
    return auto_axes(inside, out_sharding=outputs)(*(leaves[place] for place in places))


def _explicit_sharding(array: Any) -> Any:
    """Return the array's sharding if its mesh has explicit axes, else None."""
    if not isinstance(array, jax.Array):
        return None
    sharding = getattr(jax.typeof(array), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is not None and AxisType.Explicit in mesh.axis_types else None
