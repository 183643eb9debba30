"""One backend computes the loss and the updates, while another backend lends the encoders; arrays pass by DLPack.

DLPack is a protocol by which array libraries hand each other an array without a copy. A backend without automatic
differentiation can train encoders of another backend this way, on the same device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drrho_core._array_api import Array, Namespace

if TYPE_CHECKING:
    from drrho_core.backend import Backend, Function, Home, Model, Optimizer, Parameters, Pullback

__all__ = ["BackendWithEncoders", "LentModel"]


class LentModel:
    """Encoders of another backend, for arrays of this backend; see `drrho_core.backend.Model`.

    Parameters
    ----------
    model : Model
        The encoders of the other backend.
    borrower, lender : namespace
        The namespaces of the arrays of this model and of the other backend.
    """

    def __init__(self, model: Model, borrower: Namespace, lender: Namespace) -> None:
        self._model, self._borrower, self._lender = model, borrower, lender

    def encode(self, parameters: Parameters, images: Array, texts: Array, /) -> tuple[Array, Array, Pullback]:
        """Return image features, text features, and the pullback of this call."""
        lent = self._lent(parameters), self._there(images), self._there(texts)
        image_features, text_features, pullback = self._model.encode(*lent)

        def pullback_here(image_gradient: Array, text_gradient: Array) -> Parameters:
            gradients = pullback(self._there(image_gradient), self._there(text_gradient))
            return {name: self._here(gradient) for name, gradient in gradients.items()}

        return self._here(image_features), self._here(text_features), pullback_here

    def encode_images(self, parameters: Parameters, images: Array, /) -> Array:
        """Return only the image features."""
        return self._here(self._model.encode_images(self._lent(parameters), self._there(images)))

    def encode_texts(self, parameters: Parameters, texts: Array, /) -> Array:
        """Return only the text features."""
        return self._here(self._model.encode_texts(self._lent(parameters), self._there(texts)))

    def _lent(self, parameters: Parameters) -> Parameters:
        return {name: self._there(array) for name, array in parameters.items()}

    def _there(self, array: Array) -> Array:
        return self._lender.from_dlpack(array)

    def _here(self, array: Array) -> Array:
        return self._borrower.from_dlpack(array)


class BackendWithEncoders:
    """A backend with the encoders of another backend beside its own; see `drrho_core.backend.Backend`.

    Parameters
    ----------
    own : Backend
        The backend that computes the loss and the updates.
    lender : Backend
        The backend of the encoders that `own` lacks, with the same dtype and on the same device.
    """

    def __init__(self, own: Backend, lender: Backend) -> None:
        self._own, self._lender = own, lender
        self.name = f"{own.name}+{lender.name}"
        # The encoders of the lender come first, because they are the reason for the second library.
        self.architectures = tuple(dict.fromkeys((*lender.architectures, *own.architectures)))
        self.foreign_models = getattr(lender, "foreign_models", {})
        self.preference, self.xp, self.homes = own.preference, own.xp, own.homes
        self.device, self.has_gpu, self.dtype = own.device, own.has_gpu, own.dtype

    def asarray(self, array: Any, /) -> Array:
        """Move a host array to the device."""
        return self._own.asarray(array)

    def to_numpy(self, array: Array, /) -> Any:
        """Copy an array to a NumPy array on the host."""
        return self._own.to_numpy(array)

    def model(self, spec: Any, /) -> Model:
        """Build encoders of this backend, or of the lender if this backend does not have the architecture."""
        if spec.architecture in self._own.architectures:
            return self._own.model(spec)
        return LentModel(self._lender.model(spec), self._own.xp, self._lender.xp)

    def adamw(
        self, *, weight_decay: float, beta1: float = 0.9, beta2: float = 0.98, epsilon: float = 1e-8
    ) -> Optimizer:
        """Build AdamW."""
        return self._own.adamw(weight_decay=weight_decay, beta1=beta1, beta2=beta2, epsilon=epsilon)

    def estimator(self, home: str, num_samples: int, /, *, path: Any = None) -> Home:
        """Build an inner estimator."""
        return self._own.estimator(home, num_samples, path=path)

    def compile(self, function: Function, /) -> Function:
        """Return the function unchanged: no compiler sees the arrays of both libraries."""
        return function
