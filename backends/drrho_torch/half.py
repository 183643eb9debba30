"""Encoders in a half type by torch's autocast: the parameters and their gradients stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from drrho_core.backend import Model, Parameters, Pullback

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The half types by the names that the harness uses."""


class AutocastModel:
    """The encoders of a model under `torch.autocast`; see `drrho_core.backend.Model`.

    Parameters
    ----------
    model : Model
        The encoders.
    dtype : torch.dtype
        The half type of matrix products and convolutions.
    device_type : str
        The type of the device, such as ``"cuda"``.
    """

    def __init__(self, model: Model, dtype: torch.dtype, device_type: str) -> None:
        self._model, self._dtype, self._device_type = model, dtype, device_type

    def encode(self, parameters: Parameters, images: Tensor, texts: Tensor, /) -> tuple[Tensor, Tensor, Pullback]:
        """Return float32 features (b, d) of both encoders, and the pullback of this call."""
        with self._autocast():
            image_features, text_features, pullback = self._model.encode(parameters, images, texts)

        # Autograd expects the gradient of a tensor in the dtype of the tensor.
        def pull(image_gradient: Tensor, text_gradient: Tensor) -> Parameters:
            return pullback(image_gradient.to(image_features.dtype), text_gradient.to(text_features.dtype))

        return image_features.float(), text_features.float(), pull

    def encode_images(self, parameters: Parameters, images: Tensor, /) -> Tensor:
        """Return float32 features (b, d) of images."""
        with self._autocast():
            features: Tensor = self._model.encode_images(parameters, images)
        return features.float()

    def encode_texts(self, parameters: Parameters, texts: Tensor, /) -> Tensor:
        """Return float32 features (b, d) of texts."""
        with self._autocast():
            features: Tensor = self._model.encode_texts(parameters, texts)
        return features.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device_type, dtype=self._dtype)
