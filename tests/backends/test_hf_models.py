"""CLIP and SigLIP of the backends against the library `transformers`, features and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from drrho_clip.models import ModelSpec, initial_parameters, parameter_shapes
from drrho_core.backend import get_backend

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = TOWER | {"vocab_size": 30, "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": 29}
# The side of the image is no multiple of the patch, as in some models with 14-pixel patches.
IMAGE = TOWER | {"image_size": 18, "patch_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip", "text_config": TEXT, "vision_config": IMAGE, "projection_dim": 12},
    "clip-old": {
        "model_type": "clip",
        "text_config": TEXT | {"eos_token_id": 2, "hidden_act": "gelu", "num_hidden_layers": 2},
        "vision_config": IMAGE | {"hidden_size": 24, "num_attention_heads": 3},
        "projection_dim": 12,
    },
    "siglip": {"model_type": "siglip", "text_config": TEXT, "vision_config": IMAGE},
}


class Reference:
    """Features and gradients by `transformers` and autograd alone, in float64."""

    def __init__(self, name: str) -> None:
        self.config = CONFIGS[name]
        self.spec = ModelSpec.of_hugging_face(self.config)
        classes: dict[str, tuple[Any, Any]] = {
            "clip": (transformers.CLIPConfig, transformers.CLIPModel),
            "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
        }
        build_config, build_model = classes[self.config["model_type"]]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build_model(build_config.from_dict(self.config)).double().eval()
            # Fresh biases and norms are 0 and 1, which would hide a parameter that is not used.
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        rng = np.random.default_rng(0)
        self.images = rng.standard_normal((3, 18, 18, 3))
        self.texts = rng.integers(1, 29, (3, 9)).astype(np.int32)
        # The end token stands at different places, and twice in the first text.
        self.texts[[0, 0, 1, 2], [3, 7, 8, 0]] = 29
        self.gradients = rng.standard_normal((2, 3, self.spec.feature_dim))
        pixels = torch.asarray(self.images).permute(0, 3, 1, 2)
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=torch.asarray(self.texts)).pooler_output
        features = [rows / rows.norm(dim=1, keepdim=True) for rows in (image, text)]
        torch.autograd.backward(features, [torch.asarray(gradient) for gradient in self.gradients])
        self.features = [rows.detach().numpy() for rows in features]
        named = {name: parameter for name, parameter in model.named_parameters() if not name.startswith("logit_")}
        self.parameters = {name: parameter.detach().numpy() for name, parameter in named.items()}
        self.parameter_gradients = {name: parameter.grad.numpy() for name, parameter in named.items()}


@pytest.fixture(scope="module", params=list(CONFIGS))
def reference(request: pytest.FixtureRequest) -> Reference:
    return Reference(request.param)


def test_names_and_shapes_are_those_of_transformers(reference: Reference) -> None:
    assert parameter_shapes(reference.spec) == {name: array.shape for name, array in reference.parameters.items()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_features_and_gradients_equal_those_of_transformers(name: str, dtype: str, reference: Reference) -> None:
    backend = get_backend(name, device="cpu", dtype=dtype)
    model = backend.model(reference.spec)
    parameters = {key: backend.asarray(array) for key, array in reference.parameters.items()}
    images, texts = backend.asarray(reference.images), backend.asarray(reference.texts)

    def both(parameters: Any, images: Any, texts: Any, image_gradient: Any, text_gradient: Any) -> Any:
        image, text, pullback = model.encode(parameters, images, texts)
        return image, text, pullback(image_gradient, text_gradient)

    image, text, gradients = backend.compile(both)(
        parameters, images, texts, *map(backend.asarray, reference.gradients)
    )
    of_features, of_gradients = (1e-5, 1e-4) if dtype == "float32" else (1e-10, 1e-10)
    for features, expected in zip((image, text), reference.features, strict=True):
        assert backend.to_numpy(features).dtype == dtype
        np.testing.assert_allclose(backend.to_numpy(features), expected, atol=of_features, rtol=0)
    assert gradients.keys() == reference.parameter_gradients.keys()
    largest = max(np.abs(gradient).max() for gradient in reference.parameter_gradients.values())
    for key, expected in reference.parameter_gradients.items():
        bound = of_gradients * max(1.0, largest)
        np.testing.assert_allclose(backend.to_numpy(gradients[key]), expected, atol=bound, rtol=0, err_msg=key)


def test_each_encoder_alone_gives_the_same_features(reference: Reference) -> None:
    # JAX's `encode` calls these methods itself.
    backend = get_backend("torch", device="cpu", dtype="float64")
    model = backend.model(reference.spec)
    parameters = {key: backend.asarray(array) for key, array in reference.parameters.items()}
    image = model.encode_images(parameters, backend.asarray(reference.images))
    text = model.encode_texts(parameters, backend.asarray(reference.texts))
    for features, expected in zip((image, text), reference.features, strict=True):
        np.testing.assert_allclose(backend.to_numpy(features), expected, atol=1e-10, rtol=0)


def test_initial_parameters_have_the_spread_of_transformers(reference: Reference) -> None:
    classes: dict[str, Any] = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}
    configs: dict[str, Any] = {"clip": transformers.CLIPConfig, "siglip": transformers.SiglipConfig}
    kind = reference.config["model_type"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = classes[kind](configs[kind].from_dict(reference.config)).state_dict()
    for name, array in initial_parameters(reference.spec, seed=0).items():
        if array.size >= 100 or not array.any() or (array == 1.0).all():
            expected = theirs[name].numpy()
            assert array.std() == pytest.approx(expected.std(), rel=0.3), name
            assert array.mean() == pytest.approx(expected.mean(), abs=float(0.3 * expected.std()) + 1e-12), name
