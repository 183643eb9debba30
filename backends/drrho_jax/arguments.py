"""Arguments of the JAX functions: NumPy arrays become JAX arrays; meshes are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from drrho_core import checks
from drrho_core.state.table import check_index

Tree = TypeVar("Tree")


def as_jax_array(name: str, value: Any, like: Any = None) -> Any:
    """Return a NumPy array as a JAX array; without 64-bit types float64 becomes float32, as everywhere in JAX.

    Parameters
    ----------
    name : str
        Name of the argument, for messages.
    value : object
        A JAX array, a number or None is returned unchanged. Another value that is no array, such as a list, is returned
        unchanged too; the checks of the core (`drrho_core`) refuse such a value.
    like : array, optional
        The NumPy array is copied to the device of this JAX array.

    Raises
    ------
    TypeError
        If the value is an array of another library, a masked array or a matrix, or does not hold numbers.
    ValueError
        If a number does not fit into the type that JAX converts to, such as 2**40 into int32.
    """
    if isinstance(value, jax.Array) or not checks.is_array(value):
        return value
    # `namespace_of` refuses masked, sparse and other special arrays. The next check refuses arrays of other libraries.
    checks.namespace_of({name: value})
    if type(value) not in (np.ndarray, np.memmap):
        raise TypeError(f"{name} must be an array of JAX or NumPy, got {type(value).__name__}")
    if value.dtype.hasobject or value.dtype.kind in "SUMm":
        raise TypeError(f"{name} must hold numbers, got {checks.describe(value)}")
    # Without a warning, JAX would drop the upper bits of an integer that does not fit into 32 bits.
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    if dtype != value.dtype:
        _check_fits(name, value, dtype)
    return jnp.asarray(value, dtype=dtype, device=_one_device(like))


def as_jax_option(name: str, value: Any, like: Any = None) -> Any:
    """Return a number, an array or a pair of arrays, with `as_jax_array` applied to each NumPy array.

    A NumPy array without axes becomes a number; `numpy.load` returns saved numbers in this form.
    """
    if isinstance(value, (tuple, list)):
        return tuple(as_jax_array(f"{name}[{side}]", member, like) for side, member in enumerate(value))
    # A number has two advantages: the core checks its value even under tracing, and it changes no result's dtype.
    if isinstance(value, np.generic) or (type(value) is np.ndarray and value.ndim == 0):
        return value.item()
    return as_jax_array(name, value, like)


def as_jax_index(sample_index: Any, num_samples: int, like: Any) -> Any:
    """Return a NumPy index as a JAX array, after checking the values: they can be read even if code is traced.

    Raises
    ------
    TypeError, ValueError
        As `drrho_core.state.table.check_index` does.
    """
    # The NumPy array is checked, because a JAX array made under tracing has no values that can be read.
    if type(sample_index) in (np.ndarray, np.memmap):
        check_index(sample_index, num_samples, like=np.zeros(1), xp=np)
    return as_jax_array("sample_index", sample_index, like)


def as_constants(tree: Tree) -> Tree:
    """Return a pytree whose arrays are constants of differentiation; numbers and None are returned unchanged."""
    result: Tree = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree)
    return result


def _check_fits(name: str, value: np.ndarray, dtype: np.dtype) -> None:
    """Check that the conversion to `dtype` changes no number beyond rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = value.astype(dtype)
        # A floating-point number may be rounded but must not overflow; an integer must stay equal.
        bad = np.isinf(narrow) & np.isfinite(value) if dtype.kind in "fc" else narrow != value
    if np.any(bad):
        position = np.unravel_index(int(np.argmax(bad)), value.shape)
        place = ", ".join(str(int(axis)) for axis in position)
        rule = f"{name} must fit into {dtype.name}, because jax_enable_x64 is off"
        raise ValueError(f"{rule}, got {value[position]} at position {place}")


def _one_device(like: Any) -> Any:
    """Return the device of a concrete array on a single device; None lets JAX choose."""
    if not isinstance(like, jax.Array) or isinstance(like, jax.core.Tracer):
        return None
    # Inside shard_map and pmap an array belongs to the mapped devices, although `like` comes from outside.
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        return None
    devices = like.devices()
    return next(iter(devices)) if len(devices) == 1 else None


def check_placement(arrays: Any) -> None:
    """Check that the concrete arrays of a pytree lie on single devices, or are all sharded in the same way.

    Only the compiler can combine arrays that are sharded in different ways.

    Raises
    ------
    ValueError
        If an array lies on several devices and another array is placed differently.
    """
    leaves = jax.tree.leaves(arrays)
    concrete = [x for x in leaves if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    different = list(dict.fromkeys(x.sharding for x in concrete))
    # JAX itself reports arrays on two single devices, in a message that names both.
    if len(different) > 1 and any(len(sharding.device_set) > 1 for sharding in different):
        first, second = (getattr(sharding, "spec", sharding) for sharding in different[:2])
        raise ValueError(
            "contrastive_loss must be called under jax.jit if its arrays lie on several devices in different ways, got "
            f"{first} and {second}"
        )


def on_auto_axes(function: Callable[..., Any], outputs_like: Any, /, *arrays: Any) -> Any:
    """Call `function` on arrays; if their mesh has explicit axes, let the compiler shard the intermediate results.

    With explicit axes every intermediate result needs a sharding. The b x b matrix of logits cannot have a sharding,
    because its rows and its columns would both lie on the mesh axis of the batch. With automatic axes the compiler
    chooses the shardings.

    Parameters
    ----------
    function : callable
        Pure function of `arrays`.
    outputs_like : pytree
        A pytree with the structure of the results. Each leaf is an array whose sharding the result gets, or None for a
        result of which every device gets a copy.
    arrays : pytrees of arrays

    Raises
    ------
    NotImplementedError
        If the axes are explicit and this version of JAX cannot turn them into automatic ones.
    """
    leaves, structure = jax.tree.flatten(arrays)
    shardings = [sharding for sharding in map(explicit_sharding, leaves) if sharding is not None]
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
        return explicit_sharding(array) or everywhere

    # Only arrays are traced: numbers stay numbers, so that the core can check their values.
    positions = [position for position, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def inside(*traced: Any) -> Any:
        merged = list(leaves)
        for position, leaf in zip(positions, traced, strict=True):
            merged[position] = leaf
        return function(*jax.tree.unflatten(structure, merged))

    outputs = jax.tree.map(sharding_like, outputs_like, is_leaf=lambda x: x is None)
    return auto_axes(inside, out_sharding=outputs)(*(leaves[position] for position in positions))


def explicit_sharding(array: Any) -> Any:
    """Return the sharding of an array whose mesh has explicit axes; None for every other value."""
    if not isinstance(array, jax.Array):
        return None
    # The type of an array, also of a tracer, holds the sharding only if the axes are explicit.
    sharding = getattr(jax.typeof(array), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is not None and AxisType.Explicit in mesh.axis_types else None
