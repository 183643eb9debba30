"""Losses without state over ranks: W ranks that share a batch get the numbers of one rank with the whole batch."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as torch_namespace
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import (
    contrastive_step,
    distillation_loss,
    info_nce,
    pair_loss,
    select_top_excess,
    sharded_contrastive_step,
    sigmoid_loss,
    weighted_sum,
)
from helpers import problems
from helpers.ranks import joined, on_ranks

FORMS = ("reduce", "ring")
LOSSES: dict[str, Any] = {"info_nce": info_nce, "sigmoid_loss": sigmoid_loss, "distillation_loss": distillation_loss}


@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 4), local=st.integers(1, 4))
@settings(max_examples=10)
@pytest.mark.parametrize("mask", [None, "empty"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid_loss"])
def test_losses_over_ranks_are_those_of_the_whole_batch(
    loss: str, form: str, mask: str | None, seed: int, num_ranks: int, local: int
) -> None:
    b = max(num_ranks * local, 2) if num_ranks > 1 else local + 1
    p = problems.draw(seed, b=b, r=None, mask=mask)
    function: Any = info_nce if loss == "info_nce" else sigmoid_loss
    options: dict[str, Any] = {} if mask is None else {"pair_mask": p.pair_mask}
    if loss == "info_nce":
        weights = np.random.default_rng(seed).uniform(0.0, 2.0, size=(2, b))
        options |= {"temperature": p.temperature, "anchor_weight": tuple(weights)}
    else:
        options |= {"scale": 1 / p.temperature, "bias": -2.0}
    whole = function(*p.arrays[:2], **options)
    shared = joined(on_ranks(function, num_ranks, p.arrays[:2], options, form=form, tile_size=2), np)
    for name, mine, right in zip(whole._fields, shared, whole, strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["step", *LOSSES])
def test_features_that_are_huge_on_one_rank_are_scaled_alike_on_all_ranks(loss: str, form: str) -> None:
    p = problems.draw(4, b=6, r=None)
    # The logarithms of InfoNCE are limited, but the derivative with respect to the scale is not.
    largest = 5e18 if loss == "sigmoid_loss" else 1e22
    size = np.asarray([1.0, 1.0, 1.0, 1.0, largest, largest / 10])[:, None]
    arrays = tuple((x * size if place < 2 else x).astype("float32") for place, x in enumerate(p.arrays))
    options = {"scale": 1e-3} if loss == "sigmoid_loss" else {"temperature": 1e3}
    function: Any = contrastive_step if loss == "step" else LOSSES[loss]
    shared_function = sharded_contrastive_step if loss == "step" else function
    if loss == "sigmoid_loss":
        options["bias"] = -1.0
    arrays = arrays if loss == "step" else arrays[:2]
    if loss == "distillation_loss":
        # The reference model's features are huge on another rank.
        options["reference_temperature"] = 1e3
        arrays += tuple(np.roll(x, 2, axis=0) for x in arrays)
    whole = function(*arrays, **options)
    shared = joined(on_ranks(shared_function, 3, arrays, options, form=form), np)
    for name, mine, right in zip(whole._fields, shared, whole, strict=True):
        assert np.all(np.isfinite(mine) == np.isfinite(right)), name
        np.testing.assert_allclose(mine, right, rtol=2e-5, atol=1e-6 * np.max(np.abs(right)), err_msg=name)


@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 4), local=st.integers(1, 4))
@settings(max_examples=10)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("features", ["random", "ties"])
def test_distillation_over_ranks_is_that_of_the_whole_batch(
    features: str, form: str, seed: int, num_ranks: int, local: int
) -> None:
    p = problems.draw(seed, b=num_ranks * local if num_ranks > 1 else local + 1, features=features)
    assert p.reference_features is not None
    arrays = (*p.arrays[:2], *p.reference_features)
    options = {"temperature": p.temperature, "reference_temperature": 0.3}
    whole = distillation_loss(*arrays, **options)
    shared = joined(on_ranks(distillation_loss, num_ranks, arrays, options, form=form, tile_size=2), np)
    for name, mine, right in zip(whole._fields, shared, whole, strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_a_weighted_sum_over_ranks_is_that_of_the_whole_batch(form: str) -> None:
    p = problems.draw(11, b=6)
    assert p.reference_features is not None
    arrays = (*p.arrays, *p.reference_features)

    def total(*arrays: Any, **how: Any) -> Any:
        step = (sharded_contrastive_step if how else contrastive_step)(*arrays[:4], temperature=0.3, **how)
        other = distillation_loss(*arrays[:2], *arrays[4:], temperature=0.3, reference_temperature=0.1, **how)
        return weighted_sum((0.7, step), (2.0, other))

    whole, ranks = total(*arrays), on_ranks(total, 3, arrays, {}, form=form)
    for name in ("loss", "image_gradient", "text_gradient"):
        parts = [np.atleast_1d(getattr(rank, name)) for rank in ranks]
        mine = np.concatenate(parts if name != "loss" else parts[:1])
        np.testing.assert_allclose(mine, np.atleast_1d(getattr(whole, name)), rtol=1e-12, atol=1e-12, err_msg=name)
    for rank in ranks:
        assert rank.loss == ranks[0].loss
        for mine, right in zip(rank.parameter_gradients, whole.parameter_gradients, strict=True):
            np.testing.assert_allclose(mine["temperature_gradient"], right["temperature_gradient"], rtol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [None, "empty"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_pair_losses_over_ranks_are_those_of_the_whole_batch(num_ranks: int, mask: str | None, form: str) -> None:
    p = problems.draw(num_ranks, b=12, mask=mask)
    options = {"temperature": 0.3} | ({} if mask is None else {"pair_mask": p.pair_mask})
    whole = pair_loss(*p.arrays[:2], **options)
    shared = np.concatenate(on_ranks(pair_loss, num_ranks, p.arrays[:2], options, form=form))
    np.testing.assert_allclose(shared, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_all_ranks_select_the_samples_of_the_whole_super_batch(num_ranks: int) -> None:
    rng = np.random.default_rng(num_ranks)
    losses = tuple(rng.integers(0, 4, size=(2, 12)).astype("float64"))  # many ties
    whole = select_top_excess(*losses, k=7, reference_weight=0.5)
    for mine in on_ranks(select_top_excess, num_ranks, losses, {}, k=7, reference_weight=0.5):
        np.testing.assert_array_equal(mine, whole)

    def wrong(*losses: Any, ranks: Any) -> str:
        with pytest.raises(ValueError) as caught:
            select_top_excess(*losses, k=3 + ranks.rank, ranks=ranks)
        return str(caught.value)

    if num_ranks == 2:
        message = "k must be the same on all ranks, got 3 on rank 0 and 4 on rank 1"
        assert on_ranks(wrong, num_ranks, losses, {}) == [message] * 2


@pytest.mark.parametrize("loss", LOSSES)
def test_every_array_library_shares_a_loss_among_ranks(eager_space: Any, loss: str) -> None:
    p = problems.draw(3, b=6)
    assert p.reference_features is not None
    options: dict[str, Any] = {"temperature": 0.3}
    if loss == "sigmoid_loss":
        options = {"scale": 3.0, "bias": -2.0}
    elif loss == "distillation_loss":
        options["reference_temperature"] = 0.2
    arrays = p.arrays[:2] if loss != "distillation_loss" else (*p.arrays[:2], *p.reference_features)
    given_arrays = tuple(map(eager_space.asarray, arrays))
    whole = LOSSES[loss](*map(eager_space.rounded, arrays), **options)
    # Eager JAX compiles each operation for each shape, so it takes one form only.
    for form in FORMS[: 1 if eager_space.name == "jax" else 2]:
        shared = joined(on_ranks(LOSSES[loss], 3, given_arrays, options, form=form), eager_space.xp)
        for name, mine, right in zip(whole._fields, shared, whole, strict=True):
            size = 10 * eager_space.unit
            np.testing.assert_allclose(eager_space.to_numpy(mine), right, rtol=size, atol=size, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_half_types_of_a_loss_are_no_farther_from_float64_than_on_one_rank(loss: str, form: str, dtype: str) -> None:
    p = problems.draw(5, b=12, d=8)
    assert p.reference_features is not None
    options: dict[str, Any] = {"temperature": 0.2}
    if loss == "sigmoid_loss":
        options = {"scale": 3.0, "bias": -2.0}
    elif loss == "distillation_loss":
        options["reference_temperature"] = 0.2
    drawn = p.arrays[:2] if loss != "distillation_loss" else (*p.arrays[:2], *p.reference_features)
    arrays = tuple(torch.from_numpy(x).to(getattr(torch, dtype)) for x in drawn)
    exact = LOSSES[loss](*(x.double() for x in arrays), **options)

    def errors(result: Any) -> list[float]:
        return [float((x.double() - y).abs().max()) for x, y in zip(result, exact, strict=True)]

    alone = errors(LOSSES[loss](*arrays, **options))
    shared = joined(on_ranks(LOSSES[loss], 3, arrays, options, form=form), torch_namespace)
    assert shared.image_gradient.dtype == arrays[0].dtype
    for name, mine, right in zip(exact._fields, errors(shared), alone, strict=True):
        assert mine <= 1.01 * right + 2.0**-20, (name, mine, right)


@pytest.mark.parametrize("function", LOSSES.values(), ids=LOSSES)
def test_all_ranks_of_a_loss_refuse_the_arguments_of_one_rank(function: Any) -> None:
    p = problems.draw(1, b=4)
    scale = "scale" if function is sigmoid_loss else "temperature"

    def step(*arrays: Any, ranks: Any, **options: Any) -> str:
        options[scale] = -1.0 if ranks.rank else 1.0
        try:
            function(*arrays, ranks=ranks, **options)
        except ValueError as error:
            return str(error)
        return "no error"

    options: dict[str, Any] = {"bias": 0.0} if function is sigmoid_loss else {}
    arrays = p.arrays[:2]
    if function is distillation_loss:
        options["reference_temperature"] = 1.0
        arrays += p.reference_features or ()
    message = f"rank 1 refuses its arguments: {scale} must be > 0, got -1.0"
    assert on_ranks(step, 2, arrays, options) == [message] * 2
