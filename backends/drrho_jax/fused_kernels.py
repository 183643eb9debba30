"""The Pallas kernels of both sweeps over all pairs of a batch, and their launches; `drrho_jax.fused` runs the sweeps.

A sweep visits each pair once. Shapes: b pairs, features E1 and E2 (b, d), reference features R1 and R2 (b, r), in
float16, bfloat16 or float32. All sums are float32. lambda is the reference weight, t the temperature of an anchor. An
anchor is an image (a row of z) or a text (a column of z). One launch computes a rectangle of z, of ``height`` images
and ``width`` texts; one program (an instance of a kernel) computes one tile of the rectangle. Images are padded to a
multiple of ``height``, texts to a multiple of ``width``, d and r to a multiple of the plan's ``depth``.

    z_ij = sum_k E1_ik E2_jk - lambda sum_k R1_ik R2_jk            row i = image, column j = text

For each row and each column of a tile `sums_kernel` writes three numbers: the peak (the largest z), the total (the sum
of ``exp((z - peak) / t)``) and the moment (the sum of ``exp((z - peak) / t) (z - peak)``). `weights_kernel` computes
the tile again and writes V = w + w', the weights of the pairs in both directions. Exponentials are computed as powers
of two, which are fastest on a GPU, so the scales are log2(e) / t instead of 1 / t.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

HIGHEST = jax.lax.Precision.HIGHEST

NEVER = -3e38
"""Replaces z of a pair that is no negative. It is below every z, but finite, so that no difference becomes nan."""


class Plan(NamedTuple):
    """Constants of the sweeps for one dtype."""

    height: int  # largest number of images in a rectangle
    width: int  # largest number of texts in a rectangle
    rows: int  # rows of a tile
    columns: int  # columns of a tile
    depth: int  # columns of the features that are multiplied at a time
    warps: int  # groups of 32 threads per program
    stages: int  # blocks of features that are loaded ahead
    buffer: Any  # dtype of V
    pull_precision: Any  # precision of the product of V with the features


class Inputs(NamedTuple):
    """One batch, with images padded to a multiple of a rectangle's height and texts to a multiple of the width."""

    e1: jax.Array  # (images, d)
    e2: jax.Array  # (texts, d)
    reference: tuple[jax.Array, jax.Array] | None  # (images, r), (texts, r)
    weight: jax.Array  # (1,) the reference weight
    mask: jax.Array | None  # (images, texts) int8
    scales: tuple[jax.Array, jax.Array]  # (images,), (texts,) float32    log2(e) / t


def _tile(
    e1: Any,  # (rows, d)
    e2: Any,  # (columns, d)
    r1: Any,  # (rows, r), or None
    r2: Any,  # (columns, r), or None
    reference_weight: Any,  # (1,)
    *,
    plan: Plan,
) -> jax.Array:
    """Return a tile of z. All kernels call this function, so that they compute the same bits."""

    def add_product(z: jax.Array, left: Any, right: Any) -> jax.Array:
        # Only `depth` columns of the factors are on the chip at a time; z stays in registers.
        def step(k: jax.Array, z: jax.Array) -> jax.Array:
            depth = pl.ds(k * plan.depth, plan.depth)
            a, c = left[:, depth], right[:, depth]
            return z + jax.lax.dot_general(
                a, c, (((1,), (1,)), ((), ())), precision=HIGHEST, preferred_element_type=jnp.float32
            )

        steps = left.shape[1] // plan.depth
        last: jax.Array = jax.lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, z)
        return last

    z = jnp.zeros((plan.rows, plan.columns), jnp.float32)
    # -lambda R1 R2^T comes first: the product E1 E2^T is then added to the same accumulator.
    if r1 is not None:
        z = add_product(z, r1, r2) * -reference_weight[0]
    return add_product(z, e1, e2)


def _only_negatives(
    x: jax.Array,  # (rows, columns)
    corner: Any,  # (2,) the first row and the first column of this launch
    mask: Any,  # (rows, columns) int8, or None
    filler: float,
    *,
    row_tiles: int,
    b: int,
    plan: Plan,
) -> jax.Array:
    """Return the values of a tile, with `filler` for each pair that is no negative."""
    program = pl.program_id(0)
    top = corner[0] + (program % row_tiles) * plan.rows
    first = corner[1] + (program // row_tiles) * plan.columns

    def masked(x: jax.Array) -> jax.Array:
        # A pair is a negative if its image and its text exist (are no padding), i != j, and the pair mask is True.
        row = top + jnp.arange(plan.rows, dtype=jnp.int32)[:, None]
        column = first + jnp.arange(plan.columns, dtype=jnp.int32)[None, :]
        counts = (row < b) & (column < b) & (row != column)
        if mask is not None:
            counts = counts & (mask[:, :] != 0)
        return jnp.where(counts, x, filler)

    if mask is not None:
        return masked(x)
    # Only tiles on the diagonal or at the end of the batch need a mask, unless the batch has a pair mask.
    on_diagonal = (top < first + plan.columns) & (first < top + plan.rows)
    beyond = (top + plan.rows > b) | (first + plan.columns > b)
    chosen: jax.Array = jax.lax.cond(on_diagonal | beyond, masked, lambda x: x, x)
    return chosen


def positives_kernel(*refs: Any, has_reference: bool, plan: Plan) -> None:
    """Write a part of the diagonal of z, from a tile that the diagonal runs through."""
    *features, out = refs
    e1, e2, r1, r2, weight = features if has_reference else (*features[:2], None, None, features[2])
    z = _tile(e1, e2, r1, r2, weight, plan=plan)
    # A tile need not be a square. Each program writes a part of the diagonal that always lies in one tile.
    part = min(plan.rows, plan.columns)
    start = pl.program_id(0) * part
    row = start // plan.rows * plan.rows + jnp.arange(plan.rows, dtype=jnp.int32)[:, None]
    column = start // plan.columns * plan.columns + jnp.arange(plan.columns, dtype=jnp.int32)[None, :]
    out[:] = jnp.sum(jnp.where(row == column, z, 0.0), axis=1 if plan.rows <= plan.columns else 0)


def sums_kernel(*refs: Any, has_reference: bool, has_mask: bool, row_tiles: int, b: int, plan: Plan) -> None:
    """Sum the exponentials of one tile along its rows and along its columns."""
    features, corner, mask, (scale_image, scale_text), out = _split(refs, has_reference, has_mask, anchors=2)
    z = _only_negatives(_tile(*features, plan=plan), corner, mask, NEVER, row_tiles=row_tiles, b=b, plan=plan)
    for axis, scale, (peak_out, total_out, moment_out) in ((1, scale_image, out[:3]), (0, scale_text, out[3:])):
        # Peak m, total sum_j e_ij with e_ij = exp((z_ij - m) / t_i), and moment sum_j e_ij (z_ij - m) of each anchor.
        # The peak is subtracted before the scale multiplies z, because the difference of two close numbers is exact,
        # but a product with 1/t is rounded.
        peak = jnp.max(z, axis=axis)
        x = z - _along(peak, axis)
        e = jnp.exp2(x * _along(scale[:], axis))
        peak_out[:] = peak
        total_out[:] = jnp.sum(e, axis=axis)
        moment_out[:] = jnp.sum(e * x, axis=axis)


def weights_kernel(*refs: Any, has_reference: bool, has_mask: bool, row_tiles: int, b: int, plan: Plan) -> None:
    """Compute V = w + w' of one tile: each direction divides the exponentials of the first sweep by its totals."""
    features, corner, mask, anchors, (v,) = _split(refs, has_reference, has_mask, anchors=6)
    z = _tile(*features, plan=plan)
    total = jnp.zeros_like(z)
    for axis, (peak, scale, factor) in ((1, anchors[:3]), (0, anchors[3:])):
        e = jnp.exp2((z - _along(peak[:], axis)) * _along(scale[:], axis))
        total = total + e * _along(factor[:], axis)
    # For pairs that are no negatives an exponential may be infinite and a factor nan. The mask is applied last, so that
    # it removes these values.
    weights = _only_negatives(total, corner, mask, 0.0, row_tiles=row_tiles, b=b, plan=plan)
    v[:, :] = weights.astype(v.dtype)


def _along(x: jax.Array, axis: int) -> jax.Array:
    """Reshape one number per anchor to broadcast to a tile; the anchors are rows if sums run along axis 1."""
    return x[:, None] if axis == 1 else x[None, :]


def _split(refs: Any, has_reference: bool, has_mask: bool, anchors: int) -> tuple[Any, Any, Any, Any, Any]:
    """Group the arguments of a kernel, in the order of `launch`; absent arrays become None."""
    left = list(refs)

    def take(number: int, present: bool = True) -> list[Any]:
        return [left.pop(0) if present else None for _ in range(number)]

    features = [*take(2), *take(2, has_reference), *take(1)]
    (corner,), (mask,) = take(1), take(1, has_mask)
    return features, corner, mask, take(anchors), left


def cut(x: jax.Array, i: jax.Array, length: int, axis: int = 0) -> jax.Array:
    """Return block i along an axis, with blocks of this length."""
    piece: jax.Array = jax.lax.dynamic_slice_in_dim(x, i * length, length, axis)
    return piece


def launch(
    kernel: Any,
    inputs: Inputs,
    i: jax.Array,
    j: jax.Array,
    height: int,
    width: int,
    anchors: list[jax.Array],
    *,
    has_v: bool,
    b: int,
    plan: Plan,
    interpret: bool,
) -> Any:
    """Run a kernel over rectangle (i, j) and return the results.

    `anchors` holds arrays (height,) with one number per row, then as many arrays (width,) with one number per column.
    With `has_v` the result is V (height, width). Otherwise it is peaks, totals and moments: three arrays
    (column tiles, height) for the rows and three arrays (row tiles, width) for the columns.
    """
    row_tiles, column_tiles = height // plan.rows, width // plan.columns

    # Neighbouring programs share a column of tiles, so the cache holds the features of all rows of the rectangle and of
    # few columns.
    def row(p: Any) -> Any:
        return p % row_tiles

    def column(p: Any) -> Any:
        return p // row_tiles

    def wide(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((plan.rows, x.shape[1]), lambda p: (row(p), 0))

    def tall(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((plan.columns, x.shape[1]), lambda p: (column(p), 0))

    arguments = [cut(inputs.e1, i, height), cut(inputs.e2, j, width)]
    specs = [wide(inputs.e1), tall(inputs.e2)]
    if inputs.reference is not None:
        arguments += [cut(inputs.reference[0], i, height), cut(inputs.reference[1], j, width)]
        specs += [wide(inputs.reference[0]), tall(inputs.reference[1])]
    # The kernels need the position of the rectangle in the batch, to find the diagonal and the end.
    arguments += [inputs.weight, jnp.stack([i * height, j * width]).astype(jnp.int32)]
    specs += [pl.BlockSpec((1,), lambda _: (0,)), pl.BlockSpec((2,), lambda _: (0,))]
    rectangle = pl.BlockSpec((plan.rows, plan.columns), lambda p: (row(p), column(p)))
    if inputs.mask is not None:
        arguments.append(cut(cut(inputs.mask, i, height), j, width, axis=1))
        specs.append(rectangle)
    arguments += anchors
    half = len(anchors) // 2
    specs += [pl.BlockSpec((plan.rows,), lambda p: (row(p),))] * half
    specs += [pl.BlockSpec((plan.columns,), lambda p: (column(p),))] * half
    shape: Any = jax.ShapeDtypeStruct  # untyped
    # A BlockSpec maps a program to the block that it reads or writes; None drops an axis of length 1.
    if has_v:
        shapes, out_specs = [shape((height, width), plan.buffer)], [rectangle]
    else:
        by_row = pl.BlockSpec((None, plan.rows), lambda p: (column(p), row(p)))
        by_column = pl.BlockSpec((None, plan.columns), lambda p: (row(p), column(p)))
        shapes = [shape((column_tiles, height), jnp.float32)] * 3 + [shape((row_tiles, width), jnp.float32)] * 3
        out_specs = [by_row] * 3 + [by_column] * 3
    return pl.pallas_call(
        functools.partial(
            kernel,
            has_reference=inputs.reference is not None,
            has_mask=inputs.mask is not None,
            row_tiles=row_tiles,
            b=b,
            plan=plan,
        ),
        out_shape=shapes,
        grid=(row_tiles * column_tiles,),
        in_specs=specs,
        out_specs=out_specs,
        compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*arguments)


def positives(inputs: Inputs, b: int, plan: Plan, interpret: bool) -> jax.Array:
    """Return the diagonal of z (b,), computed in the same tiles as all of z, so that equal features have equal z."""
    part = min(plan.rows, plan.columns)
    number = pl.cdiv(b, part)

    def wide(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((plan.rows, x.shape[1]), lambda p: (p * part // plan.rows, 0))

    def tall(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((plan.columns, x.shape[1]), lambda p: (p * part // plan.columns, 0))

    shape: Any = jax.ShapeDtypeStruct  # untyped
    pairs = [(inputs.e1, inputs.e2), *([] if inputs.reference is None else [inputs.reference])]
    diagonal: jax.Array = pl.pallas_call(
        functools.partial(positives_kernel, has_reference=inputs.reference is not None, plan=plan),
        out_shape=shape((number * part,), jnp.float32),
        grid=(number,),
        in_specs=[spec for left, right in pairs for spec in (wide(left), tall(right))]
        + [pl.BlockSpec((1,), lambda _: (0,))],
        out_specs=pl.BlockSpec((part,), lambda p: (p,)),
        compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name="positives",
    )(*(side for pair in pairs for side in pair), inputs.weight)
    return diagonal[:b]
