"""Facts of the theory that hold for every problem, on every library: those that no other file has as a property."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import drrho_jax  # noqa: F401  (its loop: unrolled steps compile slowly)
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import (
    info_nce,
)
from helpers import problems

SEEDS = st.integers(0, 2**32 - 1)
B = 6


def examples(space: Any) -> int:
    return {"numpy": 30, "torch": 10}.get(space.name, 3)


def skip_eager_jax(space: Any) -> None:
    if space.name == "jax" and space.jit is None:
        pytest.skip("JAX is met jitted")


def test_eps_of_one_negative_is_info_nce(space: Any) -> None:
    skip_eager_jax(space)

    @settings(max_examples=examples(space))
    @given(SEEDS, st.sampled_from([0.01, 0.1, 1.0, 10.0]), st.sampled_from(["random", "aligned", "opposite"]))
    def check(seed: int, temperature: float, features: str) -> None:
        p = problems.draw(seed, b=B, d=3, r=None, eps=1 / (B - 1), features=features)
        p = replace(p, temperature=temperature, gamma=1.0)
        exact, step = p.rounded(space), p.run(space)
        t = exact.temperature
        plain = info_nce(*exact.arrays[:2], temperature=t)
        expected = step._replace(
            loss=t * (plain.loss - np.log(B - 1)),
            image_gradient=t * plain.image_gradient,
            text_gradient=t * plain.text_gradient,
            temperature_gradient=plain.loss - np.log(B - 1) + t * plain.temperature_gradient,
        )
        problems.check_step(step, expected, exact, space.unit, far=True)

    check()


def test_weights_of_an_anchor_sum_to_at_most_one_over_gamma_and_to_one_without_memory(
    space: Any,
) -> None:
    # surrogate - loss is the temperature times the mean over anchors of these sums.
    skip_eager_jax(space)

    @settings(max_examples=examples(space))
    @given(SEEDS, st.sampled_from([1.0, 0.5, 0.1]), st.sampled_from([1.0, 30.0]))
    def check(seed: int, gamma: float, log_inner: float) -> None:
        p = problems.draw(seed, b=B, d=3, r=3, log_inner=log_inner)
        p = replace(p, temperature=1.0, gamma=gamma)
        step = p.run(space)
        sums = float(step.surrogate - step.loss)
        small = 1e2 * space.unit * max(1.0, abs(float(step.loss)))
        assert 0 <= sums <= 1 / gamma + small
        if gamma == 1:
            assert abs(sums - 1) <= small

    check()
