"""Results of the losses: the value, and its gradients with respect to features and parameters.

Each gradient with respect to a parameter is a field whose name ends in ``_gradient``. `weighted_sum` relies on these
names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from drrho_core._array_api import Array

FEATURES = ("image_gradient", "text_gradient")
"""The fields that hold the gradients with respect to the features."""


class LossGradients(NamedTuple):
    """Result of `info_nce` and `distillation_loss`: the loss and its gradients.

    Attributes
    ----------
    loss : array, shape ()
        Value of the loss.
    image_gradient, text_gradient : array, shape (b, d)
        Gradient of the loss with respect to the features, in their dtype.
    temperature_gradient : array, shape ()
        Gradient of the loss with respect to the temperature.
    """

    loss: Array
    image_gradient: Array
    text_gradient: Array
    temperature_gradient: Array


class SigmoidLossGradients(NamedTuple):
    """Result of `sigmoid_loss`: the loss and its gradients.

    Attributes
    ----------
    loss : array, shape ()
        Value of the loss.
    image_gradient, text_gradient : array, shape (b, d)
        As in `LossGradients`.
    scale_gradient, bias_gradient : array, shape ()
        Gradients of the loss with respect to the scale and the bias.
    """

    loss: Array
    image_gradient: Array
    text_gradient: Array
    scale_gradient: Array
    bias_gradient: Array


class FeatureGradients(NamedTuple):
    """Result of `hinge_margin_loss`: a loss without learned parameters, and its gradients.

    Attributes
    ----------
    loss : array, shape ()
        Value of the loss.
    image_gradient, text_gradient : array, shape (b, d)
        As in `LossGradients`.
    """

    loss: Array
    image_gradient: Array
    text_gradient: Array


class WeightedSum(NamedTuple):
    """Result of `weighted_sum`.

    Attributes
    ----------
    loss : array, shape ()
        Sum of the weighted losses.
    image_gradient, text_gradient : array, shape (b, d)
        Sum of the weighted gradients with respect to the features, in their dtype.
    parameter_gradients : tuple of dict
        One dict per term, in the order of the terms. Each dict holds the weighted gradients of the term's own
        parameters by field name, such as ``temperature_gradient``. If two terms share a parameter, add their entries.
    """

    loss: Array
    image_gradient: Array
    text_gradient: Array
    parameter_gradients: tuple[dict[str, Any], ...]
