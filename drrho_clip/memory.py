"""How much memory a training run needs, from the settings and the sizes alone.

Shapes: n training pairs, b pairs per batch, P parameters, d features, r features of the reference model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from drrho_clip.config import TrainConfig
from drrho_clip.methods import METHODS
from drrho_clip.models import ModelSpec, parameter_shapes

__all__ = ["MemoryPart", "activations_per_pair", "memory_of_run", "parameter_count"]


class MemoryPart(NamedTuple):
    """A part of the memory of a run: a name and a number of bytes."""

    name: str
    num_bytes: int


def memory_of_run(
    config: TrainConfig, spec: ModelSpec, num_pairs: int, *, reference_features: int | None = None
) -> list[MemoryPart]:
    """Return the parts of the memory that a run needs beyond the imported libraries.

    Parameters
    ----------
    config : TrainConfig
        The settings.
    spec : ModelSpec
        The sizes of the encoders.
    num_pairs : int
        Number n of training pairs.
    reference_features : int, optional
        Number r of features of the reference model, if the method uses the features.

    Returns
    -------
    list of MemoryPart
        Parts of at least one byte.
    """
    item = 8 if config.dtype == "float64" else 4
    parameters = item * parameter_count(spec)
    pixels = spec.image_size**2 * spec.channels
    parts = {
        "parameters": parameters,
        "gradients": parameters,
        "optimiser": 2 * parameters,
        "activations": item * config.batch_size * activations_per_pair(spec),
        "cached images": num_pairs * pixels,
        "inner estimates": 2 * item * num_pairs if METHODS[config.method].keeps_estimates else 0,
        "reference features": 2 * item * num_pairs * (reference_features or 0),
    }
    return [MemoryPart(name, size) for name, size in parts.items() if size > 0]


def parameter_count(spec: ModelSpec) -> int:
    """Return the number P of parameters of a pair of encoders."""
    return sum(math.prod(shape) for shape in parameter_shapes(spec).values())


def activations_per_pair(spec: ModelSpec) -> int:
    """Return how many numbers the encoders keep of one pair for the gradient."""
    pixels = spec.image_size**2 * spec.channels
    features = 4 * spec.feature_dim
    if spec.architecture == "mlp":
        return pixels + spec.vocabulary_size + 2 * spec.depth * 2 * spec.hidden + features
    side, count = spec.image_size, pixels
    for channels in (spec.width, 2 * spec.width, 4 * spec.width):
        side = (side + 1) // 2
        count += 2 * side * side * channels
    # Each block keeps two normed inputs, queries, keys, values, the attention's output and twice the hidden units.
    per_token = 12 * spec.text_width
    scores = 2 * spec.heads * spec.context_length
    return count + spec.depth * spec.context_length * (per_token + scores) + features
