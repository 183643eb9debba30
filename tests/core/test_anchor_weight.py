"""Weights per anchor: a factor on each anchor's part of loss and gradients, and a reference model's choice of it."""

from __future__ import annotations

from typing import Any

import drrho_reference as oracle
import numpy as np
import pytest

from drrho_core import (
    contrastive_step,
    info_nce,
    pair_loss,
    reference_anchor_weight,
    unimodal_contrastive_step,
)

B, D, R = 6, 4, 3


def features(seed: int, b: int = B) -> tuple[np.ndarray, ...]:
    """Images, texts and reference features; all rows differ."""
    rng = np.random.default_rng(seed)
    both = [rng.normal(size=(b, width)) for width in (D, D, R, R)]
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in both)


def states(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image, text = np.where(rng.uniform(size=(2, B)) < 0.3, -np.inf, rng.normal(size=(2, B)))
    return image, text


def weights(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of very different sizes, one of them 0."""
    image, text = np.exp(2.0 * np.random.default_rng(seed).normal(size=(2, B)))
    image[1] = text[4] = 0.0
    return image, text


def carried(space: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(carried(space, member) for member in value)
    return space.asarray(value) if isinstance(value, np.ndarray) else value


def close(space: Any, actual: Any, expected: Any, k: float = 10.0) -> None:
    for name, got, wanted in zip(expected._fields, actual, expected, strict=True):
        pairs = zip(got, wanted, strict=True) if isinstance(wanted, tuple) else [(got, wanted)]
        for one, other in pairs:
            here, there = space.to_numpy(one), np.asarray(other)
            size = max(float(np.max(np.abs(there[np.isfinite(there)]), initial=0.0)), 1e-2)
            assert np.allclose(here, there, rtol=0.0, atol=k * space.unit * size), name


@pytest.mark.parametrize("per_anchor", [False, True])
@pytest.mark.parametrize("form", ["pair", "one array"])
def test_the_step_is_the_oracles(space: Any, form: str, per_anchor: bool) -> None:
    images, texts, *references = features(1)
    chosen = weights(2) if form == "pair" else weights(2)[0]
    tau = tuple(np.random.default_rng(3).uniform(0.1, 1.0, size=(2, B))) if per_anchor else 0.3
    options = {
        "temperature": tau, "gamma": 0.4, "eps": 0.01, "radius": 0.5,
        "reference_features": tuple(references), "anchor_weight": chosen,
    }  # fmt: skip
    arrays = (images, texts, *states(4))
    given = {name: carried(space, value) for name, value in options.items()}
    rounded = {
        name: tuple(map(space.rounded, value)) if isinstance(value, tuple) else value for name, value in options.items()
    }
    if form != "pair":
        rounded["anchor_weight"] = space.rounded(chosen)
    expected = oracle.contrastive_step(*map(space.rounded, arrays), **rounded)
    close(space, contrastive_step(*carried(space, arrays), **given), expected)


@pytest.mark.parametrize("function", ["unimodal_contrastive_step", "info_nce"])
def test_other_losses_are_the_oracles(space: Any, function: str) -> None:
    images, texts, *_ = features(5)
    ours = {"unimodal_contrastive_step": unimodal_contrastive_step, "info_nce": info_nce}[function]
    arrays = (images, texts, *(states(6) if function.startswith("unimodal") else ()))
    expected = getattr(oracle, function)(
        *map(space.rounded, arrays), temperature=0.25, anchor_weight=tuple(map(space.rounded, weights(7)))
    )
    close(space, ours(*carried(space, arrays), temperature=0.25, anchor_weight=carried(space, weights(7))), expected)


@pytest.mark.parametrize("tile_size", [None, 4])
def test_ones_change_nothing(tile_size: int | None) -> None:
    images, texts, *references = features(8)
    options: dict[str, Any] = {"temperature": 0.2, "gamma": 0.5, "reference_features": tuple(references)}
    plain = contrastive_step(images, texts, *states(9), **options, tile_size=tile_size)
    for ones in (np.ones(B), (np.ones(B), np.ones(B))):
        weighted = contrastive_step(images, texts, *states(9), **options, tile_size=tile_size, anchor_weight=ones)
        for one, other in zip(plain, weighted, strict=True):
            assert np.array_equal(one, other)


def test_gradients_are_linear_in_the_weights_and_the_state_does_not_see_them() -> None:
    images, texts, *_ = features(10)

    def step(anchor_weight: Any) -> Any:
        return contrastive_step(
            images, texts, *states(11), temperature=0.2, gamma=0.5, radius=0.3, anchor_weight=anchor_weight
        )

    chosen = weights(12)
    together, zero = step(chosen), np.zeros(B)
    parts = []
    for i, one_hot in enumerate(np.eye(B)):
        parts += [(chosen[0][i], step((one_hot, zero))), (chosen[1][i], step((zero, one_hot)))]
    for name in ("loss", "surrogate", "image_gradient", "text_gradient", "temperature_gradient"):
        total = sum(factor * getattr(part, name) for factor, part in parts)
        assert np.allclose(getattr(together, name), total, rtol=1e-12, atol=1e-13), name
    plain = step(None)
    assert np.array_equal(together.log_inner_image, plain.log_inner_image)
    assert np.array_equal(together.log_inner_text, plain.log_inner_text)


def test_all_weights_zero_is_a_step_of_nothing() -> None:
    images, texts, *_ = features(13)
    step = contrastive_step(images, texts, *states(14), temperature=0.2, anchor_weight=np.zeros(B))
    for value in step[:5]:
        assert np.all(np.asarray(value) == 0.0)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_weights_of_any_size_scale_the_gradient(factor: float) -> None:
    images, texts, *_ = (x.astype(np.float32) for x in features(15))
    unseen, ones = np.full(B, -np.inf, dtype=np.float32), np.ones(B, dtype=np.float32)
    plain = contrastive_step(images, texts, unseen, unseen, temperature=0.01)
    scaled = contrastive_step(images, texts, unseen, unseen, temperature=0.01, anchor_weight=ones * np.float32(factor))
    assert np.allclose(scaled.image_gradient, plain.image_gradient * np.float32(factor), rtol=1e-5)


def test_a_weight_that_overflows_gives_a_finite_gradient() -> None:
    # With a memory far below the batch's own estimate, g / (eps + u) is 2, and twice this factor is no float32.
    images, texts, *_ = (x.astype(np.float32) for x in features(16))
    old, factor = np.full(B, -50.0, dtype=np.float32), np.full(B, 2e38, dtype=np.float32)
    with np.errstate(over="ignore"):
        step = contrastive_step(images, texts, old, old, temperature=0.5, gamma=0.5, anchor_weight=factor)
    assert np.all(np.isfinite(step.image_gradient))
    assert np.any(step.image_gradient != 0.0)
    assert np.all(np.isfinite(step.text_gradient))


BAD: dict[str, tuple[Any, Any, str]] = {
    "negative": (np.full(B, -1.0), ValueError, "anchor_weight must be finite and >= 0, got -1.0 at position 0"),
    "nan in a pair": (
        (np.ones(B), np.full(B, np.nan)),
        ValueError,
        r"anchor_weight\[1\] must be finite and >= 0, got nan at position 0",
    ),
    "too long": (np.ones(B + 1), ValueError, r"anchor_weight must have shape \(batch_size,\) = \(6,\), got \(7,\)"),
    "of three": ((np.ones(B),) * 3, ValueError, "anchor_weight must be an array or a pair of arrays, got 3 entries"),
    "a number": (1.0, TypeError, r"anchor_weight must be an array of shape \(batch_size,\), got 1\.0"),
    "a number in a pair": ((np.ones(B), 1.0), TypeError, r"anchor_weight\[1\] must be an array of shape"),
    "infinite in a pair": ((np.full(B, np.inf), np.ones(B)), ValueError, r"anchor_weight\[0\] must be finite and >= 0"),
    "integers": (np.ones(B, dtype=int), TypeError, "anchor_weight must have a real floating dtype, got int64"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("function", ["contrastive_step", "unimodal_contrastive_step", "info_nce"])
def test_bad_weights_are_refused(function: str, case: str) -> None:
    value, error, message = BAD[case]
    images, texts, *_ = features(16)
    ours = {
        "contrastive_step": contrastive_step,
        "unimodal_contrastive_step": unimodal_contrastive_step,
        "info_nce": info_nce,
    }[function]
    arrays = (images, texts, *(states(17) if function != "info_nce" else ()))
    with pytest.raises(error, match=f"^{message}"):
        ours(*arrays, temperature=0.2, anchor_weight=value)


def test_a_weight_too_large_for_the_features_dtype_is_refused() -> None:
    images, texts, *_ = (x.astype(np.float32) for x in features(20))
    unseen = np.full(B, -np.inf, dtype=np.float32)
    with pytest.raises(ValueError, match=r"^anchor_weight must fit float32, got 1e\+300 at position 0"):
        contrastive_step(images, texts, unseen, unseen, temperature=0.2, anchor_weight=np.full(B, 1e300))


# ---------------------------------------------------------------------------------------------------------------------
# The reference model's choice
# ---------------------------------------------------------------------------------------------------------------------


def test_the_pair_loss_is_the_oracles(space: Any) -> None:
    images, texts, *_ = features(18)
    expected = oracle.pair_loss(space.rounded(images), space.rounded(texts), temperature=0.2)
    actual = space.to_numpy(pair_loss(space.asarray(images), space.asarray(texts), temperature=0.2))
    assert np.allclose(actual, expected, rtol=0.0, atol=10.0 * space.unit)


@pytest.mark.parametrize("tile_size", [1, 4, 7])
def test_the_pair_loss_is_the_same_in_tiles(tile_size: int) -> None:
    images, texts, *_ = features(19, b=11)
    whole = pair_loss(images, texts, temperature=0.05)
    assert np.allclose(pair_loss(images, texts, temperature=0.05, tile_size=tile_size), whole, rtol=1e-13)


@pytest.mark.parametrize("tile_size", [None, 4])
def test_the_pair_loss_leaves_out_what_a_mask_excludes(space: Any, tile_size: int | None) -> None:
    # Image 1 and text 3 have no negatives at all; their halves are 0.
    images, texts, *_ = features(21)
    mask = np.random.default_rng(22).uniform(size=(B, B)) < 0.7
    mask[1, :] = mask[:, 3] = False
    given = (space.asarray(images), space.asarray(texts))
    actual = space.to_numpy(pair_loss(*given, temperature=0.2, pair_mask=space.asarray(mask), tile_size=tile_size))
    rounded = space.rounded(images), space.rounded(texts)
    expected = oracle.pair_loss(*rounded, temperature=0.2, pair_mask=mask)
    assert np.allclose(actual, expected, rtol=0.0, atol=10.0 * space.unit)
    assert not np.allclose(actual, oracle.pair_loss(*rounded, temperature=0.2), atol=0.01)


def test_the_mask_of_a_pair_loss_must_have_one_entry_per_pair() -> None:
    images, texts, *_ = features(23)
    with pytest.raises(ValueError, match=r"^pair_mask must have shape \(batch_size, batch_size\) = \(6, 6\), got"):
        pair_loss(images, texts, temperature=0.2, pair_mask=np.ones((B, B + 1), dtype=bool))


def test_a_wrong_pair_has_a_pair_loss_above_zero() -> None:
    images = np.eye(8)
    texts = np.eye(8)[[1, 0, 2, 3, 4, 5, 6, 7]]
    losses = pair_loss(images, texts, temperature=0.1)
    assert np.all(losses[:2] > 0)
    assert np.all(losses[2:] < 0)


def test_reference_weights_are_the_oracles(space: Any) -> None:
    losses = np.asarray([-6.0, -1.0, 0.0, 4.0, -0.3])
    for options in ({}, {"temperature": 2.0, "threshold": 0.5}):
        expected = oracle.reference_anchor_weight(space.rounded(losses), **options)
        actual = space.to_numpy(reference_anchor_weight(space.asarray(losses), **options))
        assert np.allclose(actual, expected, rtol=10.0 * space.unit)
        assert np.mean(actual) == pytest.approx(1.0, rel=10.0 * space.unit)


def test_reference_weights_are_finite_where_every_pair_is_hopeless() -> None:
    losses = np.asarray([900.0, 901.0], dtype=np.float32)  # both sigmoids underflow; their ratio is exp(-2)
    got = reference_anchor_weight(losses)
    assert got.dtype == np.float32
    assert got[1] / got[0] == pytest.approx(np.exp(-2.0), rel=1e-4)
    assert np.mean(got) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "options"), [([1e30, 2e30], {"temperature": 1e-20}), ([3e38, 2e38], {"threshold": -3e38})]
)
def test_reference_weights_of_extreme_losses_are_finite(losses: list[float], options: dict[str, float]) -> None:
    got = reference_anchor_weight(np.asarray(losses, dtype=np.float32), **options)
    assert np.all(np.isfinite(got))
    assert np.mean(got) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "pair_loss must be an array, got list"),
        (np.ones((2, 2)), {}, ValueError, r"pair_loss must have 1 axes \(batch_size,\), got shape \(2, 2\)"),
        (np.ones(0), {}, ValueError, r"pair_loss must hold at least 1 entry, got shape \(0,\)"),
        (np.asarray([1, 2]), {}, TypeError, "pair_loss must have a real floating dtype, got int64"),
        (np.asarray([np.nan]), {}, ValueError, "pair_loss must be finite, got nan"),
        (np.ones(2), {"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
        (np.ones(2), {"threshold": np.inf}, ValueError, "threshold must be finite, got inf"),
    ],
)
def test_bad_pair_losses_are_refused(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        reference_anchor_weight(arguments, **options)
