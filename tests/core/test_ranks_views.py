"""Two views over ranks: W ranks take the step of one rank, and of the oracle's two phases."""

from __future__ import annotations

import re
from typing import Any

import array_api_compat.torch as torch_namespace
import numpy as np
import pytest
import torch
from drrho_reference.distributed_views import sharded_unimodal_step as oracle_sharded_step
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import UnimodalStep, unimodal_contrastive_step
from helpers import problems
from helpers.ranks import joined, on_ranks, shared_sizes
from helpers.spaces import build
from helpers.unimodal import FULL, check, to_numpy

FORMS = ("reduce", "ring")


@given(
    drawn=shared_sizes(most=3),
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(FORMS),
    tile=st.sampled_from([None, 1, 3]),
)
@settings(max_examples=25)
def test_ranks_together_take_the_step_of_the_whole_batch(
    eager_space: Any, drawn: dict[str, Any], seed: int, form: str, tile: int | None
) -> None:
    if eager_space.name == "jax":
        pytest.skip("eager JAX compiles each operation for each shape; see the next test")
    p = problems.draw(seed, **{name: value for name, value in drawn.items() if name != "num_ranks"})
    arrays, options = p.given(eager_space)
    steps = on_ranks(unimodal_contrastive_step, drawn["num_ranks"], arrays, options, form=form, tile_size=tile)
    got = to_numpy(joined(steps, eager_space.xp), eager_space.to_numpy)
    exact = p.rounded(eager_space)
    expected = to_numpy(unimodal_contrastive_step(*exact.arrays, **exact.options), np.asarray)
    check(got, expected, exact, eager_space.unit)


@pytest.mark.parametrize(("form", "traced"), [("reduce", False), ("ring", True)])
def test_ranks_of_jax_together_take_the_step_of_the_whole_batch(form: str, traced: bool) -> None:
    import jax
    from drrho_jax.ranks import AxisRanks

    space, num_ranks = build("jax", "float64"), 3
    p = problems.draw(7, b=6, **FULL)
    arrays, options = p.given(space)
    if traced:
        # Inside vmap with a named axis the number of the rank is traced, as it is on devices; tiles are loops of JAX.
        def one_rank(arrays: Any, pairs: Any) -> UnimodalStep:
            chosen = options | pairs
            return unimodal_contrastive_step(*arrays, **chosen, ranks=AxisRanks("pairs"), form=form, tile_size=1)

        pairs = {name: value for name, value in options.items() if isinstance(value, tuple)}
        by_rank = jax.tree.map(lambda x: x.reshape(num_ranks, -1, *x.shape[1:]), (arrays, pairs))
        stacked = jax.jit(jax.vmap(one_rank, axis_name="pairs"))(*by_rank)
        steps = [jax.tree.map(lambda x, rank=rank: x[rank], stacked) for rank in range(num_ranks)]
    else:
        steps = on_ranks(unimodal_contrastive_step, num_ranks, arrays, options, form=form)
    got = to_numpy(joined(steps, space.xp), np.asarray)
    check(got, to_numpy(unimodal_contrastive_step(*p.arrays, **p.options), np.asarray), p, space.unit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ranks_give_the_numbers_of_the_oracles_two_phases(num_ranks: int, form: str) -> None:
    for seed in range(3):
        p = problems.draw(
            100 * num_ranks + seed,
            b=12,
            r=None if seed == 1 else 3,
            per_anchor_temperature=seed > 0,
            gamma="pair",
            radius=0.4,
            eps=0.02,
        )
        options = p.options
        if seed:
            options["anchor_weight"] = tuple(np.random.default_rng(seed).uniform(0.0, 2.0, size=(2, 12)))
        got = joined(on_ranks(unimodal_contrastive_step, num_ranks, p.arrays, options, form=form), np)
        expected = joined(oracle_sharded_step(*p.arrays, num_shards=num_ranks, **options), np)
        for name in UnimodalStep._fields:
            actual, right = getattr(got, name), getattr(expected, name)
            np.testing.assert_allclose(actual, right, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_many_visits_of_ranks_are_those_of_one_rank(num_ranks: int, form: str) -> None:
    p = problems.draw(31, b=8, **FULL)
    alone = shared = p.arrays[2:]
    for _ in range(20):
        whole = unimodal_contrastive_step(*p.arrays[:2], *alone, **p.options)
        step = joined(
            on_ranks(unimodal_contrastive_step, num_ranks, (*p.arrays[:2], *shared), p.options, form=form), np
        )
        alone, shared = whole[-2:], step[-2:]
    check(step, whole, p, 1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_half_types_are_no_farther_from_float64_than_on_one_rank(dtype: str, form: str) -> None:
    kind = getattr(torch, dtype)
    p = problems.draw(5, b=12, d=8, gamma="pair")
    references = tuple(torch.from_numpy(x).to(kind) for x in p.reference_features or ())
    features = tuple(torch.from_numpy(x).to(kind) for x in p.arrays[:2])
    states = tuple(torch.from_numpy(x).float() for x in p.arrays[2:])
    options = {"temperature": p.temperature, "reference_features": references}
    exact = unimodal_contrastive_step(
        *(x.double() for x in (*features, *states)),
        temperature=p.temperature,
        reference_features=tuple(x.double() for x in references),
    )

    def errors(step: Any) -> list[float]:
        return [float((x.double() - y).abs().max()) for x, y in zip(step[:4], exact[:4], strict=True)]

    whole = unimodal_contrastive_step(*features, *states, **options)
    shared = joined(on_ranks(unimodal_contrastive_step, 3, (*features, *states), options, form=form), torch_namespace)
    for name, mine, alone in zip(whole._fields, errors(shared), errors(whole), strict=False):
        assert mine <= 1.01 * alone + 2.0**-20, (name, mine, alone)
    assert shared.view1_gradient.dtype == kind


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ties_are_shared_equally_at_a_temperature_below_the_rounding_of_similarities(form: str, dtype: str) -> None:
    # At 1e-10 a weight is a share of the largest similarities. Features of quarters have exact similarities.
    rng = np.random.default_rng(33)
    features = tuple(rng.integers(-2, 3, size=(2, 8, 5)) / 4)
    arrays = tuple(x.astype(dtype) for x in (*features, *np.full((2, 8), -np.inf)))
    whole = unimodal_contrastive_step(*arrays, temperature=1e-10)
    shared = joined(on_ranks(unimodal_contrastive_step, 4, arrays, {"temperature": 1e-10}, form=form), np)
    unit = 1e-6 if dtype == "float32" else 1e-14
    for name, mine, right in zip(whole._fields, shared, whole, strict=True):
        np.testing.assert_allclose(mine, right, rtol=unit, atol=unit, err_msg=name)
    assert np.max(np.abs(whole.view1_gradient)) > 0.01


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("sizes", [(1e22, 1e3), (1e-3, 1e22), (1e22, 1e22)])
def test_a_view_of_huge_features_is_scaled_like_the_other_view(sizes: tuple[float, float], form: str | None) -> None:
    p = problems.draw(34, b=6, r=None)
    arrays = tuple((x * size).astype("float32") for x, size in zip(p.arrays[:2], sizes, strict=True))
    states = tuple(x.astype("float32") for x in p.arrays[2:])
    options = {"temperature": 1e37}
    if form is None:
        got = unimodal_contrastive_step(*arrays, *states, **options)
    else:
        got = joined(on_ranks(unimodal_contrastive_step, 3, (*arrays, *states), options, form=form), np)
    exact = unimodal_contrastive_step(*(x.astype("float64") for x in (*arrays, *states)), **options)
    for name in ("view1_gradient", "view2_gradient"):
        mine, right = getattr(got, name), getattr(exact, name)
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-6 * np.max(np.abs(right)), err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a temperature": (
        {"temperature": 0.25},
        r"temperature must be the same on all ranks, got 0\.5 on rank 0 and 0\.25",
    ),
    "a gamma": ({"gamma": 1.5}, r"rank 1 refuses its arguments: gamma must be in \(0, 1\], got 1\.5"),
    "a form": ({"form": "ring"}, r"form must be the same on all ranks, got 'reduce' on rank 0 and 'ring' on rank 1"),
    "an id of another rank": (
        {"sample_index": np.asarray([2, 1])},
        r"sample_index must not repeat an index within a batch, got 1 on rank 0 and on rank 1",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_all_ranks_raise_the_same_error(kind: str) -> None:
    changes, message = BAD[kind]
    p = problems.draw(35, b=4, r=None)

    def step(*arrays: Any, ranks: Any) -> str:
        options: dict[str, Any] = {"temperature": 0.5, "form": "reduce", "sample_index": np.arange(2) + 2 * ranks.rank}
        with pytest.raises(ValueError) as caught:
            unimodal_contrastive_step(*arrays, ranks=ranks, **(options | (changes if ranks.rank else {})))
        return str(caught.value)

    every = on_ranks(step, 2, p.arrays, {})
    assert len(set(every)) == 1
    assert re.search(message, every[0]), every[0]
