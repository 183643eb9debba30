"""Encoders in a half type: features and gradients are float32, and so are the parameters and the optimiser.

A backend that can run encoders in a half type has an attribute `precisions`, the names of these types, and a method
`half_model(model, precision)`. The wrapped encoders compute in the half type. This module brings the rounded features
back to norm 1, and the loss is always computed in the dtype of the run.
"""

from __future__ import annotations

from typing import Any

from drrho_clip.constants import FULL
from drrho_clip.errors import BadInput
from drrho_clip.models import unit_norm
from drrho_core.backend import Backend, Model, Parameters, Pullback
from drrho_core.checks import Array, Namespace


def in_precision(backend: Backend, model: Model, precision: str) -> Model:
    """Return the encoders in a precision: the encoders themselves, or encoders in a half type.

    Raises
    ------
    BadInput
        If the backend does not have this precision.
    """
    if precision == FULL:
        return model
    offered = getattr(backend, "precisions", ())
    if precision not in offered:
        known = ", ".join([FULL, *offered])
        raise BadInput(f"precision must be one of {known} for the backend {backend.name}, got {precision!r}")
    half_model: Any = getattr(backend, "half_model")  # noqa: B009 (the attribute is optional in the contract)
    return _UnitNorm(half_model(model, precision), backend.xp)


class _UnitNorm:
    """Encoders whose features are divided by their norm once more, because a half type rounds the norm."""

    def __init__(self, model: Model, xp: Namespace) -> None:
        self._model, self._xp = model, xp

    def encode(self, parameters: Parameters, images: Array, texts: Array, /) -> tuple[Array, Array, Pullback]:
        rounded_image, rounded_text, pullback = self._model.encode(parameters, images, texts)
        image, pull_image = unit_norm(rounded_image, xp=self._xp)
        text, pull_text = unit_norm(rounded_text, xp=self._xp)
        return (
            image,
            text,
            lambda image_gradient, text_gradient: pullback(pull_image(image_gradient), pull_text(text_gradient)),
        )

    def encode_images(self, parameters: Parameters, images: Array, /) -> Array:
        return unit_norm(self._model.encode_images(parameters, images), xp=self._xp)[0]

    def encode_texts(self, parameters: Parameters, texts: Array, /) -> Array:
        return unit_norm(self._model.encode_texts(parameters, texts), xp=self._xp)[0]
