"""Devices as ranks: the operations of `drrho_core.contrastive.ranks.Ranks` inside `jax.shard_map` and `jax.pmap`.

The devices along a mapped axis share one batch; each device is a rank. In a `shard_map` with ``check_vma=True``, the
default, JAX knows for each array along which axes its values may differ between devices: the array *varies* along these
axes. Otherwise, and in `pmap`, JAX does not know, and no array has such axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax import lax
from jax.sharding import AxisType

from drrho_core.contrastive.ranks import Arrays
from drrho_jax.loops import axes_of, fori_loop, varying_axes

AxisName: TypeAlias = str | tuple[str, ...]
"""The name of a mapped axis, or the names of several axes that are treated as one."""

_UNTYPED: Any = lax
"""JAX's collectives, most of which have no type hints."""


def axis_names(axis_name: Any) -> tuple[str, ...]:
    """Return the names of axes as a tuple; None means no axis.

    Raises
    ------
    TypeError
        If `axis_name` is no name, no tuple of names, and not None.
    """
    names = (axis_name,) if isinstance(axis_name, str) else () if axis_name is None else axis_name
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be a name or a tuple of names, got {axis_name!r}")
    return names


def ranks_of(axis_name: Any) -> AxisRanks | None:
    """Return the devices along a mapped axis as ranks; None if each device has the whole batch.

    `jax.vmap` without an axis name is allowed: it maps over whole problems, and no axis of a mesh is mapped.

    Parameters
    ----------
    axis_name : str, tuple of str or None
        The mapped axes along which the batch is divided. ``()`` says that every device has the whole batch. None is the
        choice of code outside of mapped functions.

    Raises
    ------
    ValueError
        If `axis_name` is None and an axis of the mesh is mapped, because each device would see only the negatives of
        its own shard; the message names the axis. Also if an axis is not mapped.
    """
    names = axis_names(axis_name)
    if axis_name is None:
        # Only inside shard_map and pmap do axes of the mesh have the type Manual.
        mesh = jax.sharding.get_abstract_mesh()
        mapped = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual]
        if mapped:
            shown = ", ".join(map(repr, mapped))
            raise ValueError(
                "axis_name must name the mapped axis inside jax.shard_map and jax.pmap, because without it each device "
                "would see the negatives of its own shard only (axis_name=() says that every device has the whole "
                f"batch), got None and the mapped axis {shown}"
            )
    for name in names:
        try:
            lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                "axis_name must be a mapped axis of the enclosing jax.shard_map or jax.pmap (outside of both, pass "
                f"mesh as well), got {name!r}"
            ) from error
    return AxisRanks(axis_name) if names else None


def check_divided(axis_name: Any, arrays: Any) -> None:
    """Check that `axis_name` names all axes along which the arrays of a batch vary, as far as JAX knows the axes.

    Raises
    ------
    ValueError
        If an array varies along another axis as well: the devices along that axis would have other pairs.
    """
    more = sorted(axes_of(arrays) - set(axis_names(axis_name)))
    if more:
        shown = ", ".join(map(repr, more))
        raise ValueError(
            "axis_name must name all axes along which the batch is divided, such as ('data', 'fsdp'), got "
            f"{axis_name!r} for a batch that varies along {shown} as well"
        )


class AxisRanks:
    """The devices along a mapped axis, which exchange arrays by JAX's collectives.

    The object can be made anywhere, and be used inside of functions that are mapped over the axis.

    Parameters
    ----------
    axis_name : str or tuple of str
        A mapped axis of the enclosing `jax.shard_map` or `jax.pmap`.

    Attributes
    ----------
    rank : array of int, shape ()
        Number of the own device along the axis; traced.
    size : int
        W, the number of devices along the axis.
    tracks_variation : bool
        True if JAX knows which arrays vary.

    Examples
    --------
    >>> from jax.sharding import AxisType, PartitionSpec
    >>> mesh = jax.make_mesh((1,), ("pairs",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    >>> def total(x):
    ...     return AxisRanks("pairs").all_sum((x,))[0]
    >>> mapped = jax.shard_map(total, mesh=mesh, in_specs=PartitionSpec("pairs"), out_specs=PartitionSpec())
    >>> mapped(jax.numpy.ones(2)).tolist()
    [1.0, 1.0]
    """

    def __init__(self, axis_name: AxisName) -> None:
        self._axis = axis_name

    @property
    def rank(self) -> Any:
        """Number of the own device along the axis."""
        return lax.axis_index(self._axis)

    @property
    def size(self) -> int:
        """Number of devices along the axis."""
        return int(lax.axis_size(self._axis))

    @property
    def tracks_variation(self) -> bool:
        """Tell whether JAX knows which arrays vary."""
        return bool(varying_axes(self.rank))

    def all_gather(self, arrays: Arrays, /) -> Arrays:
        """Return each array of all ranks, in a new first axis."""
        return tuple(lax.all_gather(x, self._axis) for x in arrays)

    def everywhere(self, arrays: Arrays, /) -> Arrays:
        """Return the result of `all_gather`, as arrays that do not vary along the axis."""
        if not self.tracks_variation:
            return self.all_gather(arrays)
        return tuple(lax.all_gather(x, self._axis, to="invarying") for x in arrays)

    def all_sum(self, arrays: Arrays, /) -> Arrays:
        """Return the sum of each array over all ranks."""
        return tuple(_UNTYPED.psum(x, self._axis) for x in arrays)

    def all_to_all(self, arrays: Arrays, /) -> Arrays:
        """Send entry k of each array to rank k; entry k of the result came from rank k."""
        return tuple(_UNTYPED.all_to_all(x, self._axis, 0, 0) for x in arrays)

    def reduce_scatter(self, arrays: Arrays, /) -> Arrays:
        """Return the sum over all ranks of the entry `rank` of each array."""
        return tuple(_UNTYPED.psum_scatter(x, self._axis) for x in arrays)

    def shift(self, arrays: Arrays, /) -> Arrays:
        """Send the arrays to rank - 1 and return those of rank + 1."""
        hops = [(source, (source - 1) % self.size) for source in range(self.size)]
        return tuple(_UNTYPED.ppermute(x, self._axis, hops) for x in arrays)

    def repeat(self, count: int, body: Callable[[Any, Arrays], Arrays], carry: Arrays, /) -> Arrays:
        """Apply ``carry = body(k, carry)`` for k = 1, ..., count and return the carry."""
        last: Arrays = fori_loop(1, count + 1, body, tuple(carry)) if count > 0 else carry
        return last
