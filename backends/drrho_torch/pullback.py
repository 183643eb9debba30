"""Features of two encoders and the pullback of the call: autograd computes the gradients of the parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from drrho_core.backend import Parameters, Pullback


def with_pullback(
    features_of: Callable[[Parameters], tuple[Tensor, Tensor]], parameters: Parameters
) -> tuple[Tensor, Tensor, Pullback]:
    """Return image features and text features, detached from autograd, and the pullback of this call.

    Parameters
    ----------
    features_of : callable
        Takes the parameters, and returns image features and text features, (b, d) each.
    parameters : mapping of str to tensor
        The parameters that the features depend on.

    Returns
    -------
    tuple
        Both features, and the pullback, which may be called once. The pullback maps the gradients of both features,
        (b, d) each, to the gradients of all parameters.
    """
    # Autograd computes the gradients with respect to the leaves. The leaves share memory with the parameters, but are
    # new tensors in each call, so that each call has a separate graph.
    with torch.enable_grad():
        leaves = {name: values.detach().requires_grad_() for name, values in parameters.items()}
        features = features_of(leaves)

    def pullback(image_gradient: Tensor, text_gradient: Tensor) -> Parameters:
        gradients = torch.autograd.grad(features, list(leaves.values()), (image_gradient, text_gradient))
        return dict(zip(leaves, gradients, strict=True))

    return features[0].detach(), features[1].detach(), pullback
