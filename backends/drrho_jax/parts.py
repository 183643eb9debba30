"""Encoders that take a batch in parts, in a loop of the compiled program.

Without a loop, XLA finds that both passes of a part compute the same features, merges the two computations, and so
keeps the activations of all parts.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from drrho_core.backend import Model, Parameters, Pullback


class ModelInParts:
    """The encoders of a model, with the activations of `size` samples in memory at a time.

    Parameters
    ----------
    model : Model
        The encoders.
    size : int
        Samples in a part, at least 1; the last part may have fewer.
    """

    def __init__(self, model: Model, size: int) -> None:
        self._model, self._size = model, size

    def encode(
        self, parameters: Parameters, images: jax.Array, texts: jax.Array, /
    ) -> tuple[jax.Array, jax.Array, Pullback]:
        """Return the features of the whole batch, and the pullback, which computes the features of each part again."""

        def pullback(image_gradient: jax.Array, text_gradient: jax.Array) -> Parameters:
            def gradient_of(part: tuple[jax.Array, ...]) -> Parameters:
                _, _, pull = self._model.encode(parameters, part[0], part[1])
                return dict(pull(part[2], part[3]))

            arrays = (images, texts, image_gradient, text_gradient)
            stacked, left = self._split(arrays)
            sums: Parameters = {name: jnp.zeros_like(value) for name, value in parameters.items()}
            if stacked is not None:
                sums, _ = jax.lax.scan(lambda total, part: (_sum(total, gradient_of(part)), None), sums, stacked)
            sums = sums if left is None else _sum(sums, gradient_of(left))
            # JAX sorts the names of a dictionary; the order of the parameters is restored.
            return {name: sums[name] for name in parameters}

        return self.encode_images(parameters, images), self.encode_texts(parameters, texts), pullback

    def encode_images(self, parameters: Parameters, images: jax.Array, /) -> jax.Array:
        """Return the image features of the whole batch."""
        return self._features(lambda part: self._model.encode_images(parameters, part), images)

    def encode_texts(self, parameters: Parameters, texts: jax.Array, /) -> jax.Array:
        """Return the text features of the whole batch."""
        return self._features(lambda part: self._model.encode_texts(parameters, part), texts)

    def _features(self, encode: Callable[[jax.Array], jax.Array], inputs: jax.Array) -> jax.Array:
        stacked, left = self._split((inputs,))
        features = []
        if stacked is not None:
            pieces = jax.lax.map(encode, stacked[0])
            features.append(pieces.reshape(-1, pieces.shape[-1]))
        if left is not None:
            features.append(encode(left[0]))
        return jnp.concatenate(features)

    def _split(
        self, arrays: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, ...] | None, tuple[jax.Array, ...] | None]:
        """Return the full parts as stacks (parts, size, ...), and the rows of the last part; None: there are none."""
        size = self._size
        whole, rest = divmod(arrays[0].shape[0], size)
        stacked = tuple(array[: whole * size].reshape(whole, size, *array.shape[1:]) for array in arrays)
        left = tuple(array[whole * size :] for array in arrays)
        return stacked if whole else None, left if rest else None


def _sum(total: Parameters, more: Parameters) -> Parameters:
    return {name: value + more[name] for name, value in total.items()}
