"""The hand-written gradient of the perceptrons on every namespace, against finite differences and autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drrho_clip.models import MLPModel, ModelSpec, initial_parameters, perceptron, unit_norm

SPEC = ModelSpec("mlp", image_size=4, channels=2, vocabulary_size=9, context_length=5, feature_dim=6, width=3, depth=2)


def problem() -> dict[str, Any]:
    """An asymmetric problem: different sizes of images and texts, and biases that are not zero."""
    generator = np.random.default_rng(11)
    parameters = initial_parameters(SPEC, seed=5)
    return {
        "parameters": {name: p + 0.1 * generator.standard_normal(p.shape) for name, p in parameters.items()},
        "images": generator.uniform(-1, 1, (7, 4, 4, 2)),
        "texts": generator.poisson(0.7, (7, 9)).astype(np.float64),
        "image_gradient": generator.standard_normal((7, 6)),
        "text_gradient": generator.standard_normal((7, 6)),
    }


def test_unit_norm_pullback_is_its_jacobian() -> None:
    generator = np.random.default_rng(1)
    x, dy = generator.standard_normal((2, 3, 5))
    y, pullback = unit_norm(x, xp=np)
    np.testing.assert_allclose(np.sum(y * y, axis=1), 1.0, rtol=1e-15)
    # the Jacobian of x / |x|, written out: (I - y y^T) / |x|
    expected = [(np.eye(5) - np.outer(u, u)) @ g / np.linalg.norm(v) for u, g, v in zip(y, dy, x, strict=True)]
    np.testing.assert_allclose(pullback(dy), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_of_zeros_stays_zeros(dtype: type) -> None:
    y, pullback = unit_norm(np.zeros((2, 3), dtype=dtype), xp=np)
    assert np.array_equal(y, np.zeros((2, 3)))
    assert np.all(np.isfinite(pullback(np.ones((2, 3), dtype=dtype))))


def test_relu_hides_no_nan() -> None:
    parameters = {"a/kernel": np.eye(2), "a/bias": np.zeros(2), "b/kernel": np.eye(2), "b/bias": np.zeros(2)}
    y, _ = perceptron(parameters, ["a", "b"], np.asarray([[np.nan, -1.0]]), xp=np)
    assert np.isnan(y).all()


def test_gradient_matches_finite_differences() -> None:
    p = problem()
    model = MLPModel(SPEC, np)
    gradients = model.encode(p["parameters"], p["images"], p["texts"])[2](p["image_gradient"], p["text_gradient"])

    def value(parameters: dict[str, np.ndarray]) -> float:
        image_features, text_features, _ = model.encode(parameters, p["images"], p["texts"])
        return float(np.sum(image_features * p["image_gradient"]) + np.sum(text_features * p["text_gradient"]))

    step = 1e-6
    for name, parameter in p["parameters"].items():
        numeric = np.empty(parameter.shape)
        for index in np.ndindex(parameter.shape):
            up, down = parameter.copy(), parameter.copy()
            up[index] += step
            down[index] -= step
            numeric[index] = value({**p["parameters"], name: up}) - value({**p["parameters"], name: down})
        # central differences in float64: truncation about step**2, rounding about 1e-16 / step
        np.testing.assert_allclose(gradients[name], numeric / (2 * step), rtol=1e-7, atol=3e-9, err_msg=name)


def test_gradient_matches_autograd() -> None:
    torch = pytest.importorskip("torch")
    p = problem()
    gradients = MLPModel(SPEC, np).encode(p["parameters"], p["images"], p["texts"])[2](
        p["image_gradient"], p["text_gradient"]
    )
    leaves = {name: torch.tensor(values, requires_grad=True) for name, values in p["parameters"].items()}
    total = 0.0
    for side, x in (("image", p["images"].reshape(7, -1)), ("text", p["texts"])):
        x = torch.tensor(x)
        for layer in ("layer0", "layer1"):
            x = torch.relu(x @ leaves[f"{side}/{layer}/kernel"] + leaves[f"{side}/{layer}/bias"])
        x = x @ leaves[f"{side}/projection/kernel"] + leaves[f"{side}/projection/bias"]
        x = torch.nn.functional.normalize(x, dim=1)
        total = total + (x * torch.tensor(p[f"{side}_gradient"])).sum()
    expected = torch.autograd.grad(total, list(leaves.values()))
    for name, gradient in zip(leaves, expected, strict=True):
        np.testing.assert_allclose(gradients[name], gradient.numpy(), rtol=1e-12, atol=1e-14, err_msg=name)


def test_every_namespace_returns_the_same_numbers(space: Any) -> None:
    p = problem()
    expected_images, expected_texts, pullback = MLPModel(SPEC, np).encode(p["parameters"], p["images"], p["texts"])
    expected = pullback(p["image_gradient"], p["text_gradient"])
    model = MLPModel(SPEC, space.xp)
    names = list(p["parameters"])

    def both_ways(images: Any, texts: Any, image_gradient: Any, text_gradient: Any, *values: Any) -> Any:
        parameters = dict(zip(names, values, strict=True))
        image_features, text_features, pull = model.encode(parameters, images, texts)
        gradients = pull(image_gradient, text_gradient)
        return image_features, text_features, *[gradients[name] for name in names]

    arrays = [p["images"], p["texts"], p["image_gradient"], p["text_gradient"], *p["parameters"].values()]
    results = space.run(both_ways, *map(space.asarray, arrays))
    assert all(result.dtype == space.dtype for result in results)
    for name, result, value in zip(
        ["image_features", "text_features", *names],
        results,
        [expected_images, expected_texts, *expected.values()],
        strict=True,
    ):
        scale = max(1.0, float(np.max(np.abs(value))))
        np.testing.assert_allclose(space.to_numpy(result), value, rtol=0, atol=space.unit * scale, err_msg=name)


def test_a_tower_alone_returns_the_features_of_the_pair() -> None:
    p = problem()
    model = MLPModel(SPEC, np)
    image_features, text_features, _ = model.encode(p["parameters"], p["images"], p["texts"])
    assert np.array_equal(model.encode_images(p["parameters"], p["images"]), image_features)
    assert np.array_equal(model.encode_texts(p["parameters"], p["texts"]), text_features)


def test_bad_input_is_refused() -> None:
    p = problem()
    with pytest.raises(ValueError, match=r"^architecture must be 'mlp' or 'heads' for MLPModel, got 'conv'$"):
        MLPModel(ModelSpec("conv", image_size=4, channels=2, vocabulary_size=9, context_length=5), np)
    model = MLPModel(SPEC, np)
    with pytest.raises(ValueError, match=r"^images must have shape \(b, 4, 4, 2\), got \(7, 4, 2, 4\)$"):
        model.encode(p["parameters"], p["images"].transpose(0, 1, 3, 2), p["texts"])
    with pytest.raises(ValueError, match=r"^texts must have shape \(b, 9\), got \(7, 8\)$"):
        model.encode_texts(p["parameters"], p["texts"][:, :8])
