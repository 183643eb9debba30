"""The contract that every backend must keep; ``backends/README.md`` explains how to add a backend.

A new backend is one line in `BACKENDS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from drrho_clip.models import ARCHITECTURES, LAYER_NORM_EPSILON, ModelSpec, initial_parameters
from drrho_core.backend import Backend, Parameters, get_backend


def _strict(dtype: str, device: str) -> Backend:
    import array_api_strict
    from drrho_numpy import NumpyBackend

    return NumpyBackend(array_api_strict.Device(device), dtype, xp=array_api_strict)


BACKENDS: dict[str, Callable[[str], Backend]] = {
    "numpy": lambda dtype: get_backend("numpy", dtype=dtype),
    "strict": lambda dtype: _strict(dtype, "CPU_DEVICE"),
    "strict-device1": lambda dtype: _strict(dtype, "device1"),
    "torch": lambda dtype: get_backend("torch", device="cpu", dtype=dtype),
    "torch-cuda": lambda dtype: get_backend("torch", device="cuda", dtype=dtype),
    "jax": lambda dtype: get_backend("jax", device="cpu", dtype=dtype),
    "cupy": lambda dtype: get_backend("cupy", dtype=dtype),
}
ACCELERATORS = ("torch-cuda", "jax-gpu", "cupy")

SPECS = {
    "mlp": ModelSpec("mlp", image_size=5, channels=2, vocabulary_size=9, context_length=6, feature_dim=6, width=4),
    "conv": ModelSpec(
        "conv", image_size=9, channels=2, vocabulary_size=9, context_length=6, feature_dim=6, width=4, heads=2
    ),
}
UNIT = {"float64": 1e-12, "float32": 5e-6}


def _build(name: str, dtype: str) -> Backend:
    """Build a backend. A missing accelerator skips the test; a missing CPU library fails it if CI is set."""
    try:
        return BACKENDS[name](dtype)
    except (ImportError, ValueError) as error:
        if name in ACCELERATORS:
            pytest.skip(f"{name} needs an accelerator and its library: {error}")
        if isinstance(error, ImportError) and not os.environ.get("CI"):
            pytest.skip(f"{name}: {error}")
        raise


def _cases(*dtypes: str) -> list[Any]:
    return [
        pytest.param((name, dtype), id=f"{name}-{dtype}", marks=[pytest.mark.gpu] if name in ACCELERATORS else [])
        for name in BACKENDS
        for dtype in dtypes
    ]


@pytest.fixture(scope="module", params=_cases("float64", "float32"))
def backend(request: pytest.FixtureRequest) -> Backend:
    return _build(*request.param)


@pytest.fixture(scope="module", params=_cases("float64"))
def backend64(request: pytest.FixtureRequest) -> Backend:
    return _build(*request.param)


class Problem:
    """An asymmetric batch for an architecture in NumPy float64; `on` moves it to a backend."""

    def __init__(self, architecture: str) -> None:
        self.spec = SPECS[architecture]
        generator = np.random.default_rng(7)
        self.parameters = {
            name: values + 0.1 * generator.standard_normal(values.shape)
            for name, values in initial_parameters(self.spec, seed=1).items()
        }
        b, side = 5, self.spec.image_size
        self.images = generator.uniform(-1, 1, (b, side, side, self.spec.channels))
        if self.spec.text_input == "tokens":
            tokens = generator.integers(1, self.spec.vocabulary_size, (b, self.spec.context_length))
            lengths = np.asarray([6, 1, 3, 5, 2])
            self.texts = np.where(np.arange(self.spec.context_length) < lengths[:, None], tokens, 0).astype(np.int32)
        else:
            self.texts = generator.poisson(0.6, (b, self.spec.vocabulary_size)).astype(np.float64)
        self.gradients = generator.standard_normal((2, b, self.spec.feature_dim))

    def on(self, backend: Backend) -> tuple[Any, dict[str, Any], Any, Any]:
        """Return the backend's model, parameters, images and texts; skip if the backend lacks the architecture."""
        if self.spec.architecture not in backend.architectures:
            pytest.skip(f"the {backend.name} backend has no {self.spec.architecture} encoders")
        if (backend.name, backend.dtype, self.spec.architecture) == ("jax", "float32", "conv"):
            pytest.skip("test_jax_backend.py compares results, gradients and dtypes of this model with torch")
        parameters = {name: backend.asarray(values) for name, values in self.parameters.items()}
        return backend.model(self.spec), parameters, backend.asarray(self.images), backend.asarray(self.texts)


@pytest.fixture(scope="module", params=list(SPECS))
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def to_numpy(backend: Backend, arrays: Parameters) -> dict[str, np.ndarray]:
    return {name: backend.to_numpy(array) for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("source", ["float16", "float32", "float64"])
def test_floating_arrays_come_in_the_dtype_of_the_backend(backend: Backend, source: str) -> None:
    for values in (np.asarray([[0.1, -2.5], [3.0, np.inf]]), np.asarray(0.1), np.zeros((0, 3))):
        values = values.astype(source)
        back = backend.to_numpy(backend.asarray(values))
        assert type(back) is np.ndarray
        assert back.dtype == backend.dtype
        assert np.array_equal(back, values.astype(backend.dtype))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_arrays_that_are_not_floating_keep_their_dtype(backend: Backend, dtype: str) -> None:
    values = np.asarray([[0, 1, 2], [3, 0, 1]]).astype(dtype)
    back = backend.to_numpy(backend.asarray(values))
    assert back.dtype == dtype
    assert np.array_equal(back, values)


def test_wide_integers_stay_integers(backend: Backend) -> None:
    back = backend.to_numpy(backend.asarray(np.asarray([-1, 2**30], dtype=np.int64)))  # JAX may narrow them
    assert back.dtype.kind == "i"
    assert back.tolist() == [-1, 2**30]


def test_lists_views_and_read_only_arrays_are_accepted(backend: Backend) -> None:
    values = np.arange(6.0).reshape(2, 3)
    values.flags.writeable = False
    for host in (values, values.T, values[:, ::-1], values.tolist()):
        assert np.array_equal(backend.to_numpy(backend.asarray(host)), host)


def test_no_memory_is_shared(backend: Backend) -> None:
    source = np.ones(3, dtype=backend.dtype)
    array = backend.asarray(source)
    source[0] = 7
    first = backend.to_numpy(array)
    first[1] = 7
    assert backend.to_numpy(array).tolist() == [1.0, 1.0, 1.0]


def test_arrays_belong_to_the_namespace(backend: Backend) -> None:
    array = backend.asarray(np.ones((2, 3)))
    assert array.dtype == getattr(backend.xp, backend.dtype)
    assert np.array_equal(backend.to_numpy(backend.xp.sum(array, axis=0)), [2.0, 2.0, 2.0])


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("strict", "strict-device1")])
def test_a_bad_device_or_dtype_is_refused(name: str) -> None:
    backend = _build(name, "float64")
    with pytest.raises(ValueError, match=r"^device must be .*, got 'abacus:3'"):
        get_backend(backend.name, device="abacus:3")
    with pytest.raises(ValueError, match=r"^dtype must be 'float32' or 'float64', got 'float16'$"):
        type(backend)(dtype="float16")


# ------------------------------------------------------------------------------------------------------------ models


def test_architectures_lists_the_models_that_a_backend_builds(backend: Backend) -> None:
    assert {"mlp"} <= set(backend.architectures) <= set(ARCHITECTURES)
    for name, spec in SPECS.items():
        if name in backend.architectures:
            backend.model(spec)
        else:
            message = rf"^architecture must be 'mlp' for the {backend.name} backend, got '{name}'$"
            with pytest.raises(ValueError, match=message):
                backend.model(spec)


@pytest.mark.parametrize("name", list(BACKENDS))
def test_a_backend_says_whether_it_has_a_gpu(name: str) -> None:
    assert _build(name, "float32").has_gpu is (name in ACCELERATORS)


def test_initial_parameters_are_converted_without_change(backend: Backend, problem: Problem) -> None:
    for name, values in initial_parameters(problem.spec, seed=3).items():
        assert np.array_equal(backend.to_numpy(backend.asarray(values)), values.astype(backend.dtype)), name


def test_features_match_the_formulas_in_numpy(backend: Backend, problem: Problem) -> None:
    model, parameters, images, texts = problem.on(backend)
    image_features, text_features, _ = model.encode(parameters, images, texts)
    for features, expected in (
        (image_features, expected_images(problem)),
        (text_features, expected_texts(problem)),
    ):
        assert features.dtype == getattr(backend.xp, backend.dtype)
        np.testing.assert_allclose(backend.to_numpy(features), expected, rtol=0, atol=UNIT[backend.dtype])


def test_features_have_unit_norm(backend: Backend, problem: Problem) -> None:
    model, parameters, images, texts = problem.on(backend)
    for features in model.encode(parameters, images, texts)[:2]:
        norms = np.linalg.norm(backend.to_numpy(features).astype(np.float64), axis=1)
        np.testing.assert_allclose(norms, 1.0, rtol=0, atol=UNIT[backend.dtype])


def test_an_encoder_alone_returns_the_features_of_the_pair(backend: Backend, problem: Problem) -> None:
    model, parameters, images, texts = problem.on(backend)
    image_features, text_features, _ = model.encode(parameters, images, texts)
    alone = model.encode_images(parameters, images), model.encode_texts(parameters, texts)
    for features, expected in zip(alone, (image_features, text_features), strict=True):
        # another kernel may run where no gradient is wanted
        np.testing.assert_allclose(
            backend.to_numpy(features), backend.to_numpy(expected), rtol=0, atol=UNIT[backend.dtype]
        )


def test_features_require_no_gradient(backend: Backend, problem: Problem) -> None:
    model, parameters, images, texts = problem.on(backend)
    image_features, text_features, _ = model.encode(parameters, images, texts)
    alone = model.encode_images(parameters, images), model.encode_texts(parameters, texts)
    for features in (image_features, text_features, *alone):
        assert not getattr(features, "requires_grad", False)


def test_padding_is_never_read(backend64: Backend) -> None:
    backend = backend64
    problem = Problem("conv")
    model, parameters, _, _ = problem.on(backend)
    short = problem.texts[[1, 2, 4], :3]  # at most three tokens long: the rest is padding
    features = model.encode_texts(parameters, backend.asarray(short))
    np.testing.assert_allclose(
        backend.to_numpy(features), expected_texts(problem)[[1, 2, 4]], rtol=0, atol=UNIT[backend.dtype]
    )


def test_pullback_matches_finite_differences(backend64: Backend, problem: Problem) -> None:
    backend = backend64
    model, parameters, images, texts = problem.on(backend)
    upstream = [backend.asarray(gradient) for gradient in problem.gradients]
    gradients = to_numpy(backend, model.encode(parameters, images, texts)[2](*upstream))
    assert {name: values.shape for name, values in gradients.items()} == {
        name: values.shape for name, values in problem.parameters.items()
    }

    def value(changed: dict[str, np.ndarray]) -> float:
        arrays = {**parameters, **{name: backend.asarray(values) for name, values in changed.items()}}
        features = model.encode_images(arrays, images), model.encode_texts(arrays, texts)
        return sum(float(np.sum(backend.to_numpy(f) * g)) for f, g in zip(features, problem.gradients, strict=True))

    generator = np.random.default_rng(0)
    step = 1e-6
    for name, values in problem.parameters.items():
        direction = generator.standard_normal(values.shape)
        numeric = (value({name: values + step * direction}) - value({name: values - step * direction})) / (2 * step)
        # central differences in float64: truncation about step**2, rounding about 1e-16 / step, sums of both
        assert float(np.sum(gradients[name] * direction)) == pytest.approx(numeric, rel=1e-7, abs=1e-8), name


def test_gradients_have_the_dtype_of_the_backend(backend: Backend, problem: Problem) -> None:
    model, parameters, images, texts = problem.on(backend)
    gradients = model.encode(parameters, images, texts)[2](*[backend.asarray(g) for g in problem.gradients])
    assert all(gradient.dtype == getattr(backend.xp, backend.dtype) for gradient in gradients.values())


def test_encoding_is_pure_and_repeats_bit_by_bit(backend: Backend, problem: Problem) -> None:
    model, parameters, images, texts = problem.on(backend)
    upstream = [backend.asarray(gradient) for gradient in problem.gradients]
    runs = []
    for _ in range(2):
        image_features, text_features, pullback = model.encode(parameters, images, texts)
        everything = {"images": image_features, "texts": text_features, **pullback(*upstream)}
        runs.append(to_numpy(backend, everything))
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])
    for name, values in to_numpy(backend, parameters).items():
        assert np.array_equal(values, problem.parameters[name].astype(backend.dtype)), name
    assert np.array_equal(backend.to_numpy(images), problem.images.astype(backend.dtype))
    assert np.array_equal(backend.to_numpy(texts), problem.texts)


def test_inputs_of_another_shape_are_refused(backend: Backend, problem: Problem) -> None:
    model, parameters, images, texts = problem.on(backend)
    side, channels = problem.spec.image_size, problem.spec.channels
    turned = backend.asarray(problem.images.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=rf"^images must have shape \(b, {side}, {side}, {channels}\), got \(5, "):
        model.encode(parameters, turned, texts)
    with pytest.raises(ValueError, match=rf"^images must have shape \(b, {side}, {side}, {channels}\), got \(5, "):
        model.encode_images(parameters, turned)
    wide = backend.asarray(np.concatenate([problem.texts, problem.texts], axis=1))
    with pytest.raises(ValueError, match=r"^texts must have shape \(b, .*\), got \(5, "):
        model.encode(parameters, images, wide)
    with pytest.raises(ValueError, match=r"^texts must have shape \(b, .*\), got \(5, "):
        model.encode_texts(parameters, wide)


# --------------------------------------------------------------------------------------------------------- optimiser

SETTINGS = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3}
SHAPES = {"kernel": (3, 4), "bias": (4,), "filters": (2, 3, 3, 3)}
STEPS = 10


def optimisation() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]], list[float]]:
    generator = np.random.default_rng(3)
    parameters = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    gradients = [{name: generator.standard_normal(shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]
    return parameters, gradients, generator.uniform(0.01, 0.3, STEPS).tolist()


def expected_adamw(steps: int) -> dict[str, np.ndarray]:
    """AdamW with the moments written as sums over all past gradients instead of recursions."""
    parameters, gradients, rates = optimisation()
    decay, beta1, beta2 = SETTINGS["weight_decay"], SETTINGS["beta1"], SETTINGS["beta2"]
    for name in SHAPES:
        for k in range(1, steps + 1):
            past = [(k - i, gradients[i - 1][name]) for i in range(1, k + 1)]
            m = sum((1 - beta1) * beta1**age * g for age, g in past) / (1 - beta1**k)
            v = sum((1 - beta2) * beta2**age * g**2 for age, g in past) / (1 - beta2**k)
            shrink = 1 - rates[k - 1] * decay if name != "bias" else 1.0
            parameters[name] = parameters[name] * shrink - rates[k - 1] * m / (np.sqrt(v) + SETTINGS["epsilon"])
    return parameters


def run_adamw(
    backend: Backend, parameters: Parameters, state: Parameters, first: int, last: int
) -> tuple[Parameters, Parameters]:
    optimizer = backend.adamw(**SETTINGS)
    _, gradients, rates = optimisation()
    for step in range(first, last):
        on_device = {name: backend.asarray(values) for name, values in gradients[step].items()}
        parameters, state = optimizer.update(parameters, on_device, state, rates[step])
    return parameters, state


def start_adamw(backend: Backend) -> tuple[Parameters, Parameters]:
    parameters = {name: backend.asarray(values) for name, values in optimisation()[0].items()}
    return parameters, backend.adamw(**SETTINGS).init(parameters)


def test_adamw_matches_the_formula(backend: Backend) -> None:
    parameters, state = run_adamw(backend, *start_adamw(backend), 0, STEPS)
    assert int(state["step"]) == STEPS
    for name, expected in expected_adamw(STEPS).items():
        np.testing.assert_allclose(
            backend.to_numpy(parameters[name]), expected, rtol=0, atol=UNIT[backend.dtype], err_msg=name
        )


def test_adamw_accepts_the_learning_rate_as_an_array(backend: Backend) -> None:
    gradients = {name: backend.asarray(values) for name, values in optimisation()[1][0].items()}
    rate = optimisation()[2][0]
    optimizer = backend.adamw(**SETTINGS)
    with_array, _ = optimizer.update(*_with(start_adamw(backend), gradients), backend.asarray(np.asarray(rate)))
    for name, expected in expected_adamw(1).items():
        np.testing.assert_allclose(
            backend.to_numpy(with_array[name]), expected, rtol=0, atol=UNIT[backend.dtype], err_msg=name
        )


def _with(start: tuple[Parameters, Parameters], gradients: Parameters) -> tuple[Parameters, Parameters, Parameters]:
    return start[0], gradients, start[1]


def test_adamw_state_has_the_common_names(backend: Backend) -> None:
    parameters, state = start_adamw(backend)
    expected = {"step", *[f"{kind}_moment/{name}" for kind in ("first", "second") for name in parameters]}
    assert set(state) == expected
    _, state = run_adamw(backend, parameters, state, 0, 2)
    assert set(state) == expected
    assert backend.to_numpy(state["step"]).dtype == np.int32
    assert backend.to_numpy(state["step"]).shape == ()
    assert all(backend.to_numpy(state[name]).dtype == backend.dtype for name in expected - {"step"})


def test_adamw_continues_from_a_checkpoint_bit_by_bit(backend: Backend) -> None:
    straight, _ = run_adamw(backend, *start_adamw(backend), 0, STEPS)
    saved = [to_numpy(backend, arrays) for arrays in run_adamw(backend, *start_adamw(backend), 0, 4)]
    loaded = [{name: backend.asarray(values) for name, values in arrays.items()} for arrays in saved]
    resumed, _ = run_adamw(backend, loaded[0], loaded[1], 4, STEPS)
    for name in SHAPES:
        assert np.array_equal(backend.to_numpy(resumed[name]), backend.to_numpy(straight[name])), name


def test_adamw_continues_from_a_checkpoint_of_another_backend(backend: Backend) -> None:
    numpy = get_backend("numpy", dtype=backend.dtype)
    saved = [to_numpy(numpy, arrays) for arrays in run_adamw(numpy, *start_adamw(numpy), 0, 4)]
    loaded = [{name: backend.asarray(values) for name, values in arrays.items()} for arrays in saved]
    parameters, _ = run_adamw(backend, loaded[0], loaded[1], 4, STEPS)
    for name, expected in expected_adamw(STEPS).items():
        np.testing.assert_allclose(
            backend.to_numpy(parameters[name]), expected, rtol=0, atol=UNIT[backend.dtype], err_msg=name
        )


def test_adamw_refuses_bad_settings(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"^weight_decay must be >= 0, got -1\.0$"):
        backend.adamw(weight_decay=-1.0)
    with pytest.raises(ValueError, match=r"^beta2 must be in \[0, 1\), got 1\.0$"):
        backend.adamw(weight_decay=0.0, beta2=1.0)


# ----------------------------------------------------------------------------------------------------------- compile


def test_compiling_keeps_results(backend64: Backend, problem: Problem) -> None:
    backend = backend64
    model, parameters, images, texts = problem.on(backend)
    upstream = [backend.asarray(gradient) for gradient in problem.gradients]

    def step(parameters: Any, images: Any, texts: Any) -> Any:
        image_features, text_features, pullback = model.encode(parameters, images, texts)
        return image_features, text_features, pullback(*upstream)

    compiled = backend.compile(step)
    eager = step(parameters, images, texts)
    for _ in range(2):
        results = compiled(parameters, images, texts)
        for result, expected in zip(results[:2], eager[:2], strict=True):
            np.testing.assert_allclose(
                backend.to_numpy(result), backend.to_numpy(expected), rtol=0, atol=UNIT[backend.dtype]
            )
        for name, expected in to_numpy(backend, eager[2]).items():
            scale = max(1.0, float(np.max(np.abs(expected))))
            np.testing.assert_allclose(
                backend.to_numpy(results[2][name]), expected, rtol=0, atol=UNIT[backend.dtype] * scale, err_msg=name
            )


# ---------------------------------------------------------------------------- the formulas once more, in plain NumPy


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def linear(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def layer_norm(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    x = (x - np.mean(x)) / np.sqrt(np.var(x) + LAYER_NORM_EPSILON)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def perceptron(p: dict[str, np.ndarray], side: str, depth: int, x: np.ndarray) -> np.ndarray:
    for layer in range(depth):
        x = np.maximum(linear(p, f"{side}/layer{layer}", x), 0.0)
    return unit(linear(p, f"{side}/projection", x))


def expected_images(problem: Problem) -> np.ndarray:
    p, spec = problem.parameters, problem.spec
    if spec.architecture == "mlp":
        return perceptron(p, "image", spec.depth, problem.images.reshape(len(problem.images), -1))
    return np.stack([unit(linear(p, "image/projection", convolve(p, image).reshape(-1))) for image in problem.images])


def convolve(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return three convolutions of an image (s, s, C), computed pixel by pixel."""
    for layer in range(3):
        kernel, bias = p[f"image/conv{layer}/kernel"], p[f"image/conv{layer}/bias"]
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        side = -(-x.shape[0] // 2)
        y = np.empty((side, side, len(bias)))
        for row in range(side):
            for column in range(side):
                patch = padded[2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                y[row, column] = np.einsum("rci,oirc->o", patch, kernel) + bias
        x = np.maximum(y, 0.0)
    return x


def expected_texts(problem: Problem) -> np.ndarray:
    p, spec = problem.parameters, problem.spec
    if spec.architecture == "mlp":
        return perceptron(p, "text", spec.depth, problem.texts)
    return np.stack([transform(p, spec, tokens[tokens != 0]) for tokens in problem.texts])


def transform(p: dict[str, np.ndarray], spec: ModelSpec, tokens: np.ndarray) -> np.ndarray:
    """Return the feature of a text without padding, computed token by token and head by head."""
    width = spec.text_width
    size = width // spec.heads
    x = p["text/tokens"][tokens] + p["text/positions"][: len(tokens)]
    for block in range(spec.depth):
        name = f"text/block{block}/attention"
        qkv = np.stack([linear(p, f"{name}/query_key_value", layer_norm(p, f"{name}/norm", row)) for row in x])
        mixed = np.empty_like(x)
        for head in range(spec.heads):
            part = slice(head * size, (head + 1) * size)
            query, key, value = (qkv[:, kind * width : (kind + 1) * width][:, part] for kind in range(3))
            for row in range(len(x)):
                weights = np.exp(key @ query[row] / np.sqrt(size))
                mixed[row, part] = weights @ value / np.sum(weights)
        x = x + linear(p, f"{name}/output", mixed)
        name = f"text/block{block}/feed_forward"
        hidden = np.stack([linear(p, f"{name}/hidden", layer_norm(p, f"{name}/norm", row)) for row in x])
        x = x + linear(p, f"{name}/output", np.maximum(hidden, 0.0))
    return unit(linear(p, "text/projection", layer_norm(p, "text/norm", np.mean(x, axis=0))))
