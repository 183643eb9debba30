"""The two sweeps of the contrastive objective as Pallas kernels (docs/fused.md).

Shapes, stated once: b pairs, features (b, d), reference features (b, r), half types or float32. All sums are float32.
Inside, b is padded to a whole number of rectangles of ``height`` images and ``width`` texts, d and r to a whole number
of the kernels' steps.

    z_ij = sum_k E1_ik E2_jk - lambda sum_k R1_ik R2_jk            row i = image, column j = text

`_sums_kernel` makes one tile of z per program. For each row and each column of the tile it writes the peak of z, the
total of ``exp((z - peak) / t)`` and the moment, the total of ``exp((z - peak) / t) (z - peak)``. `_weights_kernel`
makes the tile again and writes V = w + w' of one rectangle of pairs, which XLA's own product then multiplies with the
features. A matrix of b x b never exists.

Both sweeps compute the same bits of z and the same exponentials, so the weights of an anchor add up to what they
should, however large 1/t is. No program adds to the results of another program, so the kernels give the same bits for
the same inputs.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from drrho_core._array_api import device_of
from drrho_core.extend import Batch, FirstSweep, SecondSweep

HIGHEST = jax.lax.Precision.HIGHEST
DEFAULT = jax.lax.Precision.DEFAULT

LOG2_E = math.log2(math.e)

NEVER = -3e38
"""Stands for z of a pair that is no negative: below every logit, but finite, so that no difference becomes nan."""

LARGEST = float(np.finfo(np.float32).max)

# ---------------------------------------------------------------------------------------------------------------------
# Kernels: one program has the tile of z of its row tile and its column tile
# ---------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How one dtype is computed."""

    height: int  # images of a rectangle, at most
    width: int  # texts of a rectangle, at most
    rows: int  # of a tile
    columns: int
    depth: int  # how much of the features' width is met at once
    warps: int
    stages: int
    buffer: Any  # dtype of V
    pull_precision: Any  # of the product of V with the features


PLANS = {
    "bfloat16": Plan(16384, 5632, 256, 128, 64, 8, 3, jnp.bfloat16, DEFAULT),
    "float16": Plan(16384, 5632, 256, 128, 64, 8, 3, jnp.float16, DEFAULT),
    "float32": Plan(4096, 4096, 64, 64, 32, 4, 2, jnp.float32, HIGHEST),
}
"""Measured on an H100, and not tuned. Float32 is never rounded to TensorFloat-32."""

MASKED = 128
"""A tile has at most so many rows and columns where there is a mask, which takes registers."""

SMALLEST = 1024
"""In the mode ``"auto"`` a smaller batch is left to the plain core."""


def _tile(
    e1: Any,  # (rows, d)
    e2: Any,  # (columns, d)
    r1: Any,  # (rows, r), or nothing
    r2: Any,  # (columns, r)
    reference_weight: Any,  # (1,)
    *,
    plan: Plan,
) -> jax.Array:
    """Return a tile of z. All kernels call this function, so that they see the same bits."""

    def add_product(z: jax.Array, left: Any, right: Any) -> jax.Array:
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
    if r1 is not None:  # first, because then one accumulator is enough
        z = add_product(z, r1, r2) * -reference_weight[0]
    return add_product(z, e1, e2)


def _only_negatives(
    x: jax.Array,  # (rows, columns)
    place: Any,  # (2,) the first row and the first column of this launch
    mask: Any,  # (rows, columns) int8, or nothing
    other: float,
    *,
    row_tiles: int,
    b: int,
    plan: Plan,
) -> jax.Array:
    """Return a tile's values, and `other` where a pair is no negative."""
    program = pl.program_id(0)
    top = place[0] + (program % row_tiles) * plan.rows
    first = place[1] + (program // row_tiles) * plan.columns

    def masked(x: jax.Array) -> jax.Array:
        row = top + jnp.arange(plan.rows, dtype=jnp.int32)[:, None]
        column = first + jnp.arange(plan.columns, dtype=jnp.int32)[None, :]
        counts = (row < b) & (column < b) & (row != column)
        if mask is not None:
            counts = counts & (mask[:, :] != 0)
        return jnp.where(counts, x, other)

    if mask is not None:
        return masked(x)
    # Few tiles meet the diagonal or the end of the batch; only those pay for a mask.
    on_diagonal = (top < first + plan.columns) & (first < top + plan.rows)
    beyond = (top + plan.rows > b) | (first + plan.columns > b)
    chosen: jax.Array = jax.lax.cond(on_diagonal | beyond, masked, lambda x: x, x)
    return chosen


def _positives_kernel(*refs: Any, has_reference: bool, plan: Plan) -> None:
    """Take the diagonal of z from a tile that it passes through."""
    *features, out = refs
    e1, e2, r1, r2, weight = features if has_reference else (*features[:2], None, None, features[2])
    z = _tile(e1, e2, r1, r2, weight, plan=plan)
    part = min(plan.rows, plan.columns)
    start = pl.program_id(0) * part
    row = start // plan.rows * plan.rows + jnp.arange(plan.rows, dtype=jnp.int32)[:, None]
    column = start // plan.columns * plan.columns + jnp.arange(plan.columns, dtype=jnp.int32)[None, :]
    out[:] = jnp.sum(jnp.where(row == column, z, 0.0), axis=1 if plan.rows <= plan.columns else 0)


def _sums_kernel(*refs: Any, has_reference: bool, has_mask: bool, plan: Plan, **how: Any) -> None:
    """Sum the exponentials of one tile along its rows and along its columns."""
    features, place, mask, (scale_image, scale_text), out = _split(refs, has_reference, has_mask, anchors=2)
    z = _only_negatives(_tile(*features, plan=plan), place, mask, NEVER, plan=plan, **how)
    for axis, scale, (peak_out, total_out, moment_out) in ((1, scale_image, out[:3]), (0, scale_text, out[3:])):
        # The peak is subtracted before the scale: a difference of close numbers is exact, a product with 1/t is not.
        peak = jnp.max(z, axis=axis)
        x = z - _along(peak, axis)
        e = jnp.exp2(x * _along(scale[:], axis))
        peak_out[:] = peak
        total_out[:] = jnp.sum(e, axis=axis)
        moment_out[:] = jnp.sum(e * x, axis=axis)


def _weights_kernel(*refs: Any, has_reference: bool, has_mask: bool, plan: Plan, **how: Any) -> None:
    """Weigh the pairs of one tile: the exponentials of the first sweep, divided by their own total."""
    features, place, mask, anchors, (v,) = _split(refs, has_reference, has_mask, anchors=6)
    z = _tile(*features, plan=plan)
    total = jnp.zeros_like(z)
    for axis, (peak, scale, factor) in ((1, anchors[:3]), (0, anchors[3:])):
        e = jnp.exp2((z - _along(peak[:], axis)) * _along(scale[:], axis))
        total = total + e * _along(factor[:], axis)
    # Beyond the negatives an exponential may be infinite and a factor nan; the mask comes last and removes them.
    v[:, :] = _only_negatives(total, place, mask, 0.0, plan=plan, **how).astype(v.dtype)


def _along(x: jax.Array, axis: int) -> jax.Array:
    """Shape one number per anchor so that it meets a tile: anchors are rows where sums run along axis 1."""
    return x[:, None] if axis == 1 else x[None, :]


def _split(refs: Any, has_reference: bool, has_mask: bool, anchors: int) -> tuple[Any, Any, Any, Any, Any]:
    """Give the arguments of a kernel back their order; what is absent becomes None."""
    left = list(refs)

    def take(number: int, present: bool = True) -> list[Any]:
        return [left.pop(0) if present else None for _ in range(number)]

    features = [*take(2), *take(2, has_reference), *take(1)]
    (place,), (mask,) = take(1), take(1, has_mask)
    return features, place, mask, take(anchors), left


# ---------------------------------------------------------------------------------------------------------------------
# What runs them
# ---------------------------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """One batch, padded. Images to a whole number of rectangles' heights, texts to one of widths; anchors float32."""

    e1: jax.Array  # (images, d)
    e2: jax.Array  # (texts, d)
    reference: tuple[jax.Array, jax.Array] | None  # (images, r), (texts, r)
    weight: jax.Array  # (1,)
    mask: jax.Array | None  # (images, texts) int8
    scales: tuple[jax.Array, jax.Array]  # (images,), (texts,)    log2(e) / t


def _span(b: int, largest: int, unit: int) -> int:
    """Return the length of the fewest spans of nearly the same length that cover b, a multiple of `unit`."""
    return pl.cdiv(pl.cdiv(b, pl.cdiv(b, largest)), unit) * unit


def prepare(batch: Batch, plan: Plan) -> tuple[_Inputs, int, int]:
    """Return the padded batch, and the height and the width of a rectangle."""
    b = batch.image_features.shape[0]
    height, width = _span(b, plan.height, plan.rows), _span(b, plan.width, plan.columns)
    images, texts = pl.cdiv(b, height) * height, pl.cdiv(b, width) * width

    def features(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x, ((0, length - b), (0, -x.shape[1] % plan.depth)))

    reference = batch.reference_features
    mask = batch.pair_mask
    if mask is not None:
        mask = jnp.pad(mask.astype(jnp.int8), ((0, images - b), (0, texts - b)))
    inputs = _Inputs(
        features(batch.image_features, images),
        features(batch.text_features, texts),
        None if reference is None else (features(reference[0], images), features(reference[1], texts)),
        jnp.asarray(batch.reference_weight, dtype=jnp.float32).reshape(1),
        mask,
        (_scale(batch.temperature_image, images), _scale(batch.temperature_text, texts)),
    )
    return inputs, height, width


def _scale(temperature: jax.Array, length: int) -> jax.Array:
    """Return log2(e) / t; a temperature without a reciprocal keeps (z - peak) / t at 0 for the peak."""
    scale = jnp.minimum(LOG2_E / temperature.astype(jnp.float32), LARGEST)
    return _longer(scale, length)


def _longer(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, (0, length - x.shape[0]))


def _cut(x: jax.Array, i: jax.Array, length: int, axis: int = 0) -> jax.Array:
    piece: jax.Array = jax.lax.dynamic_slice_in_dim(x, i * length, length, axis)
    return piece


def _put(x: jax.Array, piece: jax.Array, i: jax.Array, axis: int = 0) -> jax.Array:
    whole: jax.Array = jax.lax.dynamic_update_slice_in_dim(x, piece, i * piece.shape[axis], axis)
    return whole


def _launch(
    kernel: Any,
    inputs: _Inputs,
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
    """Run a kernel over rectangle (i, j).

    `anchors`: first those of the rows (height,), then as many of the columns (width,). Out comes V (height, width), or
    three arrays (column tiles, height) for the rows and three arrays (row tiles, width) for the columns.
    """
    row_tiles, column_tiles = height // plan.rows, width // plan.columns

    # Programs next to each other share a column tile, so the rectangle's rows and few columns are in the cache.
    def row(p: Any) -> Any:
        return p % row_tiles

    def column(p: Any) -> Any:
        return p // row_tiles

    def wide(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((plan.rows, x.shape[1]), lambda p: (row(p), 0))

    def tall(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((plan.columns, x.shape[1]), lambda p: (column(p), 0))

    arguments = [_cut(inputs.e1, i, height), _cut(inputs.e2, j, width)]
    specs = [wide(inputs.e1), tall(inputs.e2)]
    if inputs.reference is not None:
        arguments += [_cut(inputs.reference[0], i, height), _cut(inputs.reference[1], j, width)]
        specs += [wide(inputs.reference[0]), tall(inputs.reference[1])]
    arguments += [inputs.weight, jnp.stack([i * height, j * width]).astype(jnp.int32)]
    specs += [pl.BlockSpec((1,), lambda _: (0,)), pl.BlockSpec((2,), lambda _: (0,))]
    rectangle = pl.BlockSpec((plan.rows, plan.columns), lambda p: (row(p), column(p)))
    if inputs.mask is not None:
        arguments.append(_cut(_cut(inputs.mask, i, height), j, width, axis=1))
        specs.append(rectangle)
    arguments += anchors
    half = len(anchors) // 2
    specs += [pl.BlockSpec((plan.rows,), lambda p: (row(p),))] * half
    specs += [pl.BlockSpec((plan.columns,), lambda p: (column(p),))] * half
    shape: Any = jax.ShapeDtypeStruct  # untyped
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


def positives(inputs: _Inputs, b: int, plan: Plan, interpret: bool) -> jax.Array:
    """Return the diagonal of z (b,), out of the same tiles as the rest: equal features then have equal logits."""
    part = min(plan.rows, plan.columns)
    number = pl.cdiv(b, part)

    def wide(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((plan.rows, x.shape[1]), lambda p: (p * part // plan.rows, 0))

    def tall(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((plan.columns, x.shape[1]), lambda p: (p * part // plan.columns, 0))

    shape: Any = jax.ShapeDtypeStruct  # untyped
    pairs = [(inputs.e1, inputs.e2), *([] if inputs.reference is None else [inputs.reference])]
    found: jax.Array = pl.pallas_call(
        functools.partial(_positives_kernel, has_reference=inputs.reference is not None, plan=plan),
        out_shape=shape((number * part,), jnp.float32),
        grid=(number,),
        in_specs=[spec for one, other in pairs for spec in (wide(one), tall(other))]
        + [pl.BlockSpec((1,), lambda _: (0,))],
        out_specs=pl.BlockSpec((part,), lambda p: (p,)),
        compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name="positives",
    )(*(side for pair in pairs for side in pair), inputs.weight)
    return found[:b]


def _merge(state: jax.Array, parts: list[jax.Array], scale: jax.Array) -> jax.Array:
    """Merge the peaks, totals and moments of tiles, (parts, n) each, into those of anchors (3, n)."""
    peaks, totals, moments = (
        jnp.concatenate([one[None], other]) for one, other in zip(state, parts, strict=True)
    )  # fmt: skip
    peak = jnp.max(peaks, axis=0)
    down = peaks - peak
    f = jnp.exp2(down * scale)
    # Relative to the new peak: e^(z - new) = e^(z - old) f, and sum e (z - new) = f (moment + total (old - new)).
    # A peak of NEVER has f = 0; bounded, its distance makes no infinity that 0 would turn into nan.
    moment = jnp.sum(f * (moments + totals * jnp.maximum(down, -1e30)), axis=0)
    return jnp.stack([peak, jnp.sum(f * totals, axis=0), moment])


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def sum_negatives(batch: Batch, *, plan: Plan, interpret: bool) -> FirstSweep:
    """Sweep once: rectangle by rectangle, each rectangle's parts merged into the sums so far."""
    inputs, height, width = prepare(batch, plan)
    b = batch.image_features.shape[0]
    images, texts = inputs.e1.shape[0], inputs.e2.shape[0]

    def visit(k: jax.Array, states: Any) -> Any:
        i, j = k // (texts // width), k % (texts // width)
        scales = [_cut(inputs.scales[0], i, height), _cut(inputs.scales[1], j, width)]
        parts = _launch(
            _sums_kernel, inputs, i, j, height, width, scales, has_v=False, b=b, plan=plan, interpret=interpret
        )
        old = [_cut(states[0], i, height, axis=1), _cut(states[1], j, width, axis=1)]
        new = [_merge(*three) for three in zip(old, (parts[:3], parts[3:]), scales, strict=True)]
        return tuple(_put(*three, axis=1) for three in zip(states, new, (i, j), strict=True))

    nothing = jnp.asarray([[NEVER], [0.0], [0.0]], dtype=jnp.float32)
    start = tuple(jnp.broadcast_to(nothing, (3, length)) for length in (images, texts))
    rectangles = (images // height) * (texts // width)
    states = jax.lax.fori_loop(jnp.int32(0), jnp.int32(rectangles), visit, start)
    positive = positives(inputs, b, plan, interpret)
    if batch.pair_mask is None:
        counts = [jnp.full((b,), b - 1, jnp.float32)] * 2
    else:
        own = jnp.diagonal(batch.pair_mask).astype(jnp.float32)
        counts = [jnp.sum(batch.pair_mask, axis=axis, dtype=jnp.int32).astype(jnp.float32) - own for axis in (1, 0)]
    log_sums, means, saved = [], [], []
    for state, temperature, count in zip(
        states, (batch.temperature_image, batch.temperature_text), counts, strict=True
    ):
        t, has = temperature.astype(jnp.float32), count > 0
        peak, total, moment = state[0, :b], jnp.where(has, state[1, :b], 1.0), state[2, :b]
        peak = jnp.where(has, peak, positive)
        log_sums.append(jnp.where(has, (peak - positive) / t + jnp.log(total), -jnp.inf))
        means.append(jnp.where(has, (peak - positive + moment / total) / t, 0.0))
        saved += [peak, total]
    return FirstSweep(log_sums[0], log_sums[1], means[0], means[1], counts[0], counts[1], tuple(saved))


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def pull_back(
    batch: Batch,
    saved: tuple[jax.Array, ...],
    weight_image: jax.Array,
    weight_text: jax.Array,
    *,
    plan: Plan,
    interpret: bool,
) -> SecondSweep:
    """Sweep again: rectangle by rectangle, and each V is multiplied with the features at once."""
    inputs, height, width = prepare(batch, plan)
    b, d = batch.image_features.shape
    images, texts = inputs.e1.shape[0], inputs.e2.shape[0]
    weights = weight_image, weight_text
    factors = [weight.astype(jnp.float32) / total for weight, total in zip(weights, saved[1::2], strict=True)]
    back = None
    if plan.buffer == jnp.float16:  # a power of two brings the largest w near the largest float16
        # V is at most the largest factor of each side together, because an exponential is at most 1.
        bound = jnp.max(factors[0]) + jnp.max(factors[1])
        power = jnp.clip(jnp.where(bound > 0, jnp.floor(jnp.log2(32768.0 / bound)), 0.0), -100.0, 100.0)
        factors, back = [factor * jnp.exp2(power) for factor in factors], jnp.exp2(-power)
    anchors = [
        [_longer(peak, length), scale, _longer(factor, length)]
        for peak, scale, factor, length in zip(saved[::2], inputs.scales, factors, (images, texts), strict=True)
    ]

    def product(v: jax.Array, features: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dot_general(
            v, features, (((axis,), (0,)), ((), ())),
            precision=plan.pull_precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def visit(k: jax.Array, pulls: Any) -> Any:
        i, j = k // (texts // width), k % (texts // width)
        here = [_cut(x, i, height) for x in anchors[0]] + [_cut(x, j, width) for x in anchors[1]]
        (v,) = _launch(
            _weights_kernel, inputs, i, j, height, width, here, has_v=True, b=b, plan=plan, interpret=interpret
        )
        to_image = _cut(pulls[0], i, height) + product(v, _cut(inputs.e2, j, width), 1)
        to_text = _cut(pulls[1], j, width) + product(v, _cut(inputs.e1, i, height), 0)
        return _put(pulls[0], to_image, i), _put(pulls[1], to_text, j)

    start = tuple(jnp.zeros((length, inputs.e1.shape[1]), jnp.float32) for length in (images, texts))
    rectangles = (images // height) * (texts // width)
    pulls = jax.lax.fori_loop(jnp.int32(0), jnp.int32(rectangles), visit, start)
    image_pull, text_pull = (pull[:b, :d] if back is None else pull[:b, :d] * back for pull in pulls)
    return SecondSweep(image_pull, text_pull)


class PallasSweeps:
    """The sweeps on an NVIDIA GPU, or interpreted on the CPU; see `drrho_core.extend.Sweeps`."""

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Say why not."""
        features = batch.image_features
        platform = platform_of(features)
        if features.dtype.name not in PLANS:
            return f"the Pallas kernels take float32 and half types, not {features.dtype}"
        if platform not in ("gpu", "cuda", "cpu"):
            return f"the Pallas kernels run on one NVIDIA GPU, not on {platform}"
        if mode == "auto" and platform == "cpu":
            return "on the CPU the Pallas kernels are only interpreted"
        if mode == "auto" and features.dtype == jnp.float32:
            return "float32 has no faster product than XLA's"
        if mode == "auto" and features.shape[0] < SMALLEST:
            return f"the batch is smaller than {SMALLEST}"
        return None

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Sweep once."""
        batch = _without_empty_reference(batch)
        swept: FirstSweep = sum_negatives(batch, **options_for(batch))
        return swept

    def pull_back(
        self, batch: Batch, first: FirstSweep, weight_image: jax.Array, weight_text: jax.Array, /
    ) -> SecondSweep:
        """Sweep again."""
        batch = _without_empty_reference(batch)
        swept: SecondSweep = pull_back(batch, first.saved, weight_image, weight_text, **options_for(batch))
        return swept


def _without_empty_reference(batch: Batch) -> Batch:
    reference = batch.reference_features
    return batch._replace(reference_features=None) if reference is not None and not reference[0].shape[1] else batch


def options_for(batch: Batch) -> dict[str, Any]:
    """Return the tiles' sizes for a batch, and whether the kernels are interpreted (on the CPU)."""
    features = batch.image_features
    plan = PLANS[features.dtype.name]
    if batch.pair_mask is not None:
        plan = plan._replace(rows=min(plan.rows, MASKED), columns=min(plan.columns, MASKED))
    return {"plan": plan, "interpret": platform_of(features) == "cpu"}


def platform_of(array: jax.Array) -> str:
    """Return where an array lives; a tracer lives where JAX computes by default."""
    device = device_of(array)
    if device is None:
        return jax.default_backend()
    return str(getattr(device, "platform", "several devices"))
