"""drrho_jax.contrastive_loss and drrho_jax.drrho_risk against autograd of the formulas, written out again here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from drrho_jax import ContrastiveState, contrastive_loss, drrho_risk, init_state  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import drrho_core  # noqa: E402
from drrho_core import (  # noqa: E402
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    contrastive_step,
)

B, D, R, N = 5, 4, 3, 11
INDEX = [7, 0, 10, 4, 2]
UNIT = {"float64": 1e-12, "float32": 5e-6}


@pytest.fixture(autouse=True)
def _wide_types() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def unit_rows(generator: np.random.Generator, *shape: int) -> np.ndarray:
    rows = generator.standard_normal(shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class Problem(NamedTuple):
    """One asymmetric batch; two of its five samples were never visited."""

    state: ContrastiveState
    images: Any
    texts: Any
    index: Any
    references: tuple[Any, Any]
    pair_mask: Any
    temperatures: tuple[Any, Any]
    gammas: tuple[Any, Any]


def draw(dtype: str = "float64", seed: int = 0) -> Problem:
    generator = np.random.default_rng(seed)
    arrays = lambda values: tuple(jnp.asarray(x, dtype=dtype) for x in values)  # noqa: E731
    images, texts = arrays(unit_rows(generator, 2, B, D))
    references = arrays(unit_rows(generator, 2, B, R))
    states = generator.normal(-1.0, 1.5, (2, N))
    states[:, [0, 2, 5]] = -np.inf
    pair_mask = generator.random((B, B)) > 0.3
    pair_mask[3, :] = False  # an image without negatives
    temperatures = arrays(generator.uniform(0.2, 0.8, (2, B)))
    gammas = arrays(generator.uniform(0.1, 1.0, (2, B)))
    state = ContrastiveState(*arrays(states))
    return Problem(state, images, texts, jnp.asarray(INDEX), references, jnp.asarray(pair_mask), temperatures, gammas)


def written_out(
    images: Any,
    texts: Any,
    temperature: Any,
    log_inner: tuple[Any, Any],
    *,
    gamma: Any,
    eps: float = 0.0,
    radius: float = 0.0,
    references: tuple[Any, Any] | None = None,
    weight: float = 1.0,
    pair_mask: Any = None,
) -> tuple[Any, tuple[Any, Any, Any]]:
    """What the formulas say, in the linear domain: surrogate, (loss, new log_inner, max |c_i| / 2b)."""
    b, constant = images.shape[0], jax.lax.stop_gradient
    z = images @ texts.T
    if references is not None:
        z = z - weight * references[0] @ references[1].T
    negatives = ~jnp.eye(b, dtype=bool)
    if pair_mask is not None:
        negatives = negatives & pair_mask
    pair = lambda x: x if isinstance(x, tuple) else (x, x)  # noqa: E731
    loss = surrogate = jnp.zeros(())
    new, positive_weight = [], jnp.zeros(b)
    sides = zip((z, z.T), (negatives, negatives.T), log_inner, pair(temperature), pair(gamma), strict=True)
    for logits, of_these, log_u, t, take in sides:
        count = jnp.sum(of_these, axis=1)
        divisor = jnp.maximum(count, 1)
        t_column = t[:, None] if jnp.ndim(t) else t
        d = (logits - jnp.diagonal(logits)[:, None]) / t_column
        g = jnp.sum(jnp.exp(d) * of_these, axis=1) / divisor
        active = count > 0
        u = constant(jnp.where(log_u == -jnp.inf, g, (1 - take) * jnp.exp(log_u) + take * g))
        new.append(jnp.where(active, jnp.log(u), log_u))
        value = jnp.where(active, jnp.log(jnp.where(active, eps + u, 1.0)) + radius, 0.0)
        fresh = jnp.where(active, g / jnp.where(active, eps + u, 1.0), 0.0)
        loss = loss + jnp.sum(t * value) / (2 * b)
        surrogate = surrogate + jnp.sum(t * value + constant(t) * fresh) / (2 * b)
        w = jnp.where(of_these, jnp.exp(d), 0.0) / jnp.where(active, (eps + u) * divisor, 1.0)[:, None]
        positive_weight = positive_weight + jnp.sum(w, axis=1)
    return surrogate, (loss, tuple(new), jnp.max(positive_weight) / (2 * b))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "memoryless": {"gamma": 1.0},
    "cold": {"temperature": 0.02},
    "eps": {"eps": 0.25},
    "radius": {"radius": 0.8},
    "reference": {"reference": True},
    "reference weight": {"reference": True, "reference_weight": 1.5},
    "pair mask": {"mask": True, "radius": 0.3},
    "temperature per anchor": {"temperature": "pair", "radius": 0.3},
    "gamma per anchor": {"gamma": "pair"},
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
        *((case, "float32", True) for case in ("cold", "reference", "everything")),
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


# --------------------------------------------------------------------------------------------------------- transforms


def step_of(problem: Problem) -> Callable[..., Any]:
    def function(images: Any, texts: Any, temperature: Any, state: Any, index: Any, references: Any) -> Any:
        return contrastive_loss(
            state, images, texts, index, temperature=temperature, gamma=0.7, reference_features=references
        )

    return jax.value_and_grad(function, argnums=(0, 1, 2), has_aux=True)


def arguments_of(problem: Problem) -> tuple[Any, ...]:
    return (problem.images, problem.texts, jnp.asarray(0.3), problem.state, problem.index, problem.references)


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
    forward, reverse = (d(function, argnums=(0, 1))(*arguments) for d in (jax.jacfwd, jax.grad))
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
    for transform in (lambda f: f, jax.jit):
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


# --------------------------------------------------------------------------------------------------------------- state


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
        with pytest.raises(TypeError, match=r"^dtype must be float32, or float64 where jax_enable_x64 is on, got "):
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


# ------------------------------------------------------------------------------------------------------------- errors


def valid() -> tuple[Problem, dict[str, Any]]:
    problem = draw("float32")
    return problem, {
        "state": problem.state,
        "image_features": problem.images,
        "text_features": problem.texts,
        "sample_index": problem.index,
        "temperature": jnp.asarray(0.3),
        "reference_features": problem.references,
        "pair_mask": problem.pair_mask,
    }


BAD_INPUT: dict[str, tuple[Callable[[Problem], dict[str, Any]], type[Exception], str]] = {
    "repeated index": (
        lambda p: {"sample_index": jnp.asarray([7, 0, 10, 0, 2])},
        ValueError,
        "sample_index must not repeat an index within a batch, got 0 twice",
    ),
    "index too large": (
        lambda p: {"sample_index": jnp.asarray([7, 0, 11, 4, 2])},
        ValueError,
        r"sample_index must hold row ids from 0 to 10 \(see docs/large-data\.md, .*\), got 11 at position 2",
    ),
    "negative index": (
        lambda p: {"sample_index": jnp.asarray([7, -1, 10, 4, 2])},
        ValueError,
        r"sample_index must hold row ids from 0 to 10 \(see docs/large-data\.md, .*\), got -1 at position 1",
    ),
    "floating index": (
        lambda p: {"sample_index": p.index.astype("float32")},
        TypeError,
        "sample_index must have an integer dtype, got float32",
    ),
    "list as index": (lambda p: {"sample_index": INDEX}, TypeError, "sample_index must be an array, got list"),
    "index without axes": (
        lambda p: {"sample_index": p.index[0]},
        ValueError,
        r"sample_index must have 1 axes \(batch_size,\), got shape \(\)",
    ),
    "short index": (
        lambda p: {"sample_index": p.index[:4]},
        ValueError,
        r"sample_index must have shape \(batch_size,\) = \(5,\), got \(4,\)",
    ),
    "shapes": (
        lambda p: {"text_features": p.texts[:, :3]},
        ValueError,
        r"text_features must have shape \(batch_size, feature_dim\) = \(5, 4\), got \(5, 3\)",
    ),
    "one axis": (
        lambda p: {"image_features": p.images[:, 0]},
        ValueError,
        r"image_features must have 2 axes \(batch_size, feature_dim\), got shape \(5,\)",
    ),
    "dtypes": (
        lambda p: {"image_features": p.images.astype("float16")},
        TypeError,
        r"text_features must have the dtype of image_features \(float16\), got float32",
    ),
    "reference dtype": (
        lambda p: {"reference_features": (p.references[0], p.references[1].astype("float64"))},
        TypeError,
        r"reference_features\[1\] must have the dtype of .* \(float32\), got float64",
    ),
    "nan": (
        lambda p: {"image_features": p.images.at[2, 1].set(jnp.nan)},
        ValueError,
        r"image_features must be finite, got nan at position \(2, 1\)",
    ),
    "temperature": (
        lambda p: {"temperature": jnp.asarray(-0.5)},
        ValueError,
        r"temperature must be > 0, got -0\.5",
    ),
    "temperature as number": (lambda p: {"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
    "temperature of one side": (
        lambda p: {"temperature": (p.temperatures[0], p.temperatures[1][:4])},
        ValueError,
        r"temperature\[1\] must have shape \(batch_size,\) = \(5,\), got \(4,\)",
    ),
    "gamma": (lambda p: {"gamma": 1.5}, ValueError, r"gamma must be in \(0, 1\], got 1\.5"),
    "eps": (lambda p: {"eps": -1.0}, ValueError, r"eps must be >= 0, got -1\.0"),
    "radius": (lambda p: {"radius": math.inf}, ValueError, "radius must be finite, got inf"),
    "reference weight": (lambda p: {"reference_weight": -1.0}, ValueError, "reference_weight must be >= 0"),
    "one reference": (
        lambda p: {"reference_features": p.references[0]},
        TypeError,
        r"reference_features must be a pair \(image, text\) of arrays, got ArrayImpl",
    ),
    "mask shape": (
        lambda p: {"pair_mask": p.pair_mask[:4]},
        ValueError,
        r"pair_mask must have shape \(batch_size, batch_size\) = \(5, 5\), got \(4, 5\)",
    ),
    "mask dtype": (lambda p: {"pair_mask": p.pair_mask.astype("int8")}, TypeError, "pair_mask must have dtype bool"),
    "tile size": (lambda p: {"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
    "state of half width": (
        lambda p: {"state": ContrastiveState(*(side.astype("bfloat16") for side in p.state))},
        TypeError,
        r"state\.log_inner_image must be float32 or wider, got bfloat16",
    ),
    "uneven state": (
        lambda p: {"state": ContrastiveState(p.state[0], p.state[1][:9])},
        ValueError,
        r"state\.log_inner_text must have shape \(num_samples,\) = \(11,\), got \(9,\)",
    ),
    "square state": (
        lambda p: {"state": ContrastiveState(p.state[0][:, None], p.state[1])},
        ValueError,
        r"state\.log_inner_image must have 1 axes \(num_samples,\), got shape \(11, 1\)",
    ),
    "list in the state": (
        lambda p: {"state": ContrastiveState([0.0] * N, p.state[1])},
        TypeError,
        r"state\.log_inner_image must be an array, got \[0\.0, ",
    ),
    "no state": (lambda p: {"state": None}, TypeError, "state must be a ContrastiveState, got None"),
    "one pair": (
        lambda p: {
            "image_features": p.images[:1],
            "text_features": p.texts[:1],
            "sample_index": p.index[:1],
            "reference_features": None,
            "pair_mask": None,
        },
        ValueError,
        "image_features must hold at least 2 pairs",
    ),
}


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input_is_one_clear_error(case: str) -> None:
    change, error, message = BAD_INPUT[case]
    problem, arguments = valid()
    arguments.update(change(problem))
    with pytest.raises(error, match=f"^{message}"):
        contrastive_loss(**arguments)


@pytest.mark.parametrize("case", ["repeated index", "nan", "temperature", "index too large"])
def test_values_are_looked_at_while_differentiating(case: str) -> None:
    change, error, message = BAD_INPUT[case]
    problem, arguments = valid()
    arguments.update(change(problem))

    def function(images: Any, texts: Any, temperature: Any) -> Any:
        return contrastive_loss(
            **{**arguments, "image_features": images, "text_features": texts, "temperature": temperature}
        )[0]

    with pytest.raises(error, match=f"^{message}"):
        jax.grad(function, argnums=(0, 1, 2))(
            arguments["image_features"], arguments["text_features"], arguments["temperature"]
        )


@pytest.mark.parametrize("bad", [11, 10**6, -1])
def test_under_jit_an_index_out_of_range_shows_in_the_loss(bad: int) -> None:
    problem = draw()
    index = jnp.asarray([7, 0, bad, 4, 2])
    loss, state = jax.jit(lambda i: contrastive_loss(problem.state, problem.images, problem.texts, i, temperature=0.3))(
        index
    )
    assert math.isnan(float(loss))
    others = [i for i in range(N) if i not in (7, 0, 4, 2)]
    assert np.array_equal(np.asarray(state.log_inner_image)[others], np.asarray(problem.state[0])[others])


OUTSIDE = [
    ("gamma", 1.5), ("gamma", 0.0), ("gamma", -0.5), ("gamma", math.nan), ("temperature", 0.0), ("temperature", -0.3),
    ("eps", -0.1), ("radius", -1.0), ("reference_weight", -1.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bad"), OUTSIDE)
def test_under_jit_an_option_outside_its_domain_gives_nan(name: str, bad: float) -> None:
    problem = draw()

    def function(images: Any, options: Any) -> Any:
        given = {"temperature": 0.3, "reference_features": problem.references} | options
        return contrastive_loss(problem.state, images, problem.texts, problem.index, **given)

    step = jax.jit(jax.value_and_grad(function, has_aux=True))
    (loss, state), gradient = step(problem.images, {name: bad})
    assert math.isnan(float(loss))
    assert np.all(np.isnan(np.asarray(gradient)))
    for side, old in zip(state, problem.state, strict=True):
        others = [i for i in range(N) if i not in INDEX]
        assert np.all(np.isnan(np.asarray(side)[INDEX]))
        assert np.array_equal(np.asarray(side)[others], np.asarray(old)[others])


def test_under_jit_one_gamma_outside_its_domain_gives_nan_on_a_first_visit() -> None:
    # A first visit does not use gamma, so the values alone would not show the mistake.
    problem = draw()
    gamma = (problem.gammas[0], problem.gammas[1].at[2].set(1.5))
    loss, state = jax.jit(
        lambda g: contrastive_loss(
            init_state(N), problem.images, problem.texts, problem.index, temperature=0.3, gamma=g
        )
    )(gamma)
    assert math.isnan(float(loss))
    assert np.all(np.isnan(np.asarray(state.log_inner_image)[INDEX]))


def test_anchor_weights_scale_loss_and_gradient_and_not_the_state() -> None:
    problem = draw()
    results = {}
    for name, weight in {"none": None, "ones": np.ones(B), "twos": (jnp.full(B, 2.0), np.full(B, 2.0))}.items():

        def function(images: Any, weight: Any = weight) -> Any:
            return contrastive_loss(
                problem.state, images, problem.texts, problem.index, temperature=0.3, gamma=0.7, anchor_weight=weight
            )

        results[name] = jax.value_and_grad(function, has_aux=True)(problem.images)
    (loss, state), gradient = results["none"]
    for name, factor in {"ones": 1.0, "twos": 2.0}.items():
        (weighted_loss, weighted_state), weighted = results[name]
        assert float(weighted_loss) == pytest.approx(factor * float(loss), rel=1e-13)
        np.testing.assert_allclose(weighted, factor * gradient, rtol=1e-12, atol=1e-16)
        np.testing.assert_allclose(weighted_state.log_inner_text, state.log_inner_text, rtol=1e-13)


def test_an_anchor_weight_is_a_constant() -> None:
    problem = draw()

    def function(weight: Any) -> Any:
        options = {"temperature": 0.3, "anchor_weight": weight}
        return contrastive_loss(problem.state, problem.images, problem.texts, problem.index, **options)[0]

    assert not np.any(np.asarray(jax.grad(function)(jnp.linspace(0.5, 1.5, B))))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 2**63}, ValueError, "num_samples must fit int64, got 9223372036854775808"),
        ({"num_samples": 2.5}, TypeError, r"num_samples must be an integer, got 2\.5"),
        ({"num_samples": 3, "dtype": jnp.bfloat16}, TypeError, "dtype must be float32, or float64 .*, got bfloat16"),
        ({"num_samples": 3, "dtype": jnp.int32}, TypeError, "dtype must be float32, or float64 .*, got int32"),
    ],
)
def test_bad_states(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        init_state(**arguments)


# --------------------------------------------------------------------------------------------------------------- risk


SETS = [
    CVaR(0.35), KLPenalty(0.7), KLBall(0.2), ChiSquarePenalty(0.5), ChiSquareBall(0.3), CressieReadBall(1.5, 0.2)
]  # fmt: skip


@pytest.mark.parametrize(("ambiguity_set", "axis"), [(CVaR(0.35), 0), *((each, -1) for each in SETS)])
def test_risk_check_grads(ambiguity_set: Any, axis: int) -> None:
    generator = np.random.default_rng(0)
    loss = jnp.asarray(generator.normal(1.0, 2.0, (3, 7)))
    reference_loss = jnp.asarray(generator.normal(0.0, 1.0, (3, 7)))

    @jax.jit
    def function(x: Any) -> Any:
        return drrho_risk(x, reference_loss, ambiguity_set, reference_weight=0.8, axis=axis)

    assert function(loss).shape == ((7,) if axis == 0 else (3,))
    check_grads(function, (loss,), order=1, modes=["fwd", "rev"], atol=1e-8, rtol=1e-7, eps=1e-5)


@pytest.mark.parametrize("ambiguity_set", SETS, ids=repr)
def test_risk_under_vmap_without_jit(ambiguity_set: Any) -> None:
    loss, reference_loss = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 7)))
    function = lambda x, y: drrho_risk(x, y, ambiguity_set)  # noqa: E731
    mapped, gradients = jax.vmap(jax.value_and_grad(function))(loss, reference_loss)
    together, pull = jax.vjp(function, loss, reference_loss)
    np.testing.assert_allclose(mapped, together, rtol=1e-13)
    np.testing.assert_allclose(gradients, pull(jnp.ones(3))[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_forward_mode_of_the_risk_is_the_inner_product_with_the_weights(axis: int | None) -> None:
    generator = np.random.default_rng(0)
    shape = (
        (6,) if axis is None else (4, 1, 6) if axis == 0 else (1, 6, 4)
    )  # axes of length 1 that are not the samples'
    loss, reference_loss, tangent = jnp.asarray(generator.normal(size=(3, *shape)))
    where = -1 if axis is None else axis
    function = lambda x: drrho_risk(x, reference_loss, CVaR(0.4), axis=where)  # noqa: E731
    weights = drrho_core.drrho_risk(loss, reference_loss, CVaR(0.4), axis=where).weights
    derivative = jax.jvp(function, (loss,), (tangent,))[1]
    np.testing.assert_allclose(derivative, jnp.sum(weights * tangent, axis=where), rtol=1e-13)
    np.testing.assert_allclose(jax.jacfwd(function)(loss), jax.jacrev(function)(loss), rtol=1e-13, atol=1e-16)


def test_risk_of_the_worst_half() -> None:
    # excess 0.1, 1.5, 0.5: the worst sample and half of the next, of the weight 1 / 1.5 each
    loss, reference_loss = jnp.asarray([3.0, 2.0, 1.0]), jnp.asarray([2.9, 0.5, 0.5])
    risk, gradients = jax.value_and_grad(lambda *x: 2.0 * drrho_risk(*x, CVaR(0.5)), argnums=(0, 1))(
        loss, reference_loss
    )
    assert float(risk) == pytest.approx(2 * (1.5 + 0.5 * 0.5) / 1.5, rel=1e-12)
    np.testing.assert_allclose(gradients[0], [0.0, 4 / 3, 2 / 3], rtol=1e-12)
    assert not np.any(np.asarray(gradients[1]))


def test_risk_never_reads_what_does_not_count() -> None:
    loss = jnp.asarray([[3.0, jnp.nan, 1.0], [1.0, 2.0, jnp.inf]])
    where = jnp.asarray([[True, False, True], [True, True, False]])
    risk = lambda x: drrho_risk(x, jnp.zeros((2, 3)), CVaR(0.5), where=where)  # noqa: E731
    assert risk(loss).tolist() == [3.0, 2.0]
    assert jax.jit(jax.grad(lambda x: jnp.sum(risk(x))))(loss).tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_risk_errors() -> None:
    with pytest.raises(TypeError, match=r"^loss must be an array, got list$"):
        drrho_risk([1.0], jnp.ones(1), CVaR(0.5))
    with pytest.raises(ValueError, match=r"^reference_loss must have "):
        drrho_risk(jnp.ones(3), jnp.ones(4), CVaR(0.5))


def test_risk_is_compiled_with_a_rolled_up_loop() -> None:
    loss = np.random.default_rng(0).normal(size=(2, 9))
    risk = jax.jit(lambda x: drrho_risk(x, jnp.zeros_like(x), KLBall(0.2)))
    assert "stablehlo.while" in risk.lower(jnp.asarray(loss)).as_text()
    expected = drrho_core.drrho_risk(loss, np.zeros_like(loss), KLBall(0.2)).risk
    np.testing.assert_allclose(risk(jnp.asarray(loss)), expected, rtol=1e-13)


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
