"""Encoders in bfloat16: parameters and inputs are rounded on the way in, features and gradients return in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from drrho_core.backend import Model, Parameters, Pullback


class Bfloat16Model:
    """The encoders of a model in bfloat16; see `drrho_core.backend.Model`.

    Parameters
    ----------
    model : Model
        The encoders. Their parameters stay in float32 outside this object.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    def encode(
        self, parameters: Parameters, images: jax.Array, texts: jax.Array, /
    ) -> tuple[jax.Array, jax.Array, Pullback]:
        """Return float32 features (b, d) of both encoders, and the pullback of this call."""
        image, text, pullback = self._model.encode(_rounded(parameters), _round(images), _round(texts))

        def pull(image_gradient: jax.Array, text_gradient: jax.Array) -> Parameters:
            gradients = pullback(image_gradient.astype(image.dtype), text_gradient.astype(text.dtype))
            return {name: gradient.astype(jnp.float32) for name, gradient in gradients.items()}

        return image.astype(jnp.float32), text.astype(jnp.float32), pull

    def encode_images(self, parameters: Parameters, images: jax.Array, /) -> jax.Array:
        """Return float32 features (b, d) of images."""
        features: jax.Array = self._model.encode_images(_rounded(parameters), _round(images))
        return features.astype(jnp.float32)

    def encode_texts(self, parameters: Parameters, texts: jax.Array, /) -> jax.Array:
        """Return float32 features (b, d) of texts."""
        features: jax.Array = self._model.encode_texts(_rounded(parameters), _round(texts))
        return features.astype(jnp.float32)


def _rounded(parameters: Parameters) -> dict[str, jax.Array]:
    return {name: _round(parameter) for name, parameter in parameters.items()}


def _round(array: jax.Array) -> jax.Array:
    """Return floating numbers in bfloat16; tokens stay integers."""
    return array.astype(jnp.bfloat16) if jnp.issubdtype(array.dtype, jnp.floating) else array
