"""Encoders whose activations do not fit into memory: a batch passes them in micro-batches.

The method is GradCache (arXiv 2101.06983). The loss gets the features of all b samples, so its value, its gradient and
the inner estimates are those of the whole batch. The price is a second forward pass: the first pass computes features
only, the second one repeats the forward pass of each micro-batch and turns its part of the gradient into gradients of
the parameters. Both passes read the same arrays: all random numbers, such as those of augmentation, are drawn before
the step.
"""

from __future__ import annotations

from typing import Any

from drrho_clip.config import TrainConfig
from drrho_clip.precision import in_precision
from drrho_core.backend import Backend, Model, Parameters, Pullback
from drrho_core.checks import Array, Namespace


def model_of_step(backend: Backend, model: Model, config: TrainConfig) -> Model:
    """Return the encoders as all steps of a run use them: in the precision and the micro-batches of the settings.

    A backend that compiles steps may have a method `model_in_parts(model, size)` in place of `MicroBatches`, because a
    compiler may merge the two forward passes of a micro-batch.

    Raises
    ------
    BadInput
        If the backend does not have this precision.
    """
    model = in_precision(backend, model, config.precision)
    if not config.micro_batch:
        return model
    in_parts: Any = getattr(backend, "model_in_parts", None)
    if in_parts is not None:
        return in_parts(model, config.micro_batch)  # type: ignore[no-any-return]
    return MicroBatches(model, config.micro_batch, backend.xp)


class MicroBatches:
    """The encoders of a model, with the activations of `size` samples in memory at a time.

    Parameters
    ----------
    model : Model
        The encoders.
    size : int
        Samples in a micro-batch, at least 1; the last micro-batch may have fewer.
    xp : namespace
        The namespace of the arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_clip.models import MLPModel, ModelSpec, initial_parameters
    >>> spec = ModelSpec("mlp", image_size=2, channels=1, vocabulary_size=3, context_length=2, feature_dim=4, width=2)
    >>> whole, parameters = MLPModel(spec, np), initial_parameters(spec, seed=0)
    >>> batch = np.ones((5, 2, 2, 1)), np.eye(5, 3)
    >>> image, text, pullback = MicroBatches(whole, 2, np).encode(parameters, *batch)
    >>> expected = whole.encode(parameters, *batch)[2](image + 1, text)
    >>> found = pullback(image + 1, text)
    >>> all(np.allclose(found[name], gradient) for name, gradient in expected.items())
    True
    """

    def __init__(self, model: Model, size: int, xp: Namespace) -> None:
        self._model, self._size, self._xp = model, size, xp

    def encode(self, parameters: Parameters, images: Array, texts: Array, /) -> tuple[Array, Array, Pullback]:
        """Return the features of the whole batch, and the pullback, which repeats the forward passes."""
        parts = self._parts(images)

        def pullback(image_gradient: Array, text_gradient: Array) -> Parameters:
            total: dict[str, Any] = {}
            for part in parts:
                _, _, pull = self._model.encode(parameters, images[part, ...], texts[part, ...])
                gradients = pull(image_gradient[part, ...], text_gradient[part, ...])
                total = {name: total[name] + value if total else value for name, value in gradients.items()}
            return total

        return self.encode_images(parameters, images), self.encode_texts(parameters, texts), pullback

    def encode_images(self, parameters: Parameters, images: Array, /) -> Array:
        """Return the image features of the whole batch."""
        parts = self._parts(images)
        return self._xp.concat([self._model.encode_images(parameters, images[part, ...]) for part in parts])

    def encode_texts(self, parameters: Parameters, texts: Array, /) -> Array:
        """Return the text features of the whole batch."""
        parts = self._parts(texts)
        return self._xp.concat([self._model.encode_texts(parameters, texts[part, ...]) for part in parts])

    def _parts(self, inputs: Array) -> list[slice]:
        """Return the rows of each micro-batch."""
        rows = int(inputs.shape[0])
        return [slice(start, min(start + self._size, rows)) for start in range(0, rows, self._size)]
