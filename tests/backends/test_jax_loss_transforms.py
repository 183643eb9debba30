"""drrho_jax.contrastive_loss under jit, scan, vmap, checkpointing, forward mode and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from drrho_jax import contrastive_loss, drrho_risk, init_state  # noqa: E402

from drrho_core import (  # noqa: E402
    CVaR,
)
from helpers.jax_losses import (  # noqa: E402
    INDEX,
    N,
    arguments_of,
    draw,
    step_of,
)

pytestmark = pytest.mark.usefixtures("wide_types")


def test_jit_is_eager() -> None:
    problem = draw()
    eager = jax.tree.leaves(step_of(problem)(*arguments_of(problem)))
    jitted = jax.tree.leaves(jax.jit(step_of(problem))(*arguments_of(problem)))
    for one, other in zip(eager, jitted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-15)


def test_nothing_moves_between_host_and_device_in_a_step() -> None:
    problem = draw()
    step, arguments = jax.jit(step_of(problem)), arguments_of(problem)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(*arguments))
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):  # the guard is awake
            jax.jit(lambda x: x)(np.ones(3))


def test_products_are_in_full_precision() -> None:
    # No CPU rounds the factors of a product, so the compiler's own words have to do.
    problem = draw("float32")
    text = jax.jit(step_of(problem)).lower(*arguments_of(problem)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_one_compilation_for_a_schedule_of_gamma() -> None:
    problem = draw()
    traces = 0

    @jax.jit
    def step(images: Any, state: Any, gamma: Any) -> Any:
        nonlocal traces
        traces += 1
        return contrastive_loss(state, images, problem.texts, problem.index, temperature=0.3, gamma=gamma)

    state = problem.state
    for gamma in (1.0, 0.5, 0.25):
        _, state = step(problem.images, state, gamma)
    assert traces == 1


def test_a_training_loop_inside_scan() -> None:
    problem = draw()
    state = init_state(N, dtype=jnp.float64)

    def step(carry: Any, index: Any) -> Any:
        images, state = carry
        (loss, state), gradient = jax.value_and_grad(
            lambda x: contrastive_loss(state, x, problem.texts, index, temperature=0.3, gamma=0.5), has_aux=True
        )(images)
        return (images - 0.1 * gradient, state), loss

    batches = jnp.asarray([INDEX, [1, 3, 5, 6, 8], INDEX])
    (images, last), losses = jax.lax.scan(step, (problem.images, state), batches)
    carry, by_hand = (problem.images, state), []
    for index in batches:
        carry, loss = step(carry, index)
        by_hand.append(loss)
    np.testing.assert_allclose(losses, by_hand, rtol=1e-12)
    np.testing.assert_allclose(images, carry[0], rtol=1e-12, atol=1e-15)
    assert [int(i) for i in np.flatnonzero(np.asarray(last.log_inner_image) == -np.inf)] == [9]


def test_gradient_checkpointing() -> None:
    problem = draw()

    def function(images: Any) -> Any:
        return contrastive_loss(problem.state, images, problem.texts, problem.index, temperature=0.3, gamma=0.7)[0]

    plain = jax.jit(jax.grad(function))(problem.images)
    again = jax.jit(jax.grad(jax.checkpoint(function)))(problem.images)
    np.testing.assert_allclose(again, plain, rtol=1e-13, atol=1e-16)


def test_forward_mode_is_the_inner_product_with_the_gradient() -> None:
    problem = draw()
    generator = np.random.default_rng(3)
    arguments = (problem.images, problem.texts, problem.temperatures)
    tangents = jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape)), arguments)

    def function(images: Any, texts: Any, temperature: Any) -> Any:
        return contrastive_loss(
            problem.state,
            images,
            texts,
            problem.index,
            temperature=temperature,
            gamma=0.7,
            reference_features=problem.references,
            pair_mask=problem.pair_mask,
        )

    (loss, state), (derivative, state_tangent) = jax.jit(lambda *t: jax.jvp(function, arguments, t))(*tangents)
    gradients = jax.jit(jax.grad(lambda *x: function(*x)[0], argnums=(0, 1, 2)))(*arguments)
    expected = sum(
        float(jnp.sum(gradient * tangent))
        for gradient, tangent in zip(jax.tree.leaves(gradients), jax.tree.leaves(tangents), strict=True)
    )
    assert abs(expected) > 0.1
    assert float(derivative) == pytest.approx(expected, rel=1e-13)
    assert not any(np.any(np.asarray(side)) for side in state_tangent)
    eager_loss, eager_state = function(*arguments)
    assert float(loss) == pytest.approx(float(eager_loss), rel=1e-13)
    np.testing.assert_allclose(state.log_inner_image, eager_state.log_inner_image, rtol=1e-13)


def test_the_forward_jacobian_is_the_gradient() -> None:
    problem = draw()

    def function(images: Any, temperature: Any) -> Any:
        return contrastive_loss(problem.state, images, problem.texts, problem.index, temperature=temperature)[0]

    arguments = (problem.images, jnp.asarray(0.3))
    forward, reverse = (jax.jit(d(function, argnums=(0, 1)))(*arguments) for d in (jax.jacfwd, jax.grad))
    np.testing.assert_allclose(forward[0], reverse[0], rtol=1e-13, atol=1e-16)
    assert float(forward[1]) == pytest.approx(float(reverse[1]), rel=1e-13)


def test_a_tangent_of_half_features_is_that_of_float32() -> None:
    problem = draw("float32")
    half, tangent = problem.images.astype("float16"), problem.texts.astype("float16")

    def function(images: Any) -> Any:
        texts = problem.texts.astype("float16").astype(images.dtype)
        return contrastive_loss(problem.state, images, texts, problem.index, temperature=0.3)[0]

    derivative = jax.jvp(function, (half,), (tangent,))[1]
    wide = jax.jvp(function, (half.astype("float32"),), (tangent.astype("float32"),))[1]
    assert derivative.dtype == "float32"
    assert float(derivative) == pytest.approx(float(wide), rel=1e-6)


SECOND_DERIVATIVES: dict[str, Callable[..., Any]] = {
    "grad of grad": lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2)),
    "jvp of grad": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,)),
    "grad of jvp": lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]),
    "jvp of jvp": lambda f: lambda x: jax.jvp(lambda y: jax.jvp(f, (y,), (jnp.ones_like(y),))[1], (x,), (x,)),
    "hessian": jax.hessian,
}


@pytest.mark.parametrize("order", list(SECOND_DERIVATIVES))
@pytest.mark.parametrize("what", ["contrastive loss", "risk"])
def test_a_second_derivative_is_refused(what: str, order: str) -> None:
    problem = draw()

    def function(images: Any) -> Any:
        if what == "risk":
            return jnp.sum(drrho_risk(images, problem.texts, CVaR(0.5)))
        return contrastive_loss(problem.state, images, problem.texts, problem.index, temperature=0.3)[0]

    differentiate = SECOND_DERIVATIVES[order](function)
    # Eager JAX traces a derivative as jit does, but compiles each operation before the refusal. One order is enough.
    for transform in (lambda f: f, jax.jit) if order == "grad of grad" else (jax.jit,):
        with pytest.raises(NotImplementedError, match=r"^the contrastive loss and .* must be differentiated once only"):
            transform(differentiate)(problem.images)


def test_a_derivative_along_a_learned_direction_is_allowed() -> None:
    # The forward derivative is linear in the tangent, whose gradient is then the loss's own first gradient.
    problem = draw()

    def function(images: Any) -> Any:
        return contrastive_loss(problem.state, images, problem.texts, problem.index, temperature=0.3)[0]

    along = jax.grad(lambda tangent: jax.jvp(function, (problem.images,), (tangent,))[1])(problem.texts)
    np.testing.assert_allclose(along, jax.grad(function)(problem.images), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("name", [None, "batch"])
def test_vmap_without_jit_is_one_problem_after_the_other(name: str | None) -> None:
    problem, other = draw(), draw(seed=1)
    both = jnp.stack([problem.images, other.images])

    def function(images: Any) -> Any:
        return contrastive_loss(problem.state, images, problem.texts, problem.index, temperature=0.3, gamma=0.7)[0]

    losses, gradients = jax.vmap(jax.value_and_grad(function), axis_name=name)(both)
    for position in range(2):
        loss, gradient = jax.value_and_grad(function)(both[position])
        assert float(losses[position]) == pytest.approx(float(loss), rel=1e-13)
        np.testing.assert_allclose(gradients[position], gradient, rtol=1e-12, atol=1e-16)


MAPPED = ["image_features", "text_features", "temperature", "reference_weight", "reference_features", "pair_mask"]


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_without_jit_over_any_one_argument(name: str) -> None:
    rng = np.random.default_rng(3)

    def unit(columns: int) -> Any:
        x = rng.normal(size=(2, 4, columns))
        return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))

    both: dict[str, Any] = {
        "image_features": unit(3),
        "text_features": unit(3),
        "temperature": jnp.asarray([0.2, 0.5]),
        "reference_weight": jnp.asarray([0.5, 1.5]),
        "reference_features": (unit(2), unit(2)),
        "pair_mask": jnp.asarray(rng.uniform(size=(2, 4, 4)) < 0.7),
    }
    first = {key: jax.tree.map(lambda x: x[0], value) for key, value in both.items()}

    def loss(value: Any) -> Any:
        arguments = first | {name: value}
        images, texts = arguments.pop("image_features"), arguments.pop("text_features")
        return contrastive_loss(init_state(4), images, texts, jnp.arange(4), **arguments)[0]

    mapped = jax.vmap(loss)(both[name])
    for row in (0, 1):
        one = loss(jax.tree.map(lambda x, row=row: x[row], both[name]))
        assert float(mapped[row]) == pytest.approx(float(one), rel=1e-5)
