"""drrho_jax.contrastive_loss against autograd of the formulas: gradients and constants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from drrho_jax import ContrastiveState, contrastive_loss, init_state  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from drrho_core import (  # noqa: E402
    contrastive_step,
)
from helpers.jax_losses import (  # noqa: E402
    INDEX,
    UNIT,
    B,
    N,
    draw,
    written_out,
)

pytestmark = pytest.mark.usefixtures("wide_types")

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "memoryless": {"gamma": 1.0},
    "cold": {"temperature": 0.02},
    "reference": {"reference": True},
    "pair mask": {"mask": True, "radius": 0.3},
    "temperature per anchor": {"temperature": "pair", "radius": 0.3},
    "everything": {
        "temperature": "pair",
        "gamma": "pair",
        "reference": True,
        "reference_weight": 0.4,
        "eps": 0.1,
        "radius": 0.2,
        "mask": True,
    },
    "tiles": {"tile_size": 2, "reference": True},
    "no budget": {"memory_budget": 0},
}


@pytest.mark.parametrize(
    ("case", "dtype", "jitted"),
    [
        *((case, "float64", True) for case in CASES),
        *((case, "float32", True) for case in ("cold", "everything")),
        ("plain", "float64", False),
        ("everything", "float64", False),
        ("everything", "float32", False),
    ],
)
def test_gradient_is_autograd_of_the_surrogate(case: str, dtype: str, jitted: bool) -> None:
    options = dict(CASES[case])
    problem = draw(dtype)
    references = problem.references if options.pop("reference", False) else None
    pair_mask = problem.pair_mask if options.pop("mask", False) else None
    gamma = options.pop("gamma", 0.7)
    gamma = problem.gammas if gamma == "pair" else gamma
    temperature = options.pop("temperature", 0.3)
    temperature = problem.temperatures if temperature == "pair" else jnp.asarray(temperature, dtype=dtype)

    def function(images: Any, texts: Any, temperature: Any, state: ContrastiveState) -> Any:
        loss, new = contrastive_loss(
            state,
            images,
            texts,
            problem.index,
            temperature=temperature,
            gamma=gamma,
            reference_features=references,
            pair_mask=pair_mask,
            **options,
        )
        return 3.0 * loss, (loss, new)

    step = jax.value_and_grad(function, argnums=(0, 1, 2), has_aux=True)
    step = jax.jit(step) if jitted else step
    (_, (loss, new)), gradients = step(problem.images, problem.texts, temperature, problem.state)

    wide = jax.tree.map(lambda x: x.astype("float64"), (problem.images, problem.texts, temperature))
    old = jax.tree.map(lambda x: x.astype("float64"), tuple(problem.state))
    (_, (expected_loss, rows, scale)), expected = jax.value_and_grad(written_out, argnums=(0, 1, 2), has_aux=True)(
        *wide,
        tuple(side[problem.index] for side in old),
        gamma=jax.tree.map(lambda x: jnp.asarray(x, dtype="float64"), gamma),
        eps=options.get("eps", 0.0),
        radius=options.get("radius", 0.0),
        references=None if references is None else tuple(x.astype("float64") for x in references),
        weight=options.get("reference_weight", 1.0),
        pair_mask=pair_mask,
    )
    tau = min(float(jnp.min(t)) for t in jax.tree.leaves(temperature))
    unit = max(1.0, 0.1 / tau) * UNIT[dtype]
    assert loss.dtype == dtype
    assert loss.shape == ()
    assert abs(float(loss - expected_loss)) <= unit * max(abs(float(expected_loss)), tau)
    for gradient, theirs in zip(gradients[:2], expected[:2], strict=True):
        assert gradient.dtype == dtype
        assert float(jnp.max(jnp.abs(gradient - 3.0 * theirs))) <= 3.0 * unit * float(scale)
    # The terms of its sum are of the size of |log u| + sum w |D|, where each D is at most 4 / temperature.
    size = 3.0 * max(1.0, abs(float(expected_loss)) / tau, 8 / tau * float(scale))
    for gradient, theirs in zip(jax.tree.leaves(gradients[2]), jax.tree.leaves(expected[2]), strict=True):
        assert gradient.dtype == dtype
        assert float(jnp.max(jnp.abs(gradient - 3.0 * theirs))) <= unit * size
    for side, before, row in zip(new, old, rows, strict=True):
        whole = np.array(before)
        whole[INDEX] = row
        seen = whole > -math.inf
        assert side.dtype == dtype
        assert np.array_equal(np.asarray(side) > -math.inf, seen)
        assert np.max(np.abs(np.asarray(side)[seen] - whole[seen]) / np.maximum(1.0, np.abs(whole[seen]))) <= unit


@pytest.mark.parametrize("visited", [False, True], ids=["first visit", "revisit"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "everything"])
def test_check_grads_without_memory(visited: bool, extras: bool) -> None:
    problem = draw()
    index = problem.index if visited else jnp.asarray([0, 2, 5])
    rows = slice(0, index.shape[0])
    options: dict[str, Any] = {}
    temperature: Any = jnp.asarray(0.3)
    if extras:
        options = {"eps": 0.1, "radius": 0.3, "reference_weight": 0.7, "pair_mask": problem.pair_mask[rows, rows]}
        options["reference_features"] = tuple(x[rows] for x in problem.references)
        temperature = tuple(t[rows] for t in problem.temperatures)

    def function(images: Any, texts: Any, temperature: Any) -> Any:
        return contrastive_loss(problem.state, images, texts, index, temperature=temperature, gamma=1.0, **options)[0]

    arguments = (problem.images[rows], problem.texts[rows], temperature)
    check_grads(jax.jit(function), arguments, order=1, modes=["fwd", "rev"], atol=1e-8, rtol=1e-8, eps=1e-5)


def test_temperatures_of_their_own_get_the_closed_form() -> None:
    """Tables of all samples, gathered inside: the step's gradient arrives in the batch's rows, 0 elsewhere."""
    problem = draw()
    tables = jnp.asarray(np.random.default_rng(1).uniform(0.2, 0.8, (2, N)))

    @jax.jit
    @jax.grad
    def gradient(tables: Any) -> Any:
        rows = tables[:, problem.index]
        options = {"temperature": (rows[0], rows[1]), "gamma": 0.7, "radius": 0.4}
        return 3.0 * contrastive_loss(problem.state, problem.images, problem.texts, problem.index, **options)[0]

    step = contrastive_step(
        problem.images,
        problem.texts,
        *(side[problem.index] for side in problem.state),
        temperature=tuple(tables[:, problem.index]),
        gamma=0.7,
        radius=0.4,
    )
    expected = np.zeros((2, N))
    expected[:, np.asarray(problem.index)] = 3.0 * np.stack(step.temperature_gradient)
    np.testing.assert_allclose(gradient(tables), expected, rtol=1e-12, atol=1e-14)
    assert np.count_nonzero(expected) == 2 * B


def test_the_whole_data_set_without_memory_is_the_objective() -> None:
    problem = draw()
    weight, radius = 0.8, 0.4

    def ours(images: Any, texts: Any, t: Any) -> Any:
        return contrastive_loss(
            init_state(B, dtype=jnp.float64),
            images,
            texts,
            jnp.arange(B),
            temperature=t,
            reference_features=problem.references,
            reference_weight=weight,
            radius=radius,
        )[0]

    def objective(images: Any, texts: Any, t: Any) -> Any:
        z = images @ texts.T - weight * problem.references[0] @ problem.references[1].T
        total = 0.0
        for i in range(B):
            others = [j for j in range(B) if j != i]
            f = t * jnp.log(sum(jnp.exp((z[i, j] - z[i, i]) / t) for j in others) / (B - 1))
            g = t * jnp.log(sum(jnp.exp((z[j, i] - z[i, i]) / t) for j in others) / (B - 1))
            total = total + (f + g + radius * (t + t)) / (2 * B)
        return total

    arguments = (problem.images, problem.texts, jnp.asarray(0.2))
    loss, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*arguments)
    expected_loss, expected = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2)))(*arguments)
    assert abs(float(loss - expected_loss)) <= 1e-12 * max(abs(float(expected_loss)), 0.2)
    for gradient, theirs in zip(gradients[:2], expected[:2], strict=True):
        assert float(jnp.max(jnp.abs(gradient - theirs))) <= 1e-12 * 2 / (2 * B)
    assert float(gradients[2]) == pytest.approx(float(expected[2]), rel=1e-12)


@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_infonce_with_its_eps(tau: float) -> None:
    problem = draw()

    def ours(images: Any, texts: Any, t: Any) -> Any:
        return contrastive_loss(problem.state, images, texts, problem.index, temperature=t, eps=1 / (B - 1))[0]

    def infonce(images: Any, texts: Any, t: Any) -> Any:
        logits, labels = images @ texts.T / t, jnp.arange(B)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        both = jnp.mean(entropy(logits, labels)) + jnp.mean(entropy(logits.T, labels))
        return t * (both / 2 - math.log(B - 1))

    arguments = (problem.images, problem.texts, jnp.asarray(tau))
    loss, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*arguments)
    expected_loss, expected = jax.jit(jax.value_and_grad(infonce, argnums=(0, 1, 2)))(*arguments)
    unit = 1e-12 * max(1.0, 0.1 / tau)
    assert abs(float(loss - expected_loss)) <= unit * max(abs(float(expected_loss)), tau)
    for gradient, theirs in zip(gradients[:2], expected[:2], strict=True):
        assert float(jnp.max(jnp.abs(gradient - theirs))) <= unit * 2 / (2 * B)
    assert abs(float(gradients[2] - expected[2])) <= unit * 2 / tau


def test_everything_else_is_constant() -> None:
    problem = draw()
    scalars = {"gamma": 0.7, "eps": 0.1, "radius": 0.3, "reference_weight": 0.9}
    constants = {name: jnp.asarray(value) for name, value in scalars.items()}

    def function(state: Any, index: Any, references: Any, pair_mask: Any, constants: Any) -> Any:
        return contrastive_loss(
            state,
            problem.images,
            problem.texts,
            index,
            temperature=0.3,
            reference_features=references,
            pair_mask=pair_mask,
            **constants,
        )[0]

    gradients = jax.grad(function, argnums=(0, 1, 2, 3, 4), allow_int=True)(
        problem.state, problem.index, problem.references, problem.pair_mask, constants
    )
    for gradient in jax.tree.leaves(gradients):
        if gradient.dtype == jax.dtypes.float0:
            continue
        assert not np.any(np.asarray(gradient))


def test_the_new_state_carries_no_gradient() -> None:
    problem = draw()

    def function(images: Any) -> Any:
        _, new = contrastive_loss(problem.state, images, problem.texts, problem.index, temperature=0.3)
        return jnp.sum(new.log_inner_image[problem.index])

    assert not np.any(np.asarray(jax.grad(function)(problem.images)))


def test_a_number_is_a_temperature_and_the_same_as_an_array() -> None:
    problem = draw()
    results = []
    for temperature in (0.3, jnp.asarray(0.3)):

        def function(images: Any, temperature: Any = temperature) -> Any:
            return contrastive_loss(problem.state, images, problem.texts, problem.index, temperature=temperature)

        (loss, state), gradient = jax.value_and_grad(function, has_aux=True)(problem.images)
        results.append((loss, *state, gradient))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-14, atol=1e-16)


def test_one_array_in_both_roles() -> None:
    problem = draw()

    def function(images: Any, texts: Any) -> Any:
        return contrastive_loss(problem.state, images, texts, problem.index, temperature=0.3, gamma=0.7)[0]

    apart = jax.grad(function, argnums=(0, 1))(problem.images, problem.images)
    together = jax.grad(lambda features: function(features, features))(problem.images)
    np.testing.assert_allclose(together, apart[0] + apart[1], rtol=1e-13, atol=1e-16)
