"""Factors for features or temperatures of extreme size, so that no similarity and no exponent overflows.

For features of usual size the factors are 1, and no multiplication happens. A feature of size 1e20 in float32 is legal,
but its products are infinite. The factors make all entries of Z, the matrix of excess similarities, finite. The rates
1 / t, which turn differences of Z into exponents, contain the inverse factors, so the exponents do not change.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from drrho_core._array_api import Array, Namespace, PerAnchor, Scalar
from drrho_core._routines import is_traced

USUAL_SIZE = 1e4
"""Bound on |Z| that is assumed if the features cannot be read without waiting for the device."""


class Scaling(NamedTuple):
    """The factors of Z, and the rates that turn Z into exponents: ``(Z - threshold) * rate``.

    The threshold is subtracted before the multiplication: the difference of two nearly equal logits is exact.
    """

    left: Scalar  # factor of the image side
    right: Scalar  # factor of the text side
    rates: tuple[Scalar, Scalar]  # 1 / (left right t) per direction: a scalar or (b,)
    floors: tuple[Scalar | None, Scalar | None]  # differences of Z below the floor become the floor


def find_scaling(
    images: Array,
    texts: Array,
    references: tuple[Array, Array] | None,
    reference_weight: Scalar,
    temperature: PerAnchor,
    margin: Scalar | None,
    visible: bool,
    xp: Namespace,
    sizes: list[Any] | None = None,
) -> Scaling:
    """Return the factors of the features, usually 1, and the rates and floors of all anchors.

    If a loss adds a `margin` to differences of Z, these sums and their products with features do not overflow either.
    If a batch is shared by several ranks, `sizes` holds the `feature_sizes` of the whole batch, so that all ranks use
    the same factors.
    """
    finfo = xp.finfo(images.dtype)
    largest, smallest = float(finfo.max), 4.0 * float(finfo.smallest_normal)
    if sizes is None:
        sizes = feature_sizes(images, texts, references, visible, xp)
    if sizes is None:
        return Scaling(1.0, 1.0, *_rates(temperature, USUAL_SIZE, largest, smallest, xp))

    # |Z| <= width * (largest entry of the left factor) * (largest entry of the right factor).
    bigger = max if visible else partial(_bigger, xp)
    width = float(images.shape[1])
    if references is not None:
        width += float(references[0].shape[1])
        weight = float(reference_weight) if visible else reference_weight
        sizes = [bigger(sizes[0], weight * sizes[2]), bigger(sizes[1], sizes[3])]
    reach = room = sizes[0] * sizes[1] * width
    if margin is not None:
        margin = float(margin) if visible else margin
        room = (reach + margin) * bigger(1.0, bigger(sizes[0], sizes[1])) * float(images.shape[0])

    # Both sides are divided by units that make Z and the margin about 1 in size. If nothing can overflow, the units
    # are 1.
    if visible:
        fits = room <= largest / 8.0
        units = [1.0, 1.0] if fits else _units(sizes, margin, largest, smallest, xp, bigger)
        if not isinstance(temperature, (tuple, float)):
            temperature = float(temperature)
    else:
        fits = ~(room > largest / 8.0)  # True for nan, so that a feature that is nan affects its own anchors only
        units = [xp.where(fits, 1.0, unit) for unit in _units(sizes, margin, largest, smallest, xp, bigger)]
    left, right = 1.0 / units[0], 1.0 / units[1]
    if isinstance(temperature, tuple):
        rest: PerAnchor = (temperature[0] * left * right, temperature[1] * left * right)
    else:
        rest = temperature * left * right
    return Scaling(left, right, *_rates(rest, reach if visible and fits else None, largest, smallest, xp))


def feature_sizes(
    images: Array, texts: Array, references: tuple[Array, Array] | None, visible: bool, xp: Namespace
) -> list[Any] | None:
    """Return the largest absolute value of both sides' features, then of their reference features if there are any.

    The result is None if the values could be read only by waiting for the device.
    """
    if not visible and not is_traced(xp):
        return None
    sizes: list[Any] = []
    for place, x in enumerate((images, texts, *(references or ()))):
        if 0 in x.shape:
            sizes.append(0.0 if visible else xp.zeros((), dtype=x.dtype))
        elif visible:
            sizes.append(max(float(xp.max(x)), -float(xp.min(x))))
        elif place < 2:
            sizes.append(xp.max(xp.abs(x)))
        else:
            # Reference features may be constants of the traced function, and XLA, the compiler, would take seconds to
            # reduce constants. It does not do so if the result depends on an argument of the function.
            sizes.append(xp.max(xp.abs(x) + xp.zeros_like(x[:1, :1]) * images[:1, :1]))
    return sizes


def _bigger(xp: Namespace, a: Any, b: Any) -> Any:
    """Return the larger of two numbers. The second one, both or none of them may be arrays."""
    if isinstance(a, float):
        return max(a, b) if isinstance(b, float) else xp.clip(b, min=a)
    return xp.maximum(a, b)


def _units(sizes: list[Any], margin: Any, largest: float, smallest: float, xp: Namespace, bigger: Any) -> list[Any]:
    """Return the divisors of both sides that make the entries of Z, and the margin, about 1 in size."""
    left, right = (bigger(smallest, size) for size in sizes)
    if margin is not None:
        left = left * bigger(1.0, margin / left / right)
    return [min(left, largest / 8.0) if isinstance(left, float) else xp.clip(left, max=largest / 8.0), right]


def _rates(temperature: PerAnchor, reach: float | None, largest: float, smallest: float, xp: Namespace) -> Any:
    """Return both directions' rates 1 / t, limited to numbers that the dtype can hold, and the floors; see `Scaling`.

    No floors are needed if all anchors have one temperature and `reach`, the bound on |Z|, times the rate is finite.
    """
    if isinstance(temperature, float):
        # Neither t nor its inverse may be a subnormal number, because some compilers replace such numbers by 0.
        rate = 1.0 / min(max(temperature, smallest), 4.0 / smallest)
        floor = None
        if reach is None or reach * rate > largest / 8.0:
            floor = -largest / 4.0 * min(1.0 / rate, 1.0)
        return (rate, rate), (floor, floor)
    pair = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    kept = [xp.clip(t, min=smallest, max=4.0 / smallest) for t in pair]
    floors = [xp.clip(t, max=1.0) * (-largest / 4.0) for t in kept]
    return (1.0 / kept[0], 1.0 / kept[1]), (floors[0], floors[1])


def times_rate(x: Array, rate: Scalar) -> Array:
    """Return exponents, which are `x` times a rate; `x` is overwritten if the library can."""
    if not (isinstance(rate, float) and rate == 1.0):
        x *= rate
    return x


def saturated(x: Array, rate: Scalar, /, *, xp: Namespace) -> Array:
    """Return ``x * rate``, limited to a quarter of the dtype's largest number so that nothing overflows."""
    if isinstance(rate, float) and rate == 1.0:
        return x
    limit = float(xp.finfo(x.dtype).max) / 4
    bound = limit / max(rate, 1.0) if isinstance(rate, float) else limit / xp.clip(rate, min=1.0)
    return xp.clip(x, -bound, bound) * rate
