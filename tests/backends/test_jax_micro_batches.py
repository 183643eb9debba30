"""drrho_jax.micro_batches equals the whole batch: loss, state and gradient, whatever the size of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from drrho_jax import contrastive_loss, init_state, micro_batches  # noqa: E402

B, N, WIDTH, D = 5, 11, 6, 4  # B, N and D as in helpers.jax_losses: eager JAX compiles each operation once per shape
INDEX = [7, 0, 10, 4, 2]


pytestmark = pytest.mark.usefixtures("wide_types")


def problem(dtype: str = "float64") -> tuple[Any, Any]:
    """Return parameters with a learned temperature, and a batch with one random key per sample."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), dtype=dtype)  # noqa: E731
    parameters = {
        "image": {"hidden": draw(WIDTH, 5), "out": draw(5, D)},
        "text": draw(3, D),
        "log_temperature": jnp.asarray(-0.7, dtype=dtype),
    }
    inputs = {"images": draw(B, WIDTH), "tokens": (draw(B, 3),), "keys": jax.random.split(jax.random.key(5), B)}
    return parameters, inputs


def encode(parameters: Any, micro_batch: Any) -> tuple[Any, Any]:
    """Encode with dropout, each sample with its own key."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (5,)))(micro_batch["keys"])
    hidden = jnp.tanh(micro_batch["images"] @ parameters["image"]["hidden"]) * keep
    return hidden @ parameters["image"]["out"], jnp.sin(micro_batch["tokens"][0] @ parameters["text"])


def loss(image: Any, text: Any, parameters: Any) -> tuple[Any, Any]:
    """Return the contrastive loss with the learned temperature."""
    state = init_state(N, dtype=jnp.float64)
    temperature = jnp.exp(parameters["log_temperature"])
    options = {"gamma": 0.7, "radius": 0.3}
    return contrastive_loss(state, image, text, jnp.asarray(INDEX), temperature=temperature, **options)


def whole(parameters: Any, inputs: Any) -> Any:
    return jax.value_and_grad(lambda p: loss(*encode(p, inputs), p), has_aux=True)(parameters)


def assert_close(one: Any, other: Any, tolerance: float) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert mine.dtype == theirs.dtype
        ours, expected = np.asarray(mine), np.asarray(theirs)
        finite = np.isfinite(expected)  # the state of the other samples is -inf
        assert np.array_equal(ours[~finite], expected[~finite])
        largest = np.max(np.abs(expected[finite]))
        assert np.max(np.abs(ours[finite] - expected[finite])) <= tolerance * largest


@pytest.mark.parametrize(
    ("size", "jitted"), [(1, True), (2, True), (3, True), (B, True), (50, True), (3, False), (50, False)]
)
def test_micro_batches_equal_the_whole_batch(size: int, jitted: bool) -> None:
    parameters, inputs = problem()
    step = lambda p, x: micro_batches(encode, p, x, loss, size=size)  # noqa: E731
    result = (jax.jit(step) if jitted else step)(parameters, inputs)
    expected = whole(parameters, inputs)
    assert abs(float(expected[1]["log_temperature"])) > 1e-3
    assert_close(result, expected, 1e-12)


def test_a_loss_of_two_arguments_has_constant_temperature() -> None:
    parameters, inputs = problem()
    # A default belongs to the caller: it is not filled with the parameters.
    two = lambda image, text, constants=parameters: loss(image, text, constants)  # noqa: E731
    (value, state), gradient = micro_batches(encode, parameters, inputs, two, size=3)
    expected = jax.value_and_grad(lambda p: loss(*encode(p, inputs), parameters), has_aux=True)(parameters)
    assert float(gradient["log_temperature"]) == 0.0
    assert_close(((value, state), gradient), expected, 1e-12)


def test_a_key_per_micro_batch_draws_the_same_noise_twice() -> None:
    parameters, inputs = problem()

    def noisy(parameters: Any, micro_batch: Any) -> tuple[Any, Any]:
        keep = jax.random.bernoulli(micro_batch["keys"][0], 0.5, micro_batch["images"].shape)
        return encode(parameters, {**micro_batch, "images": micro_batch["images"] * keep})

    def by_hand(parameters: Any) -> Any:
        parts = [jax.tree.map(lambda x, i=i: x[i : i + 3], inputs) for i in range(0, B, 3)]
        sides = zip(*(noisy(parameters, part) for part in parts), strict=True)
        return loss(*(jnp.concatenate(side) for side in sides), parameters)

    result = micro_batches(noisy, parameters, inputs, loss, size=3)
    assert_close(result, jax.value_and_grad(by_hand, has_aux=True)(parameters), 1e-12)


def test_numpy_parameters_and_inputs_are_taken() -> None:
    parameters, inputs = problem()
    on_host = {**jax.device_get({name: inputs[name] for name in ("images", "tokens")}), "keys": inputs["keys"]}
    result = micro_batches(encode, jax.device_get(parameters), on_host, loss, size=4)
    assert_close(result, whole(parameters, inputs), 1e-12)


def test_half_parameters_are_summed_in_float32() -> None:
    # 4,096 micro-batches of gradient 1: in float16 the sum would stop growing at 2,048.
    rows = 4096
    parameters = jnp.ones((), dtype="float16")

    def encode(parameters: Any, micro_batch: Any) -> tuple[Any, Any]:
        return micro_batch[:, None] * parameters, jnp.zeros((len(micro_batch), 1), dtype="float16")

    def total(image: Any, text: Any) -> tuple[Any, None]:
        return jnp.sum(image.astype("float32")), None

    _, gradient = micro_batches(encode, parameters, jnp.full(rows, 1.0, dtype="float16"), total, size=1)
    assert gradient.dtype == "float16"
    assert float(gradient) == rows


def test_activations_of_one_micro_batch_at_a_time_are_held() -> None:
    # The compiler's own count of temporary memory: 64 rows of a wide layer, or 8 at a time.
    width = 20_000
    parameters, images = jnp.full((2, width), 0.01), jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)))

    def encode(parameters: Any, images: Any) -> tuple[Any, Any]:
        hidden = jnp.tanh(images @ parameters)
        return hidden @ jnp.ones((width, D)), images @ jnp.ones((2, D))

    def loss(image: Any, text: Any) -> Any:
        return contrastive_loss(init_state(64), image, text, jnp.arange(64), temperature=0.5)

    def temporary(size: int) -> int:
        step = jax.jit(lambda p: micro_batches(encode, p, images, loss, size=size))
        return int(step.lower(parameters).compile().memory_analysis().temp_size_in_bytes)

    assert temporary(8) < 0.4 * temporary(64)


BAD_INPUT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "size": ({"size": 0}, ValueError, "size must be at least 1, got 0"),
    "parameters": (
        {"parameters": {"steps": jnp.asarray(3)}}, TypeError,
        r"parameters\['steps'\] must have a real floating dtype, got ArrayImpl",
    ),
    "no inputs": ({"inputs": ()}, TypeError, "inputs must hold at least one array, got none"),
    "scalar inputs": (
        {"inputs": (jnp.ones(3), 0.5)}, TypeError, r"inputs\[1\] must be an array with one row per sample, got 0\.5"
    ),
    "rows": (
        {"inputs": (jnp.ones(3), jnp.ones(4))}, ValueError,
        r"inputs\[1\] must have as many rows as inputs\[0\] \(3\), got 4",
    ),
    "empty": ({"inputs": jnp.ones((0, 2))}, ValueError, r"inputs must have at least one row, got shape \(0, 2\)"),
    "one feature": (
        {"encode": lambda p, x: x}, TypeError, r"encode must return a pair \(image, text\) of arrays, got "
    ),
    "rows of features": (
        {"encode": lambda p, x: (x["images"][:1], x["images"])}, ValueError,
        r"encode must return one row per sample \(2\), got shape \(1, 6\)",
    ),
    "bare loss": (
        {"loss": lambda i, t: jnp.sum(i)}, TypeError, r"loss must return a pair \(scalar loss, state\), got "
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input_is_one_clear_error(case: str) -> None:
    change, error, message = BAD_INPUT[case]
    parameters, inputs = problem()
    given: dict[str, Any] = {"encode": encode, "parameters": parameters, "inputs": inputs, "loss": loss, "size": 2}
    given.update(change)
    call: Callable[..., Any] = lambda: micro_batches(  # noqa: E731
        *(given[name] for name in ("encode", "parameters", "inputs", "loss")), size=given["size"]
    )
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_second_derivative_is_refused() -> None:
    parameters, inputs = problem()
    with pytest.raises(NotImplementedError, match="must be differentiated once only"):
        jax.grad(lambda p: micro_batches(encode, p, inputs, loss, size=3)[0][0])(parameters)
