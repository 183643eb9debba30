"""The encoders: sizes, initial parameters, and the multilayer perceptrons on any array library."""

from __future__ import annotations

from drrho_clip.models.mlp import MLPModel, perceptron, unit_norm
from drrho_clip.models.spec import (
    ARCHITECTURES,
    LAYER_NORM_EPSILON,
    NORM_EPSILON,
    ModelSpec,
    initial_parameters,
    parameter_shapes,
)

# `mlp` runs on every library, because the gradient of the perceptrons is written by hand.
# The convolutions and the transformer are written per library, in the backends; `spec` holds the formulas.
__all__ = [
    "ARCHITECTURES",
    "LAYER_NORM_EPSILON",
    "NORM_EPSILON",
    "MLPModel",
    "ModelSpec",
    "initial_parameters",
    "parameter_shapes",
    "perceptron",
    "unit_norm",
]
