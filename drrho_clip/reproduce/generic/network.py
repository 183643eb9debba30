"""A classifier with one hidden layer, many models at a time, with gradients in closed form.

Shapes: m models, b samples, d inputs, h hidden units, c classes. Every array has the models as first axis, so one
product of matrices serves all models.

    hidden = max(inputs W1 + b1, 0),    logits = hidden W2 + b2,    loss = log sum exp(logits) - logits[label]

An input of a language model is the one-hot code of the context, so the rows of W1 are the embeddings of the tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "Integers", "Network", "gradients", "losses", "predictions", "start"]

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.int64]


class Network(NamedTuple):
    """The parameters of m models.

    Attributes
    ----------
    first : array, shape (m, d, h)
    first_bias : array, shape (m, 1, h)
    second : array, shape (m, h, c)
    second_bias : array, shape (m, 1, c)
    """

    first: Floats
    first_bias: Floats
    second: Floats
    second_bias: Floats


def start(rngs: list[np.random.Generator], *, inputs: int, hidden: int, classes: int) -> Network:
    """Return the initial parameters of one model per generator; the deviations are those of He's rule."""
    shapes = ((inputs, hidden), (1, hidden), (hidden, classes), (1, classes))
    deviations = (math.sqrt(2 / inputs), 0.0, math.sqrt(1 / hidden), 0.0)
    drawn = [
        [rng.normal(scale=size, size=shape) for shape, size in zip(shapes, deviations, strict=True)] for rng in rngs
    ]
    return Network(*(np.stack(values).astype(np.float32) for values in zip(*drawn, strict=True)))


def losses(network: Network, inputs: Floats, labels: Integers) -> Floats:
    """Return the cross-entropy (m, b), in nats, of inputs (m, b, d) with labels (m, b)."""
    logits = _logits(network, inputs)
    top = logits.max(axis=2, keepdims=True)
    log_sum: Floats = np.log(np.exp(logits - top).sum(axis=2)) + top[..., 0]
    right: Floats = np.take_along_axis(logits, labels[..., None], axis=2)[..., 0]
    return log_sum - right


def predictions(network: Network, inputs: Floats) -> Integers:
    """Return the class (m, b) with the largest logit of inputs (m, b, d)."""
    classes: Integers = np.argmax(_logits(network, inputs), axis=2)
    return classes


def gradients(network: Network, inputs: Floats, labels: Integers, weights: Floats) -> Network:
    """Return the gradient of the weighted sum of the losses, model by model, with weights (m, b)."""
    hidden = _hidden(network, inputs)
    logits = hidden @ network.second + network.second_bias
    probabilities = np.exp(logits - logits.max(axis=2, keepdims=True))
    probabilities /= probabilities.sum(axis=2, keepdims=True)
    # The derivative of the cross-entropy with respect to the logits is softmax - one-hot(label).
    slope = weights[..., None] * (probabilities - (np.arange(logits.shape[2]) == labels[..., None]))
    below = (slope @ network.second.swapaxes(1, 2)) * (hidden > 0)
    return Network(
        inputs.swapaxes(1, 2) @ below,
        below.sum(axis=1, keepdims=True),
        hidden.swapaxes(1, 2) @ slope,
        slope.sum(axis=1, keepdims=True),
    )


def _hidden(network: Network, inputs: Floats) -> Floats:
    return np.maximum(inputs @ network.first + network.first_bias, 0.0)


def _logits(network: Network, inputs: Floats) -> Floats:
    return _hidden(network, inputs) @ network.second + network.second_bias
