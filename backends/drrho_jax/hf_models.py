"""CLIP and SigLIP of the Hugging Face hub in JAX, as pure functions of a flat mapping of arrays.

The parameters have the names and shapes of `transformers` (`drrho_clip.models.hf_parameters`), so weights go in both
directions through safetensors. Shapes: batch b, image side s, C channels, L tokens per text, n tokens of either kind,
w numbers per token, feature_dim d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from drrho_clip.models import NORM_EPSILON, ModelSpec
from drrho_clip.models.hf_config import TowerSizes
from drrho_core.backend import Parameters, Pullback
from drrho_jax.pullback import with_pullback

Array = jax.Array


def _quick_gelu(x: Array) -> Array:
    """Return ``x sigmoid(1.702 x)``, an approximation of gelu with which CLIP was trained."""
    return x * jax.nn.sigmoid(1.702 * x)


_TANH_GELU = partial(jax.nn.gelu, approximate=True)
# The activations by their names in config.json; two names stand for the approximation of gelu by tanh.
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": _quick_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_new": _TANH_GELU,
    "relu": jax.nn.relu,
}


class HuggingFaceModel:
    """CLIP or SigLIP; see `drrho_core.backend.Model`.

    Parameters
    ----------
    spec : ModelSpec
        The encoders, with architecture ``"hf"``.

    Raises
    ------
    ValueError
        If the architecture is another, or an activation is unknown; in the methods, if images or texts do not have the
        shape of the spec.

    Examples
    --------
    >>> from drrho_clip.models import initial_parameters
    >>> tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> text, image = tower | {"vocab_size": 9, "eos_token_id": 8}, tower | {"image_size": 8, "patch_size": 4}
    >>> spec = ModelSpec.of_hugging_face({"model_type": "clip", "text_config": text, "vision_config": image})
    >>> parameters = {name: jnp.asarray(value) for name, value in initial_parameters(spec, seed=0).items()}
    >>> HuggingFaceModel(spec).encode_texts(parameters, jnp.asarray([[1, 2, 8], [4, 8, 8]])).shape
    (2, 512)
    """

    def __init__(self, spec: ModelSpec) -> None:
        if spec.hf_config is None:
            raise ValueError(f"architecture must be 'hf' for HuggingFaceModel, got {spec.architecture!r}")
        self.spec, self._sizes = spec, spec.hf_sizes
        default = "quick_gelu" if self._sizes.kind == "clip" else "gelu_pytorch_tanh"
        names = [tower.activation or default for tower in (self._sizes.image, self._sizes.text)]
        for name in names:
            if name not in _ACTIVATIONS:
                raise ValueError(f"hidden_act must be one of {', '.join(_ACTIVATIONS)} for JAX, got {name!r}")
        self._of_images, self._of_texts = (_ACTIVATIONS[name] for name in names)

    def encode(self, parameters: Parameters, images: Array, texts: Array, /) -> tuple[Array, Array, Pullback]:
        """Return image features (b, d), text features (b, d) and the pullback of this call."""
        return with_pullback(lambda own: (self.encode_images(own, images), self.encode_texts(own, texts)), parameters)

    def encode_images(self, parameters: Parameters, images: Array, /) -> Array:
        """Return image features (b, d) of images (b, s, s, C)."""
        self.spec.check_images(images)
        sizes, epsilon, name = self._sizes, self._sizes.image.epsilon, "vision_model.embeddings"
        patches = jax.lax.conv_general_dilated(
            images,
            parameters[f"{name}.patch_embedding.weight"],
            window_strides=(sizes.patch_size, sizes.patch_size),
            padding="VALID",
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
        # Patches become tokens, line by line.
        x = patches.reshape(patches.shape[0], sizes.grid**2, sizes.image.width)
        positions = parameters[f"{name}.position_embedding.weight"]
        if sizes.kind == "siglip":
            x = x + parameters[f"{name}.patch_embedding.bias"] + positions
            x = _blocks(parameters, "vision_model", x, sizes.image, self._of_images, causal=False)
            x = _norm(parameters, "vision_model.post_layernorm", x, epsilon)
            return _unit(self._pooled(parameters, x))
        # CLIP has a token in front of the patches, whose output is the feature.
        first = jnp.broadcast_to(parameters[f"{name}.class_embedding"], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1) + positions
        x = _norm(parameters, "vision_model.pre_layrnorm", x, epsilon)
        x = _blocks(parameters, "vision_model", x, sizes.image, self._of_images, causal=False)
        x = _norm(parameters, "vision_model.post_layernorm", x[:, 0], epsilon)
        return _unit(x @ parameters["visual_projection.weight"].T)

    def encode_texts(self, parameters: Parameters, texts: Array, /) -> Array:
        """Return text features (b, d) of tokens (b, L)."""
        self.spec.check_texts(texts)
        sizes, name = self._sizes, "text_model.embeddings"
        positions = parameters[f"{name}.position_embedding.weight"][: texts.shape[1]]
        x = parameters[f"{name}.token_embedding.weight"][texts] + positions
        is_clip = sizes.kind == "clip"
        x = _blocks(parameters, "text_model", x, sizes.text, self._of_texts, causal=is_clip)
        x = _norm(parameters, "text_model.final_layer_norm", x, sizes.text.epsilon)
        if not is_clip:
            # SigLIP reads the last position, also if that is padding.
            return _unit(_linear(parameters, "text_model.head", x[:, -1]))
        # CLIP reads the first end token; in old models the end token is the one with the largest number.
        ends = texts if sizes.end_token == 2 else texts == sizes.end_token
        x = x[jnp.arange(x.shape[0]), jnp.argmax(ends, axis=1)]
        return _unit(x @ parameters["text_projection.weight"].T)

    def _pooled(self, parameters: Parameters, x: Array) -> Array:
        """Apply SigLIP's head, an attention of one learned query over all patches: (b, n, w) -> (b, w)."""
        name, tower = "vision_model.head", self._sizes.image
        kernels = jnp.split(parameters[f"{name}.attention.in_proj_weight"], 3)
        biases = jnp.split(parameters[f"{name}.attention.in_proj_bias"], 3)
        probe = jnp.broadcast_to(parameters[f"{name}.probe"], (x.shape[0], 1, x.shape[2]))
        query, key, value = (
            source @ kernel.T + bias for source, kernel, bias in zip((probe, x, x), kernels, biases, strict=True)
        )
        mixed = _attention(query, key, value, tower.heads, causal=False)[:, 0]
        x = _linear(parameters, f"{name}.attention.out_proj", mixed)
        normal = _norm(parameters, f"{name}.layernorm", x, tower.epsilon)
        return x + _feed_forward(parameters, f"{name}.mlp", normal, self._of_images)


def _blocks(
    parameters: Parameters,
    model: str,
    x: Array,
    tower: TowerSizes,
    activation: Callable[[Array], Array],
    *,
    causal: bool,
) -> Array:
    """Apply all blocks of a transformer: (b, n, w) -> (b, n, w)."""
    for block in range(tower.depth):
        name = f"{model}.encoder.layers.{block}"
        normal = _norm(parameters, f"{name}.layer_norm1", x, tower.epsilon)
        query, key, value = (_linear(parameters, f"{name}.self_attn.{part}_proj", normal) for part in "qkv")
        mixed = _attention(query, key, value, tower.heads, causal=causal)
        x = x + _linear(parameters, f"{name}.self_attn.out_proj", mixed)
        normal = _norm(parameters, f"{name}.layer_norm2", x, tower.epsilon)
        x = x + _feed_forward(parameters, f"{name}.mlp", normal, activation)
    return x


def _attention(query: Array, key: Array, value: Array, heads: int, *, causal: bool) -> Array:
    """Return softmax attention of each head, side by side; with `causal` no token attends to a later token."""
    query, key, value = (x.reshape(*x.shape[:2], heads, x.shape[2] // heads) for x in (query, key, value))
    scores = jnp.einsum("blhe,bmhe->bhlm", query, key) / math.sqrt(query.shape[3])
    mask = jnp.tril(jnp.ones(scores.shape[2:], dtype=bool)) if causal else None
    weights = jax.nn.softmax(scores, axis=-1, where=mask)
    mixed = jnp.einsum("bhlm,bmhe->blhe", weights, value)
    return mixed.reshape(*mixed.shape[:2], -1)


def _feed_forward(parameters: Parameters, name: str, x: Array, activation: Callable[[Array], Array]) -> Array:
    """Apply two linear maps with the activation in between."""
    return _linear(parameters, f"{name}.fc2", activation(_linear(parameters, f"{name}.fc1", x)))


def _linear(parameters: Parameters, name: str, x: Array) -> Array:
    """Return ``x kernel^T + bias``."""
    result: Array = x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]
    return result


def _norm(parameters: Parameters, name: str, x: Array, epsilon: float) -> Array:
    """Apply layer normalisation over the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + epsilon)
    result: Array = normal * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]
    return result


def _unit(x: Array) -> Array:
    """Divide each row by its length; NORM_EPSILON keeps the gradient of a zero row finite."""
    result: Array = x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
    return result
