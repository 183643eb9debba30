"""Numbers at the ends of float32 never give nan, unless an option is outside its domain.

Reference features may also have another dtype than the features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from drrho_core import (
    contrastive_step,
    distillation_loss,
    hinge_margin_loss,
    info_nce,
    sigmoid_loss,
    unimodal_contrastive_step,
)
from helpers.dense_objectives import UNSEEN, B, draw, in_library

SIZES = [1e-38, 1e-30, 1e-19, 1e-3, 1.0, 1e3, 1e18, 1e20, 1e30, 3e37]
TEMPERATURES = [1e-37, 1e-30, 1e-10, 1e-2, 1.0, 1e10, 1e30, 2e37]
FEW_SIZES, FEW_TEMPERATURES = [1e-38, 1.0, 1e20, 3e37], [1e-37, 1e-2, 1e10, 2e37]  # for eager JAX, which is slow


def everything(size: float, other_size: float, t: float, library: str) -> dict[str, Callable[[], Any]]:
    images, texts, one, other = (x[:5] for x in draw("unit", 9))
    a, b = (images * np.float32(size), texts * np.float32(other_size))
    a, b, one, other, never, per_anchor = in_library(
        library, (a, b, one, other, np.full(5, -np.inf, dtype=np.float32), np.full(5, t, dtype=np.float32))
    )
    return {
        "step": lambda: contrastive_step(a, b, never, never, temperature=t),
        "per anchor": lambda: contrastive_step(a, b, never, never, temperature=(per_anchor, per_anchor)),
        "reference": lambda: contrastive_step(a, b, never, never, temperature=t, reference_features=(b, a)),
        "unimodal": lambda: unimodal_contrastive_step(a, b, never, never, temperature=t),
        "info_nce": lambda: info_nce(a, b, temperature=t),
        "distillation": lambda: distillation_loss(a, b, one, other, temperature=t, reference_temperature=0.1),
        "teacher": lambda: distillation_loss(one, other, a, b, temperature=0.1, reference_temperature=t),
        "sigmoid": lambda: sigmoid_loss(a, b, scale=min(1.0 / t, 3e38), bias=-10.0),
        "hinge": lambda: hinge_margin_loss(a, b, margin=min(t, 1e30)),
    }


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_nothing_is_nan_whatever_the_size_of_features_and_temperatures(library: str) -> None:
    bad = []
    sizes, temperatures = (FEW_SIZES, FEW_TEMPERATURES) if library == "jax" else (SIZES, TEMPERATURES)
    for size in sizes:
        for other_size in (1.0, size):
            for t in temperatures:
                for name, call in everything(size, other_size, t, library).items():
                    with np.errstate(all="ignore"):
                        result = call()
                    for field, value in zip(result._fields, result, strict=True):
                        for part in value if isinstance(value, tuple) else (value,):
                            if np.any(np.isnan(np.asarray(part))):
                                bad.append(f"{name}.{field} at features {size:g}, {other_size:g} and temperature {t:g}")
    assert bad == []


@pytest.mark.parametrize("per_anchor", [False, True])
def test_gradients_stay_right_where_similarities_overflow(per_anchor: bool) -> None:
    images, texts, *_ = draw("unit", 10)
    t: Any = (np.full(B, 0.05, np.float32),) * 2 if per_anchor else 0.05
    with np.errstate(over="ignore"):  # the loss is larger than float32 holds
        step = contrastive_step(images * np.float32(1e25), texts * np.float32(1e20), UNSEEN, UNSEEN, temperature=t)
    wide: Any = (np.full(B, 0.05),) * 2 if per_anchor else 0.05
    large = images.astype("f8") * 1e25, texts.astype("f8") * 1e20
    expected = contrastive_step(*large, UNSEEN.astype("f8"), UNSEEN.astype("f8"), temperature=wide)
    for name in ("image_gradient", "text_gradient"):
        got, wanted = getattr(step, name), getattr(expected, name)
        assert np.max(np.abs(got - wanted)) <= 1e-6 * np.max(np.abs(wanted))


def test_a_hinge_without_violations_has_no_gradient_whatever_the_features_size() -> None:
    features = 3e25 * np.eye(3, dtype=np.float32)
    result = hinge_margin_loss(features, features, margin=0.0)
    assert result.loss == 0.0
    assert np.all(result.image_gradient == 0.0)
    assert np.all(result.text_gradient == 0.0)


@pytest.mark.parametrize("factor", [1e-38, 1e10, 3e38])
@pytest.mark.parametrize("t", [1e-35, 1e-2, 1e30])
def test_nothing_is_nan_whatever_the_size_of_anchor_weights(t: float, factor: float) -> None:
    images, texts, *_ = draw("unit", 13)
    weight = np.full(B, factor, dtype=np.float32)
    with np.errstate(over="ignore"):
        for function, states in ((contrastive_step, 2), (unimodal_contrastive_step, 2), (info_nce, 0)):
            result = function(images, texts, *(UNSEEN,) * states, temperature=t, anchor_weight=weight)
            for field, value in zip(result._fields, result, strict=True):
                assert not np.any(np.isnan(value)), (function.__name__, field)


def test_large_anchor_weights_scale_the_loss() -> None:
    images, texts, *_ = draw("unit", 14)
    plain = contrastive_step(images, texts, UNSEEN, UNSEEN, temperature=0.01)
    weight = np.full(B, 1e38, dtype=np.float32)
    scaled = contrastive_step(images, texts, UNSEEN, UNSEEN, temperature=0.01, anchor_weight=weight)
    assert scaled.loss == pytest.approx(1e38 * float(plain.loss), rel=1e-5)


HALF_AND_WIDE = [
    ("numpy", "float16", "float32"),
    ("numpy", "float32", "float64"),
    ("torch", "bfloat16", "float32"),
    ("torch", "float16", "float64"),
    ("jax", "bfloat16", "float32"),
    ("jax", "bfloat16", "float16"),
]


@pytest.mark.parametrize("function", [contrastive_step, unimodal_contrastive_step])
@pytest.mark.parametrize(("library", "dtype", "reference_dtype"), HALF_AND_WIDE)
def test_reference_features_of_another_dtype_are_promoted(
    library: str, dtype: str, reference_dtype: str, function: Any
) -> None:
    import array_api_compat

    images, texts, one, other = in_library(library, draw("unit", 11))
    never = in_library(library, UNSEEN)
    xp = array_api_compat.array_namespace(images)
    half, wide = getattr(xp, dtype), getattr(xp, reference_dtype)
    features = [xp.astype(x, half) for x in (images, texts)]
    references = tuple(xp.astype(x, wide) for x in (one, other))
    mixed = function(*features, never, never, temperature=0.1, reference_features=references)
    together = xp.result_type(half, wide)
    wider = [xp.astype(x, together) for x in features]
    same = function(
        *wider, never, never, temperature=0.1, reference_features=tuple(xp.astype(x, together) for x in references)
    )
    for name, got, wanted in zip(mixed._fields, mixed, same, strict=True):
        if name.endswith("_gradient") and not name.startswith("temperature"):
            assert got.dtype == half
            got, wanted = xp.astype(got, xp.float32), xp.astype(xp.astype(wanted, half), xp.float32)
        got, wanted = (np.asarray(x, dtype=np.float64) for x in (got, wanted))
        assert np.allclose(got, wanted, rtol=2e-5, atol=1e-6 if together == xp.float32 else 0.0), name


BEYOND = {
    "temperature": [0.0, -1.0, np.inf],
    "gamma": [0.0, 1.5, -0.1, np.nan],
    "eps": [-1.0],
    "radius": [-1.0],
    "reference_weight": [-0.5],
    "anchor_weight": [np.full(B, -1.0, dtype=np.float32)],
}


@pytest.mark.parametrize("name", BEYOND)
def test_an_option_outside_its_domain_gives_nan_where_code_is_traced(name: str) -> None:
    jax = pytest.importorskip("jax")
    images, texts, one, other = in_library("jax", draw("unit", 12))
    seen = jax.numpy.zeros(B, dtype=jax.numpy.float32)
    plain = {"temperature": 0.1, "gamma": 0.5, "reference_features": (one, other)}

    @jax.jit
    def step(value: Any) -> Any:
        return contrastive_step(images, texts, seen, seen, **(plain | {name: value}))

    for value in BEYOND[name]:
        got = step(jax.numpy.asarray(value, dtype=jax.numpy.float32))
        assert np.isnan(got.loss), value
        if name != "radius":  # which the gradient does not depend on
            assert np.all(np.isnan(got.image_gradient)), value
