"""The two sweeps of the contrastive objective as Pallas kernels (docs/fused.md).

Shapes, stated once: b pairs, features (b, d), reference features (b, r), half types or float32. All sums are float32.
Inside, b is padded to a whole number of panels of `side` rows, d and r to a whole number of the kernels' steps.

    z_ij = sum_k E1_ik E2_jk - lambda sum_k R1_ik R2_jk            row i = image, column j = text

`_negatives_kernel` makes one tile of z per program and leaves the maximum and the sum of exponentials of its rows and
its columns. `_weights_kernel` makes the tile again and leaves V = w + w' of one square of ``side`` x ``side`` pairs,
which XLA's own product then multiplies with the features. A matrix of b x b never exists.

No program adds to what another one has written, so the kernels give the same bits for the same inputs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from drrho_core._arrays import device_of
from drrho_core._fused import Batch, FirstSweep, SecondSweep

HIGHEST = jax.lax.Precision.HIGHEST
DEFAULT = jax.lax.Precision.DEFAULT

# ---------------------------------------------------------------------------------------------------------------------
# Kernels: one program has the tile of z of its row tile and its column tile
# ---------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How one dtype is computed."""

    panel: int  # how many rows are met in one launch, at most
    rows: int  # of a tile
    columns: int
    depth: int  # how much of the features' width is met at once
    warps: int
    stages: int
    buffer: Any  # dtype of V
    pull_precision: Any  # of the product of V with the features


PLANS = {
    # w is about 1 / b: too small for float16's exponent, so there V is float32 and multiplied at XLA's default
    # precision, TensorFloat-32, which has float16's significand. Plain float32 is multiplied in full.
    "bfloat16": Plan(4096, 128, 128, 64, 8, 3, jnp.bfloat16, DEFAULT),
    "float16": Plan(4096, 128, 128, 64, 8, 3, jnp.float32, DEFAULT),
    "float32": Plan(4096, 64, 64, 32, 4, 2, jnp.float32, HIGHEST),
}
"""None of these sizes was tuned."""

SMALLEST = 1024
"""In the mode ``"auto"`` a smaller batch is left to the plain core."""


def _tile(
    e1: Any,  # (rows, d)
    e2: Any,  # (columns, d)
    r1: Any,  # (rows, r), or nothing
    r2: Any,  # (columns, r)
    reference_weight: Any,  # (1,)
    place: Any,  # (2,) the first row and the first column of this launch
    mask: Any,  # (rows, columns) int8, or nothing
    *,
    row_tiles: int,
    b: int,
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """Return a tile of z and which of its pairs are negatives."""

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
    z = add_product(z, e1, e2)
    program = pl.program_id(0)
    row = place[0] + (program % row_tiles) * plan.rows + jnp.arange(plan.rows, dtype=jnp.int32)[:, None]
    column = place[1] + (program // row_tiles) * plan.columns + jnp.arange(plan.columns, dtype=jnp.int32)[None, :]
    counts = (row < b) & (column < b) & (row != column)
    if mask is not None:
        counts = counts & (mask[:, :] != 0)
    return z, counts


def _negatives_kernel(*refs: Any, has_reference: bool, has_mask: bool, **how: Any) -> None:
    """Sum the exponentials of one tile along its rows and along its columns."""
    features, (temperature_image, temperature_text), rest = _split(refs, has_reference, has_mask, anchors=2)
    peak_image, sum_image, peak_text, sum_text = rest
    z, counts = _tile(*features, **how)
    z = jnp.where(counts, z, -jnp.inf)
    for axis, temperature, peak_out, sum_out in (
        (1, temperature_image, peak_image, sum_image),
        (0, temperature_text, peak_text, sum_text),
    ):
        peak = jnp.max(z, axis=axis)
        # Where nothing counts the peak is -inf, and -inf - (-inf) would be nan.
        shift = jnp.where(peak == -jnp.inf, 0.0, peak)
        inverse = 1.0 / temperature[:]
        peak_out[:] = peak
        sum_out[:] = jnp.sum(jnp.exp((z - _along(shift, axis)) * _along(inverse, axis)), axis=axis)


def _weights_kernel(*refs: Any, has_reference: bool, has_mask: bool, **how: Any) -> None:
    """Weigh the pairs of one tile."""
    features, anchors, rest = _split(refs, has_reference, has_mask, anchors=6)
    v, weight_image, weighted_image, weight_text, weighted_text = rest
    z, counts = _tile(*features, **how)
    total = jnp.zeros_like(z)
    for axis, (temperature, positive, log_denominator), weight_out, weighted_out in (
        (1, anchors[:3], weight_image, weighted_image),
        (0, anchors[3:], weight_text, weighted_text),
    ):
        # The positive is subtracted before the division, while the difference is exact.
        d = (z - _along(positive[:], axis)) * _along(1.0 / temperature[:], axis)
        w = jnp.exp(jnp.where(counts, d - _along(log_denominator[:], axis), -jnp.inf))
        weight_out[:] = jnp.sum(w, axis=axis)
        weighted_out[:] = jnp.sum(w * d, axis=axis)
        total = total + w
    v[:, :] = total.astype(v.dtype)


def _along(x: jax.Array, axis: int) -> jax.Array:
    """Shape one number per anchor so that it meets a tile: anchors are rows where sums run along axis 1."""
    return x[:, None] if axis == 1 else x[None, :]


def _split(refs: Any, has_reference: bool, has_mask: bool, anchors: int) -> tuple[Any, Any, Any]:
    """Give the arguments of a kernel back their order; what is absent becomes None."""
    left = list(refs)

    def take(number: int, present: bool = True) -> list[Any]:
        return [left.pop(0) if present else None for _ in range(number)]

    features = [*take(2), *take(2, has_reference), *take(2), *take(1, has_mask)]
    return features, take(anchors), left


# ---------------------------------------------------------------------------------------------------------------------
# What runs them
# ---------------------------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """One batch, padded and cut into panels. n panels of `side` pairs, d and r whole steps; anchors float32."""

    e1: jax.Array  # (n, side, d)
    e2: jax.Array  # (n, side, d)
    reference: tuple[jax.Array, jax.Array] | None  # (n, side, r)
    weight: jax.Array  # (1,)
    mask: jax.Array | None  # (n, side, n, side) int8
    temperature_image: jax.Array  # (n, side)
    temperature_text: jax.Array  # (n, side)


def _side(b: int, plan: Plan) -> tuple[int, int]:
    """Return how many panels there are and how many rows one has: as few as make whole tiles."""
    panels = pl.cdiv(b, plan.panel)
    unit = max(plan.rows, plan.columns)
    return panels, pl.cdiv(pl.cdiv(b, panels), unit) * unit


def _prepare(batch: Batch, plan: Plan) -> _Inputs:
    b = batch.image_features.shape[0]
    panels, side = _side(b, plan)

    def features(x: jax.Array) -> jax.Array:
        width = pl.cdiv(x.shape[1], plan.depth) * plan.depth
        padded = jnp.pad(x, ((0, panels * side - b), (0, width - x.shape[1])))
        return padded.reshape(panels, side, width)

    reference = batch.reference_features
    mask = batch.pair_mask
    if mask is not None:
        padding = (0, panels * side - b)
        mask = jnp.pad(mask.astype(jnp.int8), (padding, padding)).reshape(panels, side, panels, side)
    return _Inputs(
        features(batch.image_features),
        features(batch.text_features),
        None if reference is None else (features(reference[0]), features(reference[1])),
        jnp.asarray(batch.reference_weight, dtype=jnp.float32).reshape(1),
        mask,
        _anchors(batch.temperature_image, panels, side, 1.0),
        _anchors(batch.temperature_text, panels, side, 1.0),
    )


def _anchors(x: jax.Array, panels: int, side: int, beyond: float) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.pad(x, (0, panels * side - x.shape[0]), constant_values=beyond).reshape(panels, side)


def _launch(
    kernel: Any,
    inputs: _Inputs,
    i: jax.Array,
    j: jax.Array,
    anchors: list[jax.Array],
    *,
    has_square: bool,
    b: int,
    plan: Plan,
    interpret: bool,
) -> Any:
    """Run a kernel over the square of panel i's rows and panel j's columns.

    `anchors` (side,): first those of the rows, then as many of the columns. Out come V, where the kernel makes it, two
    arrays (column tiles, side) for the rows and two arrays (row tiles, side) for the columns.
    """
    side = inputs.e1.shape[1]
    row_tiles, column_tiles = side // plan.rows, side // plan.columns

    # Programs next to each other share a column tile, so the panel's rows and few columns are in the cache.
    def row(p: Any) -> Any:
        return p % row_tiles

    def column(p: Any) -> Any:
        return p // row_tiles

    def wide(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((plan.rows, x.shape[2]), lambda p: (row(p), 0))

    def tall(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((plan.columns, x.shape[2]), lambda p: (column(p), 0))

    arguments = [inputs.e1[i], inputs.e2[j]]
    specs = [wide(inputs.e1), tall(inputs.e2)]
    if inputs.reference is not None:
        arguments += [inputs.reference[0][i], inputs.reference[1][j]]
        specs += [wide(inputs.reference[0]), tall(inputs.reference[1])]
    arguments += [inputs.weight, jnp.stack([i * side, j * side]).astype(jnp.int32)]
    specs += [pl.BlockSpec((1,), lambda _: (0,)), pl.BlockSpec((2,), lambda _: (0,))]
    square = pl.BlockSpec((plan.rows, plan.columns), lambda p: (row(p), column(p)))
    if inputs.mask is not None:
        arguments.append(inputs.mask[i][:, j])
        specs.append(square)
    arguments += anchors
    half = len(anchors) // 2
    specs += [pl.BlockSpec((plan.rows,), lambda p: (row(p),))] * half
    specs += [pl.BlockSpec((plan.columns,), lambda p: (column(p),))] * half
    by_row = pl.BlockSpec((None, plan.rows), lambda p: (column(p), row(p)))
    by_column = pl.BlockSpec((None, plan.columns), lambda p: (row(p), column(p)))
    shape: Any = jax.ShapeDtypeStruct  # untyped
    shapes = [shape((column_tiles, side), jnp.float32)] * 2 + [shape((row_tiles, side), jnp.float32)] * 2
    out_specs = [by_row, by_row, by_column, by_column]
    if has_square:
        shapes = [shape((side, side), plan.buffer), *shapes]
        out_specs = [square, *out_specs]
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


def _merge(peaks: jax.Array, sums: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Put partial maxima and sums (parts, n) together; -inf and 0 where nothing counts."""
    peak = jnp.max(peaks, axis=0)
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)
    return peak, jnp.sum(sums * jnp.exp((peaks - shift) / temperature), axis=0)


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def _sum_negatives(batch: Batch, *, plan: Plan, interpret: bool) -> FirstSweep:
    """Sweep once: square by square, each square's partial results merged into what there is."""
    inputs = _prepare(batch, plan)
    b = batch.image_features.shape[0]
    panels, side = inputs.temperature_image.shape
    nothing = (jnp.full((side,), -jnp.inf, jnp.float32), jnp.zeros((side,), jnp.float32))

    def down(text: Any, i: jax.Array) -> Any:
        def across(image: Any, step: Any) -> Any:
            j, old = step
            temperatures = (inputs.temperature_image[i], inputs.temperature_text[j])
            parts = _launch(
                _negatives_kernel, inputs, i, j, list(temperatures),
                has_square=False, b=b, plan=plan, interpret=interpret,
            )  # fmt: skip
            before = [(image, parts[:2], temperatures[0]), (old, parts[2:], temperatures[1])]
            both = [
                _merge(jnp.concatenate([peak[None], peaks]), jnp.concatenate([total[None], totals]), temperature)
                for (peak, total), (peaks, totals), temperature in before
            ]
            return tuple(both)

        image, text = jax.lax.scan(across, nothing, (jnp.arange(panels, dtype=jnp.int32), text))
        return text, image

    start = tuple(jnp.broadcast_to(x, (panels, side)) for x in nothing)
    text, image = jax.lax.scan(down, start, jnp.arange(panels, dtype=jnp.int32))
    positive = _row_products(batch.image_features, batch.text_features)
    if batch.reference_features is not None:
        positive = positive - inputs.weight[0] * _row_products(*batch.reference_features)
    log_sums = [
        jnp.log(total.reshape(-1)[:b]) + (peak.reshape(-1)[:b] - positive) / temperature.astype(jnp.float32)
        for (peak, total), temperature in ((image, batch.temperature_image), (text, batch.temperature_text))
    ]
    if batch.pair_mask is None:
        counts = [jnp.full((b,), b - 1, jnp.float32)] * 2
    else:
        own = jnp.diagonal(batch.pair_mask).astype(jnp.float32)
        counts = [jnp.sum(batch.pair_mask, axis=axis, dtype=jnp.int32).astype(jnp.float32) - own for axis in (1, 0)]
    return FirstSweep(positive, *log_sums, *counts)


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def _pull_back(
    batch: Batch,
    positive: jax.Array,
    log_denominator_image: jax.Array,
    log_denominator_text: jax.Array,
    *,
    plan: Plan,
    interpret: bool,
) -> SecondSweep:
    """Sweep again: square by square, and each square's V is multiplied with the features at once."""
    inputs = _prepare(batch, plan)
    b, d = batch.image_features.shape
    panels, side = inputs.temperature_image.shape
    p, log_image, log_text = (
        _anchors(x, panels, side, 0.0) for x in (positive, log_denominator_image, log_denominator_text)
    )

    def product(v: jax.Array, features: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dot_general(
            v, features.astype(v.dtype), (((axis,), (0,)), ((), ())),
            precision=plan.pull_precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def down(text: Any, i: jax.Array) -> Any:
        def across(image: Any, step: Any) -> Any:
            j, old = step
            v, *sums = _launch(
                _weights_kernel, inputs, i, j,
                [inputs.temperature_image[i], p[i], log_image[i], inputs.temperature_text[j], p[j], log_text[j]],
                has_square=True, b=b, plan=plan, interpret=interpret,
            )  # fmt: skip
            weight_i, weighted_i, weight_j, weighted_j = (jnp.sum(part, axis=0) for part in sums)
            to_image = (product(v, inputs.e2[j], 1), weight_i, weighted_i)
            to_text = (product(v, inputs.e1[i], 0), weight_j, weighted_j)
            add = functools.partial(jax.tree.map, jnp.add)
            return add(image, to_image), add(old, to_text)

        image, text = jax.lax.scan(across, nothing, (jnp.arange(panels, dtype=jnp.int32), text))
        return text, image

    nothing = (jnp.zeros(inputs.e1.shape[1:], jnp.float32), *(jnp.zeros((side,), jnp.float32),) * 2)
    start = tuple(jnp.zeros((panels, *x.shape), jnp.float32) for x in nothing)
    text, image = jax.lax.scan(down, start, jnp.arange(panels, dtype=jnp.int32))
    (image_pull, *image_sums), (text_pull, *text_sums) = image, text
    pulls = [pull.reshape(panels * side, -1)[:b, :d] for pull in (image_pull, text_pull)]
    (weight_i, weighted_i), (weight_j, weighted_j) = (
        [x.reshape(-1)[:b] for x in sums] for sums in (image_sums, text_sums)
    )
    return SecondSweep(pulls[0], pulls[1], weight_i, weight_j, weighted_i, weighted_j)


def _row_products(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.sum(left.astype(jnp.float32) * right.astype(jnp.float32), axis=1)


class PallasSweeps:
    """The sweeps on an NVIDIA GPU, or interpreted on the CPU; see `drrho_core._fused.Sweeps`."""

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Say why not."""
        features = batch.image_features
        platform = _platform(features)
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
        swept: FirstSweep = _sum_negatives(batch, **_options(batch))
        return swept

    def pull_back(
        self, batch: Batch, positive: jax.Array, log_denominator_image: jax.Array, log_denominator_text: jax.Array, /
    ) -> SecondSweep:
        """Sweep again."""
        swept: SecondSweep = _pull_back(batch, positive, log_denominator_image, log_denominator_text, **_options(batch))
        return swept


def _options(batch: Batch) -> dict[str, Any]:
    features = batch.image_features
    return {"plan": PLANS[features.dtype.name], "interpret": _platform(features) == "cpu"}


def _platform(array: jax.Array) -> str:
    """Return where an array lives; a tracer lives where JAX computes by default."""
    device = device_of(array)
    if device is None:
        return jax.default_backend()
    return str(getattr(device, "platform", "several devices"))
