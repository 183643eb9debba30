"""W ranks are one rank: the sharded step against the step of the whole batch, and against the oracle's two phases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drrho_reference.distributed import sharded_contrastive_step as oracle_sharded_step
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import ContrastiveStep, contrastive_step, sharded_contrastive_step
from helpers import problems
from helpers.ranks import joined, on_ranks, shared_sizes
from helpers.spaces import build

FORMS = ("reduce", "ring")


MASKS = st.sampled_from([None, "random", "empty", "none"])


def shared_step(p: problems.Problem, space: Any, num_ranks: int, **static: Any) -> ContrastiveStep:
    """Take the step on ranks; results of all ranks are joined, in float64."""
    arrays, options = p.given(space)
    steps = on_ranks(sharded_contrastive_step, num_ranks, arrays, options, **static)
    return problems.to_numpy(space, joined(steps, space.xp))


@given(
    drawn=shared_sizes(most=4, mask=MASKS),
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(FORMS),
    tile=st.sampled_from([None, 1, 2]),
)
@settings(max_examples=30)
def test_ranks_together_take_the_step_of_the_whole_batch(
    eager_space: Any, drawn: dict[str, Any], seed: int, form: str, tile: int | None
) -> None:
    if eager_space.name == "jax":
        pytest.skip("eager JAX compiles each operation for each shape; see the next test")
    num_ranks = drawn["num_ranks"]
    p = problems.draw(seed, **{name: value for name, value in drawn.items() if name != "num_ranks"})
    got = shared_step(p, eager_space, num_ranks, form=form, tile_size=tile)
    exact = p.rounded(eager_space)
    problems.check_step(got, contrastive_step(*exact.arrays, **exact.options), exact, eager_space.unit)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_of_jax_together_take_the_step_of_the_whole_batch(form: str) -> None:
    space = build("jax", "float64")
    p = problems.draw(7, b=6, gamma="pair", mask="empty", per_anchor_temperature=True, radius=0.7, eps=1e-4)
    problems.check_step(shared_step(p, space, 3, form=form), contrastive_step(*p.arrays, **p.options), p, space.unit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_ranks_give_the_numbers_of_the_oracles_two_phases(num_ranks: int, form: str, weighted: bool) -> None:
    for seed, mask in enumerate([None, "random", "empty"]):
        p = problems.draw(
            100 * num_ranks + seed,
            b=12,
            r=None if seed == 1 else 3,
            per_anchor_temperature=seed > 0,
            gamma="pair",
            mask=mask,
            radius=0.4,
            eps=0.02,
        )
        options = p.options
        if weighted:
            options["anchor_weight"] = tuple(np.random.default_rng(seed).uniform(0.0, 2.0, size=(2, 12)))
        got = joined(on_ranks(sharded_contrastive_step, num_ranks, p.arrays, options, form=form), np)
        expected = joined(oracle_sharded_step(*p.arrays, num_shards=num_ranks, **options), np)
        for name in ContrastiveStep._fields:
            actual, right = getattr(got, name), getattr(expected, name)
            np.testing.assert_allclose(actual, right, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mask", [None, "empty"])
def test_ties_are_shared_equally_at_a_temperature_below_the_rounding_of_similarities(
    mask: str | None, dtype: str, form: str
) -> None:
    # At 1e-10 a weight is a share of the largest similarities. Features of quarters have exact similarities.
    p = problems.draw(40, b=9, r=None, mask=mask, temperature=(1e-10, 1e-10), gamma="one")
    rng = np.random.default_rng(40)
    features = tuple(rng.integers(-2, 3, size=(2, 9, 5)) / 4)
    arrays = tuple(x.astype(dtype) for x in (*features, *p.arrays[2:]))
    whole = contrastive_step(*arrays, **p.options)
    shared = joined(on_ranks(sharded_contrastive_step, 3, arrays, p.options, form=form), np)
    unit = 1e-6 if dtype == "float32" else 1e-14
    for name, mine, right in zip(whole._fields, shared, whole, strict=True):
        np.testing.assert_allclose(mine, right, rtol=unit, atol=unit, err_msg=name)
    assert np.max(np.abs(whole.image_gradient)) > 0.01


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e6, -1e6, 1e150])
def test_huge_losses_of_either_sign_are_those_of_the_whole_batch(size: float, form: str) -> None:
    # With features of size s all excess pair losses have the size s^2 and the sign of s.
    p = problems.draw(41, b=8, features="aligned" if size > 0 else "opposite", gamma="pair", radius=0.5)
    arrays = tuple(x * abs(size) if place < 2 else x for place, x in enumerate(p.arrays))
    whole = contrastive_step(*arrays, **p.options)
    shared = joined(on_ranks(sharded_contrastive_step, 4, arrays, p.options, form=form), np)
    for name, mine, right in zip(whole._fields, shared, whole, strict=True):
        assert np.all(np.isfinite(mine)), name
        scale = np.max(np.abs(right[np.isfinite(right)]) if np.ndim(right) else np.abs(right))
        np.testing.assert_allclose(mine, right, rtol=1e-12, atol=1e-12 * scale, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_many_visits_of_ranks_are_those_of_one_rank(num_ranks: int, form: str) -> None:
    p = problems.draw(42, b=12, mask="empty", gamma="pair", per_anchor_temperature=True, radius=0.4, eps=0.02)
    alone = shared = p.arrays[2:]
    for _ in range(20):
        whole = contrastive_step(*p.arrays[:2], *alone, **p.options)
        arrays = (*p.arrays[:2], *shared)
        step = joined(on_ranks(sharded_contrastive_step, num_ranks, arrays, p.options, form=form), np)
        alone, shared = whole[-2:], step[-2:]
    problems.check_step(step, whole, p, 1e-12)
