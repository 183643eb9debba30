"""The state of drrho_jax.contrastive_loss: donation, two steps, dtypes, and half types."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from drrho_jax import ContrastiveState, contrastive_loss, init_state  # noqa: E402

from helpers.jax_losses import (  # noqa: E402
    N,
    arguments_of,
    draw,
    step_of,
)

pytestmark = pytest.mark.usefixtures("wide_types")


def test_a_new_state_was_never_visited() -> None:
    state = init_state(3)
    assert [side.dtype for side in state] == ["float32", "float32"]
    assert [side.tolist() for side in state] == [[-math.inf] * 3] * 2
    assert init_state(3, dtype=jnp.float64).log_inner_text.dtype == "float64"


def test_the_state_can_be_donated() -> None:
    state = init_state(N)
    assert state.log_inner_image.unsafe_buffer_pointer() != state.log_inner_text.unsafe_buffer_pointer()
    problem = draw("float32")
    step = jax.jit(step_of(problem), donate_argnums=3)
    arguments = (problem.images, problem.texts, jnp.asarray(0.3, dtype="float32"))
    expected = init_state(N)
    for _ in range(2):  # the returned state, too
        (loss, state), _ = step(*arguments, state, problem.index, problem.references)
        (expected_loss, expected), _ = step_of(problem)(*arguments, expected, problem.index, problem.references)
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    np.testing.assert_allclose(state.log_inner_image, expected.log_inner_image, rtol=1e-5)


def test_two_steps_remember() -> None:
    # u = 0.7 g + 0.3 g' after g' on the first visit
    problem, other = draw(), draw(seed=1)
    empty = init_state(N, dtype=jnp.float64)
    run = lambda p, state, gamma: contrastive_loss(  # noqa: E731
        state, p.images, p.texts, p.index, temperature=0.3, gamma=gamma
    )[1]
    first = run(other, empty, 0.7)
    second = run(problem, first, 0.7)
    fresh = run(problem, empty, 1.0)
    expected = 0.3 * np.exp(first.log_inner_image) + 0.7 * np.exp(fresh.log_inner_image)
    np.testing.assert_allclose(np.exp(second.log_inner_image), expected, rtol=1e-13)
    assert np.all(np.asarray(second.log_inner_text)[[1, 3, 5, 6, 8, 9]] == -np.inf)
    assert np.all(np.asarray(empty.log_inner_text) == -np.inf)  # the old state is still the old state


def test_a_float32_state_serves_float64_features() -> None:
    problem = draw()
    state = init_state(N)
    loss, new = contrastive_loss(state, problem.images, problem.texts, problem.index, temperature=0.3)
    assert loss.dtype == "float64"
    assert new.log_inner_image.dtype == "float32"


def test_without_wide_types() -> None:
    with jax.enable_x64(False):
        problem = draw("float32")
        assert problem.index.dtype == "int32"
        (loss, state), gradients = jax.jit(step_of(problem))(*arguments_of(problem))
        assert {x.dtype.name for x in jax.tree.leaves((loss, state, gradients))} == {"float32"}
        with pytest.raises(TypeError, match=r"^dtype must be float32, or float64 if jax_enable_x64 is on, got "):
            init_state(3, dtype=jnp.float64)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int64"])
def test_every_integer_type_is_an_index(dtype: str) -> None:
    problem = draw()
    large = ContrastiveState(*(jnp.concatenate([side, jnp.full(300, -jnp.inf)]) for side in problem.state))
    results = [
        contrastive_loss(large, problem.images, problem.texts, index, temperature=0.3, gamma=0.5)
        for index in (problem.index, problem.index.astype(dtype))
    ]
    assert float(results[0][0]) == float(results[1][0])
    assert np.array_equal(results[0][1].log_inner_image, results[1][1].log_inner_image)


# ---------------------------------------------------------------------------------------------------------- half types


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_features(dtype: str) -> None:
    problem = draw("float32")
    half = problem._replace(
        images=problem.images.astype(dtype),
        texts=problem.texts.astype(dtype),
        references=tuple(x.astype(dtype) for x in problem.references),
    )
    wide = half._replace(
        images=half.images.astype("float32"),
        texts=half.texts.astype("float32"),
        references=tuple(x.astype("float32") for x in half.references),
    )
    (loss, state), gradients = step_of(half)(*arguments_of(half))
    (expected_loss, expected_state), expected = step_of(wide)(*arguments_of(wide))
    assert loss.dtype == state.log_inner_image.dtype == "float32"
    assert float(loss) == float(expected_loss)
    assert np.array_equal(state.log_inner_text, expected_state.log_inner_text)
    for gradient, theirs in zip(gradients[:2], expected[:2], strict=True):
        assert gradient.dtype == dtype
        assert np.array_equal(gradient, theirs.astype(dtype))


def test_the_loss_scale_comes_before_rounding() -> None:
    # Well separated pairs: gradients of 1e-9 vanish in half, 65536 times as large they do not.
    def gradient(dtype: str) -> Any:
        def function(images: Any) -> Any:
            texts, index = jnp.eye(4, dtype=dtype), jnp.arange(4)
            return 2.0**16 * contrastive_loss(init_state(4), images, texts, index, temperature=0.1, eps=1e4)[0]

        return jax.jit(jax.grad(function))(jnp.eye(4, dtype=dtype))

    half, wide = gradient("float16"), gradient("float32")
    assert 0 < float(jnp.max(jnp.abs(wide))) / 2.0**16 < 2.0**-25  # half's smallest number, halved
    assert np.array_equal(half, wide.astype("float16"))
    assert np.any(half)
