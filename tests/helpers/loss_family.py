"""SigLIP, distillation and hinge once more as loops in long numbers, and the problems of their tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import pytest

import drrho_core as dc
from helpers.features import unit_rows

B, D, R = 4, 3, 2
FIELDS = ("loss", "image_gradient", "text_gradient")


class Case(NamedTuple):
    function: Callable[..., Any]
    scalars: dict[str, float]
    formula: Callable[..., Any]
    steepness: float  # how much larger than the features' rounding a loss's may be

    @property
    def arrays(self) -> int:
        return 4 if self.function is dc.distillation_loss else 2


def dot(left: Any, right: Any) -> Any:
    return mp.fsum(x * y for x, y in zip(left, right, strict=True))


def sigmoid_formula(images: Any, texts: Any, scale: Any, bias: Any, mask: Any = None) -> Any:
    total = mp.mpf(0)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            if mask is not None and i != j and not mask[i, j]:
                continue
            y = 1 if i == j else -1
            total -= mp.log(1 / (1 + mp.exp(-y * (scale * dot(image, text) + bias))))
    return total / len(images)


def distillation_formula(images: Any, texts: Any, r1: Any, r2: Any, tau: Any, reference_tau: Any) -> Any:
    b, total = len(images), mp.mpf(0)
    for columns in (False, True):
        for i in range(b):
            p, q = (
                [mp.exp(dot(one[j if columns else i], two[i if columns else j]) / t) for j in range(b)]
                for one, two, t in ((images, texts, tau), (r1, r2, reference_tau))
            )
            total -= mp.fsum(q[j] / mp.fsum(q) * mp.log(p[j] / mp.fsum(p)) for j in range(b))
    return total / (2 * b)


def hinge_formula(images: Any, texts: Any, margin: Any, mask: Any = None) -> Any:
    b, total = len(images), mp.mpf(0)
    for columns in (False, True):
        for anchor in range(b):
            pairs = [(other, anchor) if columns else (anchor, other) for other in range(b) if other != anchor]
            pairs = [pair for pair in pairs if mask is None or mask[pair]]
            own = dot(images[anchor], texts[anchor])
            terms = [max(mp.mpf(0), dot(images[i], texts[j]) - own + margin) ** 2 for i, j in pairs]
            total += mp.fsum(terms) / max(len(terms), 1)
    return total / (2 * b)


CASES = {
    "sigmoid": Case(dc.sigmoid_loss, {"scale": 7.0, "bias": -2.0}, sigmoid_formula, 1.0),
    "sigmoid, steep": Case(dc.sigmoid_loss, {"scale": 900.0, "bias": 3.0}, sigmoid_formula, 100.0),
    "distillation": Case(
        dc.distillation_loss, {"temperature": 0.2, "reference_temperature": 0.5}, distillation_formula, 1.0
    ),
    "distillation, cold": Case(
        dc.distillation_loss, {"temperature": 1e-3, "reference_temperature": 3e-4}, distillation_formula, 300.0
    ),
    "hinge": Case(dc.hinge_margin_loss, {"margin": 0.2}, hinge_formula, 1.0),
    "hinge, wide": Case(dc.hinge_margin_loss, {"margin": 4.0}, hinge_formula, 1.0),
}
# Not symmetric; the second image and the first text have no negatives. What the diagonal says does not matter.
MASK = np.array([[0, 1, 0, 1], [0, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]], dtype=bool)
assert MASK.shape == (B, B)


def thin(space: Any) -> None:
    """JAX compiles every operation that is not jitted: it is met once so, and jitted for the rest."""
    if space.name == "jax" and space.jit is None:
        pytest.skip("JAX is met jitted")


def draw(seed: int = 3, b: int = B) -> list[np.ndarray]:
    """Images and texts that match a little, and a reference model of another width."""
    rng = np.random.default_rng(seed)
    images = unit_rows(rng, b, D)
    texts = images + 0.8 * unit_rows(rng, b, D)
    return [images, texts / np.linalg.norm(texts, axis=1, keepdims=True), unit_rows(rng, b, R), unit_rows(rng, b, R)]


@functools.cache
def exact(name: str, dtype: str, masked: bool = False) -> dict[str, Any]:
    """Loss and all gradients of the inputs as `dtype` has them: 60 digits, differences taken over 1e-20."""
    case = CASES[name]
    formula = functools.partial(case.formula, mask=MASK) if masked else case.formula
    rounded = [np.asarray(x, dtype=dtype).astype(np.float64) for x in draw()[: case.arrays]]
    scalars = {key: float(np.asarray(value, dtype=dtype)) for key, value in case.scalars.items()}
    with mp.workdps(60):
        features = [[[mp.mpf(float(x)) for x in row] for row in array] for array in rounded]
        values = [mp.mpf(value) for value in scalars.values()]
        h = mp.mpf("1e-20")

        def slope(place: list[Any], index: int) -> float:
            middle, ends = place[index], []
            for step in (h, -h):
                place[index] = middle + step
                ends.append(formula(*features, *values))
            place[index] = middle
            return float((ends[0] - ends[1]) / (2 * h))

        result: dict[str, Any] = {"loss": float(formula(*features, *values))}
        for side, field in enumerate(FIELDS[1:]):
            result[field] = np.array([[slope(row, k) for k in range(D)] for row in features[side]])
        for index, key in enumerate(scalars):
            result[f"{key}_gradient"] = slope(values, index)
    return result


def given(space: Any, case: Case, as_arrays: bool) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments and scalars in the library."""
    numbers = {key: float(space.rounded(value)) for key, value in case.scalars.items()}
    if as_arrays:
        numbers = {key: space.asarray(np.asarray(value, dtype=space.dtype_name)) for key, value in numbers.items()}
    return [space.asarray(x) for x in draw()[: case.arrays]], numbers


def check(result: Any, expected: dict[str, Any], bound: float, to_numpy: Callable[[Any], Any] = np.asarray) -> None:
    """Every field that is there within `bound` of its largest value; the loss of max(1, loss)."""
    for field in result._fields:
        got, wanted = to_numpy(getattr(result, field)).astype(np.float64), np.asarray(expected[field])
        assert got.shape == wanted.shape, field
        size = max(1.0, float(np.max(np.abs(wanted)))) if wanted.ndim == 0 else float(np.max(np.abs(wanted)))
        error = float(np.max(np.abs(got - wanted)))
        assert error <= bound * size, f"{field}: off by {error:.2e} of {size:.2e}; {got} for {wanted}"


def hinge(b: int = B, dtype: Any = np.float64) -> Any:
    return dc.hinge_margin_loss(*(x.astype(dtype) for x in draw(b=b)[:2]), margin=1.0)
