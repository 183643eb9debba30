"""W ranks = 1 rank on the concatenated batch, and what a rank may know."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
from drrho_reference import (
    ContrastiveStep,
    contrastive_step,
    sharded_contrastive_step,
    sharded_unimodal_step,
    unimodal_contrastive_step,
)

NEVER = -math.inf


def problem(seed: int, n: int, d: int = 4, r: int = 3) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch without symmetry: states, some never visited, temperatures and gammas per anchor, a reference model."""
    rng = np.random.default_rng(seed)
    features = [rng.normal(size=(n, width)) for width in (d, d, r, r)]
    features = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in features]
    log_inner = rng.normal(size=(2, n))
    log_inner[0, 1] = log_inner[1, n - 1] = NEVER
    options = {
        "temperature": (rng.uniform(0.2, 0.9, size=n), rng.uniform(0.2, 0.9, size=n)),
        "gamma": (rng.uniform(0.1, 0.9, size=n), rng.uniform(0.1, 0.9, size=n)),
        "reference_features": (features[2], features[3]),
        "reference_weight": 1.5,
        "radius": 0.4,
        "eps": 0.02,
    }
    return (features[0], features[1], *log_inner), options


def concatenated(ranks: list[ContrastiveStep]) -> ContrastiveStep:
    """Put the ranks' rows together; what is summed over ranks must be equal on all of them."""
    for field in ("loss", "surrogate"):
        assert len({getattr(rank, field) for rank in ranks}) == 1
    gradients = [rank.temperature_gradient for rank in ranks]
    temperature_gradient: Any = gradients[0]
    if isinstance(temperature_gradient, tuple):
        temperature_gradient = tuple(np.concatenate(side) for side in zip(*gradients, strict=True))  # type: ignore[arg-type]
    else:
        assert len(set(gradients)) == 1
    rows = [
        np.concatenate([getattr(rank, field) for rank in ranks])
        for field in ("image_gradient", "text_gradient", "log_inner_image", "log_inner_text")
    ]
    return ContrastiveStep(ranks[0].loss, ranks[0].surrogate, rows[0], rows[1], temperature_gradient, rows[2], rows[3])


def assert_equal_steps(one: ContrastiveStep, other: ContrastiveStep) -> None:
    for field, left, right in zip(ContrastiveStep._fields, one, other, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-13, atol=1e-14, err_msg=field)


@pytest.mark.parametrize(("num_shards", "n"), [(1, 3), (2, 2), (2, 6), (3, 6), (4, 8)])
def test_ranks_together_are_one_rank(num_shards: int, n: int) -> None:
    batch, options = problem(n, n)
    ranks = sharded_contrastive_step(*batch, num_shards=num_shards, **options)
    assert [rank.image_gradient.shape for rank in ranks] == [(n // num_shards, 4)] * num_shards
    assert_equal_steps(concatenated(ranks), contrastive_step(*batch, **options))


@pytest.mark.parametrize("num_shards", [2, 4])
def test_ranks_together_are_one_rank_with_a_mask_and_one_temperature(num_shards: int) -> None:
    batch, options = problem(20, 8)
    mask = np.random.default_rng(21).uniform(size=(8, 8)) < 0.6
    mask[1, :] = mask[:, 6] = False  # image 1 and text 6 have no negatives, each on another rank than some of the rest
    batch[2][1] = 1e4  # so its state is not even looked at
    options |= {"pair_mask": mask, "temperature": 0.3}
    ranks = sharded_contrastive_step(*batch, num_shards=num_shards, **options)
    assert isinstance(ranks[0].temperature_gradient, float)
    assert_equal_steps(concatenated(ranks), contrastive_step(*batch, **options))
    assert ranks[0].log_inner_image[1] == 1e4


def test_ranks_together_are_one_rank_without_reference_or_memory() -> None:
    batch, _ = problem(30, 6)
    for num_shards in (2, 3):
        ranks = sharded_contrastive_step(*batch, num_shards=num_shards, temperature=0.1)
        assert_equal_steps(concatenated(ranks), contrastive_step(*batch, temperature=0.1))


def test_phase_2_uses_the_updated_estimates_of_other_ranks() -> None:
    # The state of an anchor on rank 1 changes the gradients of rows on rank 0.
    batch, options = problem(40, 4)
    before = sharded_contrastive_step(*batch, num_shards=2, **options)[0]
    batch[2][3] = batch[2][3] + 2.0
    after = sharded_contrastive_step(*batch, num_shards=2, **options)[0]
    np.testing.assert_array_equal(after.log_inner_image, before.log_inner_image)
    assert np.all(np.abs(after.text_gradient - before.text_gradient).max(axis=1) > 1e-4)
    np.testing.assert_array_equal(after.image_gradient, before.image_gradient)  # an image anchor moves texts and itself


# The steps of one rank, each with the step of many ranks and the name of the first argument.
STEPS: dict[str, tuple[Any, Any, str]] = {
    "image and text": (contrastive_step, sharded_contrastive_step, "image_features"),
    "two views": (unimodal_contrastive_step, sharded_unimodal_step, "view1_features"),
}


@pytest.mark.parametrize("kind", STEPS)
def test_many_ranks_take_the_arguments_of_one_rank(kind: str) -> None:
    one, many = (inspect.signature(function).parameters for function in STEPS[kind][:2])
    assert {name: (p.kind, p.default) for name, p in many.items() if name != "num_shards"} == {
        name: (p.kind, p.default) for name, p in one.items()
    }


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_shards": 4}, ValueError, "num_shards must divide the 6 rows, got 4"),
        ({"num_shards": 0}, ValueError, r"num_shards must lie in \[1, 6\], got 0"),
        ({"num_shards": 2.0}, TypeError, "num_shards must be an integer, got 2.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive, got -1.0"),
        ({"reference_weight": -1.0}, ValueError, "reference_weight must be at least 0, got -1.0"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    ],
)
def test_bad_input_is_refused(kind: str, changes: dict[str, Any], error: Any, message: str) -> None:
    batch, options = problem(50, 6)
    with pytest.raises(error, match=message):
        STEPS[kind][1](*batch, **{"num_shards": 2, **options, **changes})


def test_a_mask_of_another_shape_is_refused() -> None:
    batch, options = problem(50, 6)
    with pytest.raises(ValueError, match=r"pair_mask must have the shape \(6, 6\)"):
        sharded_contrastive_step(*batch, num_shards=2, pair_mask=np.ones((3, 6), dtype=bool), **options)


@pytest.mark.parametrize("kind", STEPS)
def test_one_row_has_no_negatives(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{STEPS[kind][2]} must have at least 2 rows, got 1"):
        STEPS[kind][1]([[1.0]], [[1.0]], [0.0], [0.0], num_shards=1, temperature=0.5)
