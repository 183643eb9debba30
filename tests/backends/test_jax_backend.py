"""What the JAX backend has beyond the contract: compiled steps, optax behind the flat state, the torch tower's twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from drrho_jax import JaxBackend  # noqa: E402
from drrho_jax.models import ConvModel  # noqa: E402

from drrho_clip.models import ModelSpec, initial_parameters  # noqa: E402
from drrho_clip.optimizer import AdamW  # noqa: E402

SPEC = ModelSpec(
    "conv", image_size=9, channels=3, vocabulary_size=12, context_length=6, feature_dim=7, width=4, depth=1, heads=2
)
MLP = ModelSpec("mlp", image_size=4, channels=2, vocabulary_size=9, context_length=5, feature_dim=6, width=3)


pytestmark = pytest.mark.usefixtures("wide_types")


def inputs(b: int = 5) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Parameters (no zeros among them), images, tokens of different lengths, upstream gradients."""
    generator = np.random.default_rng(0)
    parameters = {
        name: values + 0.1 * generator.standard_normal(values.shape)
        for name, values in initial_parameters(SPEC, seed=1).items()
    }
    texts = generator.integers(1, 12, (b, 6)).astype(np.int32)
    for row, length in enumerate((6, 1, 3, 5, 2)):
        texts[row, length:] = 0
    return parameters, generator.uniform(-1, 1, (b, 9, 9, 3)), texts, generator.standard_normal((2, b, 7))


@pytest.mark.parametrize(("dtype", "unit"), [("float64", 1e-10), ("float32", 1e-5)])
def test_the_conv_model_is_torchs(dtype: str, unit: float) -> None:
    torch_backend = pytest.importorskip("drrho_torch").TorchBackend("cpu", dtype)
    results: list[list[np.ndarray]] = []
    for backend in (JaxBackend("cpu", dtype), torch_backend):
        parameters, images, texts, upstream = inputs()

        def forward_and_back(parameters: Any, images: Any, texts: Any, upstream: Any, backend: Any = backend) -> Any:
            *features, pullback = backend.model(SPEC).encode(parameters, images, texts)
            return features, pullback(upstream[0], upstream[1])

        features, gradients = backend.compile(forward_and_back)(
            {name: backend.asarray(values) for name, values in parameters.items()},
            *(backend.asarray(x) for x in (images, texts, upstream)),
        )
        results.append([backend.to_numpy(x) for x in (*features, *(gradients[name] for name in parameters))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert np.max(np.abs(ours - theirs)) <= unit * max(1.0, np.max(np.abs(theirs)))


def test_pullback_inside_a_compiled_step() -> None:
    backend = JaxBackend("cpu", "float64")
    model, optimizer = backend.model(MLP), backend.adamw(weight_decay=0.1, epsilon=1e-3)
    generator = np.random.default_rng(0)
    side, channels = MLP.image_size, MLP.channels
    images = backend.asarray(generator.uniform(-1, 1, (4, side, side, channels)))
    texts = backend.asarray(generator.uniform(0, 1, (4, 9)))
    traces = 0

    def step(parameters: Any, state: Any, images: Any, texts: Any, learning_rate: Any) -> Any:
        nonlocal traces
        traces += 1
        image_features, text_features, pullback = model.encode(parameters, images, texts)
        gradients = pullback(text_features, image_features)  # of the sum of inner products
        return *optimizer.update(parameters, gradients, state, learning_rate), jnp.sum(image_features * text_features)

    @jax.jit
    @jax.value_and_grad
    def value_and_gradients(parameters: Any) -> Any:
        return jnp.sum(model.encode_images(parameters, images) * model.encode_texts(parameters, texts))

    compiled, update = backend.compile(step), jax.jit(optimizer.update)
    parameters = {name: backend.asarray(values) for name, values in initial_parameters(MLP, seed=0).items()}
    expected, expected_state = parameters, optimizer.init(parameters)
    state = expected_state
    for rate in (0.1, 0.05):
        parameters, state, total = compiled(parameters, state, images, texts, rate)
        expected_total, gradients = value_and_gradients(expected)
        # Without an epsilon to speak of AdamW would divide the rounding of gradients that are 0 by its own size.
        expected, expected_state = update(expected, gradients, expected_state, rate)
        assert float(total) == pytest.approx(float(expected_total), rel=1e-12)
    assert traces == 1
    assert int(state["step"]) == 2
    for name, values in expected.items():
        np.testing.assert_allclose(parameters[name], values, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_ten_steps_of_optax_are_those_of_the_array_api(compiled: bool) -> None:
    generator = np.random.default_rng(3)
    shapes = {"kernel": (3, 4), "bias": (4,), "conv": (2, 3, 3, 3), "scale": ()}
    settings = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3}
    backend = JaxBackend("cpu", "float64")
    ours, theirs = backend.adamw(**settings), AdamW(np, **settings)
    expected = {name: np.asarray(generator.standard_normal(shape)) for name, shape in shapes.items()}
    parameters = {name: backend.asarray(values) for name, values in expected.items()}
    state, expected_state = ours.init(parameters), theirs.init(expected)
    update = backend.compile(ours.update) if compiled else ours.update
    for _ in range(10):
        rate = float(generator.uniform(0.01, 0.3))
        gradients = {name: np.asarray(generator.standard_normal(shape)) for name, shape in shapes.items()}
        expected, expected_state = theirs.update(expected, gradients, expected_state, rate)
        on_device = {name: backend.asarray(values) for name, values in gradients.items()}
        parameters, state = update(parameters, on_device, state, rate)
    assert set(state) == set(expected_state)
    assert state["step"].dtype == "int32"
    assert int(state["step"]) == 10
    for name, values in {**expected, **expected_state}.items():
        np.testing.assert_allclose({**parameters, **state}[name], values, rtol=0, atol=1e-12, err_msg=name)


def test_a_checkpoint_of_the_array_api_goes_on_in_optax() -> None:
    backend = JaxBackend("cpu", "float64")
    ours, theirs = backend.adamw(weight_decay=0.3), AdamW(np, weight_decay=0.3)
    parameters = {"kernel": np.full((2, 2), 0.5), "bias": np.asarray([1.0, -1.0])}
    gradients = {"kernel": np.asarray([[1.0, -2.0], [0.5, 0.1]]), "bias": np.asarray([0.3, 0.2])}
    half_way = theirs.update(parameters, gradients, theirs.init(parameters), 0.1)
    expected, _ = theirs.update(half_way[0], gradients, half_way[1], 0.1)
    moved = [{name: backend.asarray(values) for name, values in part.items()} for part in (half_way[0], gradients)]
    state = {name: backend.asarray(values) for name, values in half_way[1].items()}
    result, _ = ours.update(*moved, state, 0.1)
    for name, values in expected.items():
        np.testing.assert_allclose(result[name], values, rtol=0, atol=1e-14)


def test_products_of_a_compiled_function_are_in_full_precision() -> None:
    # No CPU rounds the factors, so the compiler's own words have to do.
    backend = JaxBackend("cpu")
    product = backend.compile(lambda x: x @ x)
    text = product.lower(jnp.ones((2, 2), dtype=jnp.float32)).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in text
    assert "HIGHEST" not in jax.jit(lambda x: x @ x).lower(jnp.ones((2, 2), dtype=jnp.float32)).as_text()


def test_float64_switches_the_wide_types_on() -> None:
    with jax.enable_x64(False):
        assert JaxBackend("cpu").asarray(np.arange(3)).dtype == "int32"
        assert JaxBackend("cpu").asarray(np.arange(3.0)).dtype == "float32"
    assert JaxBackend("cpu", "float64").asarray(np.arange(3)).dtype == "int64"
    assert jax.config.jax_enable_x64


def test_devices() -> None:
    assert JaxBackend("cpu").device == JaxBackend("cpu:0").device == "cpu:0"
    assert JaxBackend("cpu").asarray([1.0]).device == jax.devices("cpu")[0]
    for bad in ("abacus", "cpu:99", "cpu:first", "cpu:-1"):
        with pytest.raises(ValueError, match=rf"^device must be one of JAX's \(.*\), got '{bad}'$"):
            JaxBackend(bad)


def test_the_conv_model_wants_its_own_architecture() -> None:
    with pytest.raises(ValueError, match=r"^architecture must be 'conv' for ConvModel, got 'mlp'$"):
        ConvModel(MLP)
