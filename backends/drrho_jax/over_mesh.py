"""A step over the devices of a mesh, for code outside of `jax.shard_map`: the mapping happens here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from drrho_core import checks
from drrho_jax.arguments import explicit_sharding
from drrho_jax.ranks import AxisName, AxisRanks, axis_names

reshard: Any = jax.sharding.reshard  # JAX gives no type hints for this function

AnyMesh: TypeAlias = jax.sharding.Mesh | AbstractMesh


def check_mesh(mesh: Any, axis_name: Any, rows: Mapping[str, Any]) -> None:
    """Check that `axis_name` names axes of `mesh`, along which the rows of some arrays, given by name, can be divided.

    Raises
    ------
    TypeError
        If `mesh` is no mesh.
    ValueError
        If the mesh has no such axis, the number of rows is no multiple of the number of devices, or the call is inside
        of `jax.shard_map` or `jax.pmap`.
    """
    if not isinstance(mesh, (jax.sharding.Mesh, AbstractMesh)):
        raise TypeError(f"mesh must be a mesh of JAX, got {checks.describe(mesh)}")
    names = axis_names(axis_name)
    if not names or not set(names) <= set(mesh.axis_names):
        received = "no axis_name" if axis_name is None else repr(axis_name)
        axes = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(f"axis_name must name axes of the mesh ({axes}), got {received}")
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError("mesh must be None inside jax.shard_map and jax.pmap, where axis_name is enough, got a mesh")
    num_devices = math.prod(mesh.shape[name] for name in names)
    for name, array in rows.items():
        if checks.is_array(array) and array.ndim and array.shape[0] % num_devices:
            raise ValueError(
                f"{name} must have a multiple of {num_devices} rows, one share for each device of the axis, got "
                f"{array.shape[0]}"
            )


def over_mesh(
    function: Callable[..., Any],
    mesh: AnyMesh,
    axis_name: AxisName,
    outputs_like: Any,
    state: Any,
    /,
    *arrays: Any,
    split_state: bool,
) -> Any:
    """Call ``function(ranks, state, *arrays)`` on every device of the mesh, with the rows of the device.

    Parameters
    ----------
    function : callable
        Returns a scalar that is the same on all devices, gradients with the structure of `outputs_like`, and a state.
    mesh, axis_name
        The mesh, and the axes along which the rows of the batch lie.
    outputs_like : pytree
        The inputs that the gradients belong to, None in the place of numbers.
    state : pytree of arrays
        Every device gets the whole state; with `split_state` it gets some of the rows.
    arrays : pytrees
        An array with axes has one row per pair, and each device gets some of the rows. Other leaves are the same on all
        devices.
    """
    leaves, structure = jax.tree.flatten(arrays)
    # Only arrays are mapped: numbers stay numbers, so that the core can check their values.
    positions = [position for position, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    rows, whole = PartitionSpec(axis_name), PartitionSpec()  # type: ignore[no-untyped-call]
    state_spec = rows if split_state else whole

    def spec_of(x: Any) -> PartitionSpec:
        return rows if x is not None and x.ndim else whole

    def inside(state: Any, *mapped: Any) -> Any:
        merged = list(leaves)
        for position, leaf in zip(positions, mapped, strict=True):
            merged[position] = leaf
        return function(AxisRanks(axis_name), state, *jax.tree.unflatten(structure, merged))

    def placed(x: Any, spec: PartitionSpec) -> Any:
        # With explicit axes JAX requires that arrays lie on the devices as the mapping needs them.
        return x if explicit_sharding(x) is None else reshard(x, NamedSharding(mesh, spec))

    given = [leaves[position] for position in positions]
    specs = [spec_of(x) for x in given]
    gradient_specs = jax.tree.map(spec_of, outputs_like, is_leaf=lambda x: x is None)
    mapped = jax.shard_map(
        inside, mesh=mesh, in_specs=(state_spec, *specs), out_specs=(whole, gradient_specs, state_spec)
    )
    state_placed = jax.tree.map(lambda x: placed(x, state_spec), state)
    loss, gradients, new_state = mapped(state_placed, *map(placed, given, specs))

    def returned(x: Any, like: Any) -> Any:
        sharding = explicit_sharding(like)
        return x if sharding is None else reshard(x, sharding)

    gradients = jax.tree.map(
        lambda like, x: returned(x, like), outputs_like, gradients, is_leaf=lambda leaf: leaf is None
    )
    return loss, gradients, jax.tree.map(returned, new_state, state)
