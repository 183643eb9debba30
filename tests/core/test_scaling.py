"""The factors of the features: Z and its rates keep their product, and nothing overflows, also if values are traced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drrho_core.contrastive import scaling
from drrho_core.contrastive.scaling import Scaling
from helpers.features import unit_rows

B, D, R = 5, 4, 3
LARGEST = {"float32": float(np.finfo("float32").max), "float64": float(np.finfo("float64").max)}
# Sizes of the images, of the texts, and of the reference model's features; None: no reference model.
SIZES = {
    "unit": (1.0, 1.0, None),
    "reference": (1.0, 1.0, (1.0, 1.0)),
    "images": (1e30, 1e15, None),
    "texts": (1e3, 1e37, None),
    "reference images": (1.0, 1.0, (1e35, 1e10)),
    "reference texts": (1.0, 1e3, (1e3, 1e37)),
    "zeros": (0.0, 0.0, None),
}


def inputs(name: str, dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(1)
    image, text, reference = SIZES[name]

    def rows(size: float, width: int) -> np.ndarray:
        return (size * unit_rows(rng, B, width)).astype(dtype)

    return {
        "images": rows(image, D),
        "texts": rows(text, D),
        "references": None if reference is None else (rows(reference[0], R), rows(reference[1], R)),
        "reference_weight": 2.0,
        "margin": None,
        "xp": np,
    }


def find_scaling(given: dict[str, Any], **options: Any) -> Scaling:
    """Call the function without NumPy's warnings: traced code computes numbers that it then replaces."""
    with np.errstate(over="ignore", under="ignore"):
        return scaling.find_scaling(**given, **options)


def temperatures(kind: str, dtype: str = "float32") -> Any:
    if kind == "number":
        return 0.25
    if kind == "array":
        return np.asarray(0.25, dtype=dtype)
    return np.linspace(0.2, 0.9, B).astype(dtype), np.linspace(0.7, 0.3, B).astype(dtype)


def largest_logit(found: Scaling, given: dict[str, Any]) -> float:
    """Return the largest |Z| with the features multiplied by the factors, in float64."""
    left, right = float(found.left), float(found.right)
    sides = [np.asarray(given[name], dtype=np.float64) for name in ("images", "texts")]
    z = np.abs(left * sides[0]) @ np.abs(right * sides[1]).T
    if given["references"] is not None:
        r1, r2 = (np.asarray(side, dtype=np.float64) for side in given["references"])
        z = z + np.abs(given["reference_weight"] * left * r1) @ np.abs(right * r2).T
    return float(np.max(z))


@pytest.mark.parametrize("visible", [True, False], ids=["visible", "traced"])
@pytest.mark.parametrize("kind", ["number", "array", "pair"])
@pytest.mark.parametrize("size", SIZES)
def test_factors_times_rate_are_one_over_the_temperature(
    size: str, kind: str, visible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "is_traced", lambda xp: True)
    given, temperature = inputs(size), temperatures(kind)
    found = find_scaling(given, temperature=temperature, visible=visible)
    assert largest_logit(found, given) <= LARGEST["float32"] / 8.0
    units = 1.0 / float(found.left), 1.0 / float(found.right)
    if size in ("unit", "reference", "zeros"):
        assert units == (1.0, 1.0)
    pair = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    for rate, t in zip(found.rates, pair, strict=True):
        # A rate as large as the dtype allows stands for a temperature far below the smallest difference of logits.
        expected = units[0] * units[1] / np.asarray(t, dtype=np.float64)
        smallest = 4.0 * float(np.finfo("float32").smallest_normal)
        np.testing.assert_allclose(rate, np.minimum(expected, 1.0 / smallest), rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("margin", [None, 1e-3, 1e38])
def test_traced_values_get_the_factors_of_visible_values(
    size: str, margin: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "is_traced", lambda xp: True)
    given = inputs(size) | {"margin": margin}
    seen = find_scaling(given, temperature=1.0, visible=True)
    traced = find_scaling(given, temperature=1.0, visible=False)
    np.testing.assert_allclose([traced.left, traced.right], [seen.left, seen.right], rtol=1e-6)
    assert all(floor is not None for floor in traced.floors)


@pytest.mark.parametrize("kind", ["number", "array", "pair"])
def test_differences_above_the_floor_do_not_overflow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "is_traced", lambda xp: True)
    given = inputs("unit")
    factors = {"number": 1e-38, "array": np.float32(1e-38), "pair": np.float32(1e-38)}[kind]
    temperature = temperatures(kind)
    cold = tuple(t * factors for t in temperature) if kind == "pair" else temperature * factors
    found = find_scaling(given, temperature=cold, visible=False)
    for rate, floor in zip(found.rates, found.floors, strict=True):
        product = np.asarray(rate, dtype=np.float64) * np.asarray(floor, dtype=np.float64)
        assert np.all(product >= -LARGEST["float32"] / 4.0 * 1.0001)
        assert np.all(product <= -LARGEST["float32"] / 8.0)


def test_without_visible_values_or_a_trace_features_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "is_traced", lambda xp: False)
    given = inputs("unit")
    found = find_scaling(given, temperature=0.25, visible=False)
    assert (found.left, found.right, found.rates) == (1.0, 1.0, (4.0, 4.0))


def test_empty_reference_features_have_size_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "is_traced", lambda xp: True)
    given = inputs("images")
    empty = np.zeros((B, 0), dtype=np.float32)
    for visible in (True, False):
        expected = find_scaling(given, temperature=0.25, visible=visible)
        found = find_scaling(given | {"references": (empty, empty)}, temperature=0.25, visible=visible)
        assert (float(found.left), float(found.right)) == (float(expected.left), float(expected.right))
        assert all(np.asarray(unit).dtype != np.float64 for unit in (found.left, found.right) if not visible)


@pytest.mark.parametrize("rate", [1.0, 2.0, 0.5, 1e38, np.asarray([1.0, 3.0, 1e38], dtype=np.float32)])
def test_a_saturated_product_is_the_product_or_a_quarter_of_the_largest(rate: Any) -> None:
    x = np.asarray([1.5, -2.0, 3.0], dtype=np.float32)
    quarter = LARGEST["float32"] / 4.0
    expected = np.clip(x.astype(np.float64) * np.asarray(rate, dtype=np.float64), -quarter, quarter)
    np.testing.assert_allclose(scaling.saturated(x, rate, xp=np), expected, rtol=1e-6)


SMALLEST = 4.0 * float(np.finfo("float32").smallest_normal)


@pytest.mark.parametrize("traced", [False, True], ids=["visible", "traced"])
@pytest.mark.parametrize("t", [1e-44, 1e-37, 1e-4, 1.0, 7.0, 1e38])
def test_rate_and_floor_of_a_number_follow_the_rule(t: float, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "is_traced", lambda xp: True)
    largest, given = LARGEST["float32"], inputs("unit")
    found = find_scaling(given, temperature=t, visible=not traced)
    rate = 1.0 / min(max(t, SMALLEST), 4.0 / SMALLEST)
    # |Z| <= width * (largest entry of the images) * (largest entry of the texts).
    reach = D * float(np.max(np.abs(given["images"]))) * float(np.max(np.abs(given["texts"])))
    if traced:
        np.testing.assert_allclose(found.rates, (rate, rate), rtol=1e-6)
        np.testing.assert_allclose(found.floors, (-largest / 4.0 * min(1.0 / rate, 1.0),) * 2, rtol=1e-6)
    else:
        assert found.rates == (rate, rate)
        floor = None if reach * rate <= largest / 8.0 else -largest / 4.0 * min(1.0 / rate, 1.0)
        assert found.floors == (floor, floor)


def test_rates_and_floors_of_arrays_follow_the_rule() -> None:
    image = np.asarray([1e-38, 1e-20, 0.5, 3.0, 1e37], dtype=np.float32)
    text = image[::-1].copy()
    found = find_scaling(inputs("unit"), temperature=(image, text), visible=True)
    for rate, floor, t in zip(found.rates, found.floors, (image, text), strict=True):
        kept = np.clip(t.astype(np.float64), SMALLEST, 4.0 / SMALLEST)
        np.testing.assert_allclose(rate, 1.0 / kept, rtol=1e-6)
        np.testing.assert_allclose(floor, np.minimum(kept, 1.0) * (-LARGEST["float32"] / 4.0), rtol=1e-6)


@pytest.mark.parametrize("margin", [None, 1e-3, 1e30])
@pytest.mark.parametrize("size", ["images", "texts", "reference images", "reference texts"])
def test_large_features_are_divided_by_their_largest_entries(size: str, margin: float | None) -> None:
    given = inputs(size) | {"margin": margin}
    found = find_scaling(given, temperature=1.0, visible=True)
    sides = [float(np.max(np.abs(given[name]))) for name in ("images", "texts")]
    if given["references"] is not None:
        sides[0] = max(sides[0], 2.0 * float(np.max(np.abs(given["references"][0]))))
        sides[1] = max(sides[1], float(np.max(np.abs(given["references"][1]))))
    left, right = sides
    if margin is not None:
        left *= max(1.0, margin / left / right)
    assert (found.left, found.right) == (1.0 / min(left, LARGEST["float32"] / 8.0), 1.0 / right)


@pytest.mark.parametrize("size", [1e17, 4e18, 1e19])
@pytest.mark.parametrize("margin", [None, 1.0, 1e36, 1e38])
def test_features_stay_as_they_are_if_there_is_room(size: float, margin: float | None) -> None:
    images, texts = (np.full((B, D), size, dtype=np.float32) for _ in range(2))
    given = inputs("unit") | {"images": images, "texts": texts, "margin": margin}
    found = find_scaling(given, temperature=1.0, visible=True)
    side = float(images[0, 0])
    room = side * side * D
    if margin is not None:  # the products with the features and the sum over the batch, too
        room = (room + margin) * max(1.0, side) * B
    assert ((found.left, found.right) == (1.0, 1.0)) == (room <= LARGEST["float32"] / 8.0)
