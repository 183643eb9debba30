"""The convolution and transformer towers of `drrho_clip.models.spec`, in JAX.

Shapes: batch b, image side s, C channels, context L, w numbers per token, feature_dim d. `drrho_clip.models.spec` holds
the formulas, parameter by parameter; the torch towers compute the same formulas from the same parameters.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from drrho_clip.models import LAYER_NORM_EPSILON, NORM_EPSILON, ModelSpec
from drrho_core.backend import Parameters, Pullback
from drrho_jax.pullback import with_pullback

Array = jax.Array


class ConvModel:
    """A convolution tower (encoder) for images and a transformer for texts, as pure functions of their parameters.

    Parameters
    ----------
    spec : ModelSpec
        The encoders, with architecture ``"conv"``.

    Raises
    ------
    ValueError
        If the architecture is not ``"conv"``; in the methods, if images or texts do not have the shape of the spec.

    Examples
    --------
    >>> from drrho_clip.models import initial_parameters
    >>> spec = ModelSpec("conv", image_size=8, channels=3, vocabulary_size=5, context_length=4, width=8)
    >>> parameters = {name: jnp.asarray(value) for name, value in initial_parameters(spec, seed=0).items()}
    >>> texts = jnp.asarray([[1, 2, 0, 0], [4, 3, 1, 0]])  # 0 is padding
    >>> image_features, text_features, pullback = ConvModel(spec).encode(parameters, jnp.zeros((2, 8, 8, 3)), texts)
    >>> text_features.shape
    (2, 64)
    >>> pullback(image_features, jnp.ones_like(text_features))["text/tokens"].shape
    (5, 16)
    """

    def __init__(self, spec: ModelSpec) -> None:
        if spec.architecture != "conv":
            raise ValueError(f"architecture must be 'conv' for ConvModel, got {spec.architecture!r}")
        self.spec = spec

    def encode(self, parameters: Parameters, images: Array, texts: Array, /) -> tuple[Array, Array, Pullback]:
        """Return image features (b, d), text features (b, d) and the pullback of this call."""
        return with_pullback(lambda own: (self.encode_images(own, images), self.encode_texts(own, texts)), parameters)

    def encode_images(self, parameters: Parameters, images: Array, /) -> Array:
        """Return image features (b, d) of images (b, s, s, C)."""
        self.spec.check_images(images)
        # Three convolutions of stride 2 with ReLU; `dimension_numbers` names the order of the axes.
        x = images
        for layer in range(3):
            x = jax.lax.conv_general_dilated(
                x,
                parameters[f"image/conv{layer}/kernel"],
                window_strides=(2, 2),
                padding=((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "OIHW", "NHWC"),
            )
            x = jax.nn.relu(x + parameters[f"image/conv{layer}/bias"])
        return _unit(_linear(parameters, "image/projection", x.reshape(x.shape[0], -1)))

    def encode_texts(self, parameters: Parameters, texts: Array, /) -> Array:
        """Return text features (b, d) of tokens (b, L)."""
        self.spec.check_texts(texts)
        # Token 0 is padding: no token attends to it, and it does not count in the mean.
        real = texts != 0
        x = parameters["text/tokens"][texts] + parameters["text/positions"][: texts.shape[1]]
        for block in range(self.spec.depth):
            name = f"text/block{block}"
            x = x + self._attention(parameters, f"{name}/attention", x, real)
            x = x + _feed_forward(parameters, f"{name}/feed_forward", x)
        # The mean over the real tokens, as a weighted sum over all tokens.
        weights = real / jnp.sum(real, axis=1, keepdims=True, dtype=x.dtype)
        mean = jnp.sum(x * weights[:, :, None], axis=1)
        return _unit(_linear(parameters, "text/projection", _norm(parameters, "text/norm", mean)))

    def _attention(self, parameters: Parameters, name: str, x: Array, real: Array) -> Array:
        """Apply layer normalisation and softmax attention over the real tokens: (b, L, w) -> (b, L, w)."""
        batch_size, length, width = x.shape
        joint = _linear(parameters, f"{name}/query_key_value", _norm(parameters, f"{name}/norm", x))
        query, key, value = jnp.split(
            joint.reshape(batch_size, length, 3 * self.spec.heads, width // self.spec.heads), 3, axis=2
        )
        # softmax(q k^T / sqrt(w / heads)) over the real tokens m, for each head h and each token l.
        scores = jnp.einsum("blhe,bmhe->bhlm", query, key) * math.sqrt(self.spec.heads / width)
        weights = jax.nn.softmax(scores, axis=-1, where=real[:, None, None, :])
        mixed = jnp.einsum("bhlm,bmhe->blhe", weights, value).reshape(batch_size, length, width)
        return _linear(parameters, f"{name}/output", mixed)


def _feed_forward(parameters: Parameters, name: str, x: Array) -> Array:
    """Apply layer normalisation and two linear maps with ReLU in between."""
    hidden = jax.nn.relu(_linear(parameters, f"{name}/hidden", _norm(parameters, f"{name}/norm", x)))
    return _linear(parameters, f"{name}/output", hidden)


def _linear(parameters: Parameters, name: str, x: Array) -> Array:
    """Return ``x kernel + bias``."""
    result: Array = x @ parameters[f"{name}/kernel"] + parameters[f"{name}/bias"]
    return result


def _norm(parameters: Parameters, name: str, x: Array) -> Array:
    """Apply layer normalisation over the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    result: Array = normal * parameters[f"{name}/scale"] + parameters[f"{name}/bias"]
    return result


def _unit(x: Array) -> Array:
    """Divide each row by its length; NORM_EPSILON keeps the gradient of a zero row finite."""
    result: Array = x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
    return result
