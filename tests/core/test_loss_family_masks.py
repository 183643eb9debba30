"""Masked losses of SigLIP and hinge against loops in long numbers, the oracle, and their own tiles."""

from __future__ import annotations

from typing import Any

import drrho_reference
import numpy as np
import pytest

import drrho_core as dc
from helpers.loss_family import CASES, MASK, B, check, draw, exact, given, thin

MASKED = ("sigmoid", "sigmoid, steep", "hinge", "hinge, wide")


@pytest.mark.parametrize("name", MASKED)
def test_masked_losses_are_the_loops(space: Any, name: str) -> None:
    # The gradients are differences of the loops, in 60 digits.
    thin(space)
    case = CASES[name]
    arrays, scalars = given(space, case, as_arrays=False)
    result = space.run(
        lambda e1, e2, mask: case.function(e1, e2, pair_mask=mask, **scalars),
        *arrays,
        space.asarray(MASK),
    )
    wanted = exact(name, space.dtype_name, masked=True)
    assert wanted["loss"] != exact(name, space.dtype_name)["loss"]
    check(result, wanted, case.steepness * space.unit, space.to_numpy)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("seed", range(3))
def test_masked_losses_are_the_oracles(name: str, seed: int) -> None:
    case, b = CASES[name], 7
    arrays = draw(seed, b=b)[:2]
    mask = np.random.default_rng(seed).uniform(size=(b, b)) < 0.5
    oracle = getattr(drrho_reference, case.function.__name__)
    wanted = oracle(*arrays, pair_mask=mask, **case.scalars)
    got = case.function(*arrays, pair_mask=mask, **case.scalars)
    check(got, {field: getattr(wanted, field) for field in got._fields}, case.steepness * 1e-13)


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_a_mask_in_tiles(name: str) -> None:
    case, b = CASES[name], 7
    arrays = draw(b=b)[:2]
    mask = np.random.default_rng(4).uniform(size=(b, b)) < 0.5
    dense = case.function(*arrays, pair_mask=mask, **case.scalars)
    for options in ({"tile_size": 1}, {"tile_size": 3}, {"memory_budget": 0}):
        check(case.function(*arrays, pair_mask=mask, **case.scalars, **options), dense._asdict(), 1e-14)
    whole, none = np.ones((b, b), dtype=bool), case.function(*arrays, **case.scalars)
    for full in (whole, whole & ~np.eye(b, dtype=bool)):  # whatever it says of the diagonal
        for options in ({}, {"tile_size": 3}):
            check(case.function(*arrays, pair_mask=full, **case.scalars, **options), none._asdict(), 1e-15)


def test_no_negatives_at_all() -> None:
    images, texts = draw()[:2]
    nothing = np.zeros((B, B), dtype=bool)
    hinge = dc.hinge_margin_loss(images, texts, margin=4.0, pair_mask=nothing)
    assert hinge.loss == 0
    assert not np.any(hinge.image_gradient)
    assert not np.any(hinge.text_gradient)
    positives = dc.sigmoid_loss(images, texts, scale=3.0, bias=-1.0, pair_mask=nothing)
    logits = 3.0 * np.sum(images * texts, axis=1) - 1.0
    assert positives.loss == pytest.approx(np.mean(np.log1p(np.exp(-logits))), rel=1e-14)
    slopes = -1 / (1 + np.exp(logits)) / B
    np.testing.assert_allclose(positives.image_gradient, 3.0 * slopes[:, None] * texts, rtol=1e-13)
    assert positives.bias_gradient == pytest.approx(np.sum(slopes), rel=1e-13)


def test_twins_that_are_masked_are_as_good_as_apart() -> None:
    # Every pair is met as if one of the two had been left out; those of the others are then met twice.
    images, texts = draw()[:2]
    mask = np.ones((B, B), dtype=bool)
    mask[0, 1] = mask[1, 0] = False
    texts[1] = texts[0]
    whole, first, second, rest = (
        len(rows) * dc.sigmoid_loss(images[rows], texts[rows], scale=5.0, bias=0.0, pair_mask=mask[rows][:, rows]).loss
        for rows in ([0, 1, 2, 3], [0, 2, 3], [1, 2, 3], [2, 3])
    )
    assert whole == pytest.approx(first + second - rest, rel=1e-14)


BADLY_MASKED: dict[Any, dict[str, Any]] = {
    dc.sigmoid_loss: {"scale": 1.0, "bias": 0.0},
    dc.hinge_margin_loss: {"margin": 1.0},
    dc.info_nce: {"temperature": 1.0},
}


@pytest.mark.parametrize("function", BADLY_MASKED)
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (MASK[:3], ValueError, r"pair_mask must have shape \(batch_size, batch_size\) = \(4, 4\), got \(3, 4\)"),
        (MASK[0], ValueError, r"pair_mask must have shape .* got \(4,\)"),
        (MASK.astype(float), TypeError, "pair_mask must have dtype bool, got float64"),
        (MASK.tolist(), TypeError, "pair_mask must be an array, got list"),
    ],
)
def test_a_bad_mask_is_refused(function: Any, mask: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        function(*draw()[:2], pair_mask=mask, **BADLY_MASKED[function])
