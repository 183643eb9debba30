"""Losses without state over ranks: W ranks that share a batch get the numbers of one rank with the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import contrastive_step, info_nce, sharded_contrastive_step, sigmoid_loss
from helpers import problems
from helpers.ranks import joined, on_ranks

FORMS = ("reduce", "ring")


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
@pytest.mark.parametrize("loss", ["step", "info_nce", "sigmoid_loss"])
def test_features_that_are_huge_on_one_rank_are_scaled_alike_on_all_ranks(loss: str, form: str) -> None:
    p = problems.draw(4, b=6, r=None)
    # The logarithms of InfoNCE are limited, but the derivative with respect to the scale is not.
    largest = 5e18 if loss == "sigmoid_loss" else 1e22
    size = np.asarray([1.0, 1.0, 1.0, 1.0, largest, largest / 10])[:, None]
    arrays = tuple((x * size if place < 2 else x).astype("float32") for place, x in enumerate(p.arrays))
    options = {"step": {"temperature": 1e3}, "info_nce": {"temperature": 1e3}, "sigmoid_loss": {"scale": 1e-3}}[loss]
    function: Any = {"step": contrastive_step, "info_nce": info_nce, "sigmoid_loss": sigmoid_loss}[loss]
    shared_function = sharded_contrastive_step if loss == "step" else function
    if loss == "sigmoid_loss":
        options["bias"] = -1.0
    arrays = arrays if loss == "step" else arrays[:2]
    whole = function(*arrays, **options)
    shared = joined(on_ranks(shared_function, 3, arrays, options, form=form), np)
    for name, mine, right in zip(whole._fields, shared, whole, strict=True):
        assert np.all(np.isfinite(mine) == np.isfinite(right)), name
        np.testing.assert_allclose(mine, right, rtol=2e-5, atol=1e-6 * np.max(np.abs(right)), err_msg=name)


@pytest.mark.parametrize("function", [info_nce, sigmoid_loss])
def test_all_ranks_of_a_loss_refuse_the_arguments_of_one_rank(function: Any) -> None:
    p = problems.draw(1, b=4)
    scale = "temperature" if function is info_nce else "scale"

    def step(*arrays: Any, ranks: Any, **options: Any) -> str:
        options[scale] = -1.0 if ranks.rank else 1.0
        try:
            function(*arrays, ranks=ranks, **options)
        except ValueError as error:
            return str(error)
        return "no error"

    options = {} if function is info_nce else {"bias": 0.0}
    message = f"rank 1 refuses its arguments: {scale} must be > 0, got -1.0"
    assert on_ranks(step, 2, p.arrays[:2], options) == [message] * 2
