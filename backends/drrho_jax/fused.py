"""Both sweeps over all pairs of a batch as Pallas kernels (docs/fused.md); a sweep (or pass) visits each pair once.

Names: b pairs; image features E1 and text features E2, (b, d) each; z, the b x b matrix of similarities, with images as
rows and texts as columns. Each image and each text is an anchor, with a temperature t. The texts of other pairs are the
negatives of an image, with weights w_ij; the images of other pairs are the negatives of a text, with weights w'_ij.

The kernels are in `drrho_jax.fused_kernels`, with the formula of z and the shapes. Pass 1 runs a kernel over one
rectangle of z after the other and merges the results into sums per anchor. Pass 2 computes V = w + w' for a rectangle,
and XLA's own product multiplies V with the features. No b x b matrix is ever in memory.

Pass 2 divides the exponentials of an anchor by a sum that contains the exponentials of pass 1. Both passes compute the
same bits of z and the same exponentials, so the sum of an anchor's weights is right even if the temperature t is tiny.
No program (an instance of a kernel) adds to the results of another program, so the kernels give
the same bits for the same inputs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from drrho_core.checks import device_of
from drrho_core.extend import Batch, FirstSweep, SecondSweep
from drrho_jax.fused_kernels import HIGHEST, NEVER, Inputs, Plan, cut, launch, positives, sums_kernel, weights_kernel

DEFAULT = jax.lax.Precision.DEFAULT

LOG2_E = math.log2(math.e)

LARGEST = float(np.finfo(np.float32).max)

PLANS = {
    "bfloat16": Plan(16384, 5632, 256, 128, 64, 8, 3, jnp.bfloat16, DEFAULT),
    "float16": Plan(16384, 5632, 256, 128, 64, 8, 3, jnp.float16, DEFAULT),
    "float32": Plan(4096, 4096, 64, 64, 32, 4, 2, jnp.float32, HIGHEST),
}
"""Plans by dtype. They were timed on an H100, but nobody has searched for the fastest numbers.

Float32 is never rounded to TensorFloat-32.
"""

MASKED = 128
"""Largest number of rows and of columns of a tile if there is a pair mask, because a mask needs registers."""

SMALLEST = 1024
"""Smallest batch for the kernels in the mode ``"auto"``; the plain core computes smaller batches."""


def _span(b: int, largest: int, unit: int) -> int:
    """Cut b into as few spans as possible, of nearly the same length; return this length, a multiple of `unit`."""
    return pl.cdiv(pl.cdiv(b, pl.cdiv(b, largest)), unit) * unit


def prepare(batch: Batch, plan: Plan) -> tuple[Inputs, int, int]:
    """Return the padded batch, and the height and the width of a rectangle."""
    # Rectangles of nearly the same size need the least padding.
    b = batch.image_features.shape[0]
    height, width = _span(b, plan.height, plan.rows), _span(b, plan.width, plan.columns)
    images, texts = pl.cdiv(b, height) * height, pl.cdiv(b, width) * width

    def features(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x, ((0, length - b), (0, -x.shape[1] % plan.depth)))

    reference = batch.reference_features
    mask = batch.pair_mask
    if mask is not None:
        mask = jnp.pad(mask.astype(jnp.int8), ((0, images - b), (0, texts - b)))
    inputs = Inputs(
        features(batch.image_features, images),
        features(batch.text_features, texts),
        None if reference is None else (features(reference[0], images), features(reference[1], texts)),
        jnp.asarray(batch.reference_weight, dtype=jnp.float32).reshape(1),
        mask,
        (_scale(batch.temperature_image, images), _scale(batch.temperature_text, texts)),
    )
    return inputs, height, width


def _scale(temperature: jax.Array, length: int) -> jax.Array:
    """Return the scale log2(e) / t, which makes exp((z - m) / t) a power of two; m is the anchor's largest z."""
    # For a tiny temperature the scale would overflow, so the largest float32 replaces the scale. The exponent of z = m
    # is then still 0.
    scale = jnp.minimum(LOG2_E / temperature.astype(jnp.float32), LARGEST)
    return _longer(scale, length)


def _longer(x: jax.Array, length: int) -> jax.Array:
    """Pad an array that has one number per anchor with zeros, up to a length."""
    return jnp.pad(x, (0, length - x.shape[0]))


def _put(x: jax.Array, piece: jax.Array, i: jax.Array, axis: int = 0) -> jax.Array:
    """Return `x` with block i along an axis replaced."""
    whole: jax.Array = jax.lax.dynamic_update_slice_in_dim(x, piece, i * piece.shape[axis], axis)
    return whole


def _merge(state: jax.Array, parts: list[jax.Array], scale: jax.Array) -> jax.Array:
    """Merge the peaks, totals and moments of tiles, (parts, n) each, into those of anchors (3, n)."""
    peaks, totals, moments = (
        jnp.concatenate([so_far[None], part]) for so_far, part in zip(state, parts, strict=True)
    )  # fmt: skip
    peak = jnp.max(peaks, axis=0)
    down = peaks - peak
    f = jnp.exp2(down * scale)
    # With f = exp((old peak - new peak) / t), a total becomes f * total, and a moment becomes
    # f * (moment + total * (old peak - new peak)). If only the old peak is NEVER (-3e38), f is 0. The
    # difference of the peaks is bounded, because its product with a total could otherwise overflow to infinity, and 0
    # times infinity is nan.
    moment = jnp.sum(f * (moments + totals * jnp.maximum(down, -1e30)), axis=0)
    return jnp.stack([peak, jnp.sum(f * totals, axis=0), moment])


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def sum_negatives(batch: Batch, *, plan: Plan, interpret: bool) -> FirstSweep:
    """Run pass 1: for one rectangle after the other, merge the sums of the tiles into those of the anchors."""
    inputs, height, width = prepare(batch, plan)
    b = batch.image_features.shape[0]
    images, texts = inputs.e1.shape[0], inputs.e2.shape[0]

    def visit(k: jax.Array, states: Any) -> Any:
        i, j = k // (texts // width), k % (texts // width)
        scales = [cut(inputs.scales[0], i, height), cut(inputs.scales[1], j, width)]
        parts = launch(
            sums_kernel, inputs, i, j, height, width, scales, has_v=False, b=b, plan=plan, interpret=interpret
        )
        old = [cut(states[0], i, height, axis=1), cut(states[1], j, width, axis=1)]
        new = [_merge(*three) for three in zip(old, (parts[:3], parts[3:]), scales, strict=True)]
        return tuple(_put(*three, axis=1) for three in zip(states, new, (i, j), strict=True))

    # The loop has one compiled body for all rectangles. If it were unrolled, a large batch would compile for minutes.
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
    # Totals and moments are relative to the peak m. Relative to the positive z_ii, with D_ij = (z_ij - z_ii) / t:
    # log sum_j exp(D_ij) = (m - z_ii) / t + log total, and the mean of D_ij with weights exp(D_ij) is
    # (m - z_ii + moment / total) / t. For an anchor without negatives the two numbers are -inf and 0.
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
    """Run pass 2: for one rectangle after the other, compute V and multiply V with the features."""
    inputs, height, width = prepare(batch, plan)
    b, d = batch.image_features.shape
    images, texts = inputs.e1.shape[0], inputs.e2.shape[0]
    weights = weight_image, weight_text
    # w_ij = factor_i exp((z_ij - m_i) / t_i), in which factor_i is the given weight of anchor i divided by total_i.
    factors = [weight.astype(jnp.float32) / total for weight, total in zip(weights, saved[1::2], strict=True)]
    back = None
    # A float16 overflows above 65504 and is imprecise below 6e-5, so V is scaled by a power of two (exactly).
    if plan.buffer == jnp.float16:
        # An exponential is at most 1, so V is at most the sum of the largest factors of both sides.
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
        here = [cut(x, i, height) for x in anchors[0]] + [cut(x, j, width) for x in anchors[1]]
        (v,) = launch(
            weights_kernel, inputs, i, j, height, width, here, has_v=True, b=b, plan=plan, interpret=interpret
        )
        # V E2 is a sum over texts and V^T E1 a sum over images; this rectangle adds its terms to both sums.
        to_image = cut(pulls[0], i, height) + product(v, cut(inputs.e2, j, width), 1)
        to_text = cut(pulls[1], j, width) + product(v, cut(inputs.e1, i, height), 0)
        return _put(pulls[0], to_image, i), _put(pulls[1], to_text, j)

    start = tuple(jnp.zeros((length, inputs.e1.shape[1]), jnp.float32) for length in (images, texts))
    rectangles = (images // height) * (texts // width)
    pulls = jax.lax.fori_loop(jnp.int32(0), jnp.int32(rectangles), visit, start)
    image_pull, text_pull = (pull[:b, :d] if back is None else pull[:b, :d] * back for pull in pulls)
    return SecondSweep(image_pull, text_pull)


class PallasSweeps:
    """The sweeps on an NVIDIA GPU, or interpreted on the CPU; see `drrho_core.extend.Sweeps`."""

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Return the reason why these kernels do not take this batch, or None if they take it."""
        features = batch.image_features
        platform = platform_of(features)
        if features.dtype.name not in PLANS:
            return f"the Pallas kernels take float32 and half types, not {features.dtype}"
        if platform not in ("gpu", "cuda", "cpu"):
            return f"the Pallas kernels run on one NVIDIA GPU, not on {platform}"
        if mode == "auto" and platform == "cpu":
            return "on the CPU the Pallas kernels are interpreted, which is slow"
        if mode == "auto" and features.dtype == jnp.float32:
            return "the Pallas kernels multiply float32 no faster than XLA"
        if mode == "auto" and features.shape[0] < SMALLEST:
            return f"the batch is smaller than {SMALLEST}"
        return None

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Run pass 1: return sums over the negatives of each anchor."""
        batch = _without_empty_reference(batch)
        swept: FirstSweep = sum_negatives(batch, **options_for(batch))
        return swept

    def pull_back(
        self, batch: Batch, first: FirstSweep, weight_image: jax.Array, weight_text: jax.Array, /
    ) -> SecondSweep:
        """Run pass 2: return V E2 and V^T E1."""
        batch = _without_empty_reference(batch)
        swept: SecondSweep = pull_back(batch, first.saved, weight_image, weight_text, **options_for(batch))
        return swept


def _without_empty_reference(batch: Batch) -> Batch:
    """Return the batch without reference features of width 0: they change no result, and a kernel cannot load them."""
    reference = batch.reference_features
    return batch._replace(reference_features=None) if reference is not None and not reference[0].shape[1] else batch


def options_for(batch: Batch) -> dict[str, Any]:
    """Return the static arguments of both sweeps: JAX compiles once for each plan."""
    features = batch.image_features
    plan = PLANS[features.dtype.name]
    if batch.pair_mask is not None:
        plan = plan._replace(rows=min(plan.rows, MASKED), columns=min(plan.columns, MASKED))
    return {"plan": plan, "interpret": platform_of(features) == "cpu"}


def platform_of(array: jax.Array) -> str:
    """Return the platform of an array, such as ``"gpu"``; for a tracer, the platform of JAX's default device."""
    device = device_of(array)
    if device is None:
        return jax.default_backend()
    return str(getattr(device, "platform", "several devices"))
