"""Features of two encoders and the pullback of the call: `jax.vjp` computes the gradients of the parameters."""

from __future__ import annotations

from collections.abc import Callable

import jax

from drrho_core.backend import Parameters, Pullback


def with_pullback(
    features_of: Callable[[Parameters], tuple[jax.Array, jax.Array]], parameters: Parameters
) -> tuple[jax.Array, jax.Array, Pullback]:
    """Return image features and text features, (b, d) each, and the pullback of this call.

    Parameters
    ----------
    features_of : callable
        Takes the parameters, and returns image features and text features.
    parameters : mapping of str to array
        The parameters of the encoders.

    Returns
    -------
    tuple
        Both features, and the pullback, which maps the gradients of both features, (b, d) each, to the gradients of
        all parameters.
    """
    # `vjp` keeps the activations of this call for the pullback.
    (image_features, text_features), transposed = jax.vjp(features_of, dict(parameters))

    def pullback(image_gradient: jax.Array, text_gradient: jax.Array) -> Parameters:
        (gradients,) = transposed((image_gradient, text_gradient))
        # JAX returns dictionaries with sorted names; the caller's order is restored.
        return {name: gradients[name] for name in parameters}

    return image_features, text_features, pullback
