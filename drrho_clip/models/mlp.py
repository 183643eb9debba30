"""Two multilayer perceptrons on any Array API namespace, with their gradient written by hand.

A *pullback* takes the gradient of a scalar with respect to a function's output and returns the gradient with respect to
the function's input. Each function here is followed by its pullback, so that the chain rule can be read line by line.
The tests compare the pullbacks with finite differences and with automatic differentiation. Shapes: batch b, image side
s, C channels, vocabulary V, feature_dim d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from drrho_clip.models.spec import NORM_EPSILON, ModelSpec, parameter_shapes
from drrho_core.backend import Parameters, Pullback
from drrho_core.checks import Array, Namespace


def unit_norm(x: Array, /, *, xp: Namespace) -> tuple[Array, Callable[[Array], Array]]:
    """Divide each row by its Euclidean norm.

    Parameters
    ----------
    x : array (b, d)
        Rows of any norm; a row of zeros stays zeros.
    xp : namespace
        The namespace of `x`.

    Returns
    -------
    y : array (b, d)
        ``x / n`` with ``n = sqrt(sum of squares + NORM_EPSILON)``, row by row.
    pullback : callable
        Takes dy (b, d) and returns ``dx = (dy - y <y, dy>) / n``, with the inner product ``<y, dy>`` of each row. The
        part of dy along y is removed, because a change of x along y changes only the norm of x.

    Examples
    --------
    >>> import numpy as np
    >>> y, pullback = unit_norm(np.asarray([[3.0, 4.0]]), xp=np)
    >>> y
    array([[0.6, 0.8]])
    >>> pullback(np.asarray([[1.0, 0.0]]))
    array([[ 0.128, -0.096]])
    """
    # y = x / n; NORM_EPSILON avoids a division by zero for a row of zeros.
    n = xp.sqrt(xp.sum(x * x, axis=1, keepdims=True) + NORM_EPSILON)
    y = x / n

    def pullback(dy: Array) -> Array:
        # The Jacobian of x / |x| is (I - y y^T) / n: the part of dy along y is removed.
        return (dy - y * xp.sum(y * dy, axis=1, keepdims=True)) / n

    return y, pullback


def perceptron(
    parameters: Parameters, names: list[str], x: Array, /, *, xp: Namespace
) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
    """Apply linear layers with a ReLU between them.

    Parameters
    ----------
    parameters : mapping of str to array
        Holds ``NAME/kernel`` (in, out) and ``NAME/bias`` (out,) of each layer.
    names : list of str
        The layers in order.
    x : array (b, in of the first layer)
        The input.
    xp : namespace
        The namespace of all arrays.

    Returns
    -------
    y : array (b, out of the last layer)
        The last layer turns x into ``x @ kernel + bias``, every earlier layer into ``relu(x @ kernel + bias)``.
    pullback : callable
        Takes dy and returns the gradient of every kernel and bias by name.

    Examples
    --------
    >>> import numpy as np
    >>> layer = {"a/kernel": np.asarray([[2.0]]), "a/bias": np.asarray([1.0])}
    >>> y, pullback = perceptron(layer, ["a"], np.asarray([[3.0]]), xp=np)
    >>> float(y[0, 0]), float(pullback(np.ones((1, 1)))["a/kernel"][0, 0])
    (7.0, 3.0)
    """
    # Forward: the input of every layer is kept, because the pullback needs these inputs.
    inputs = [x]
    for name in names[:-1]:
        x = x @ parameters[f"{name}/kernel"] + parameters[f"{name}/bias"]
        x = xp.maximum(x, xp.zeros_like(x))
        inputs.append(x)
    y = x @ parameters[f"{names[-1]}/kernel"] + parameters[f"{names[-1]}/bias"]

    def pullback(dy: Array) -> dict[str, Array]:
        gradients = {}
        # Backward through the layers: d kernel = x^T dy, d bias = sum of dy over the batch, dx = dy kernel^T.
        for layer in reversed(range(len(names))):
            name, x = names[layer], inputs[layer]
            gradients[f"{name}/kernel"] = x.T @ dy
            gradients[f"{name}/bias"] = xp.sum(dy, axis=0)
            # The first layer reads the data, which need no gradient.
            if layer > 0:
                dx = dy @ parameters[f"{name}/kernel"].T
                # x is the output of a ReLU: the gradient passes only where x > 0.
                dy = xp.where(x > 0, dx, xp.zeros_like(dx))
        return gradients

    return y, pullback


_Tower: TypeAlias = tuple[Array, Callable[[Array], dict[str, Array]], Callable[[Array], Array]]
"""Features of a tower (one of the two encoders), the pullback of all layers, and the pullback of `unit_norm`."""


class MLPModel:
    """The architectures ``"mlp"`` and ``"heads"`` on any Array API namespace; see `drrho_core.backend.Model`.

    Parameters
    ----------
    spec : ModelSpec
        The encoders, with architecture ``"mlp"`` or ``"heads"``.
    xp : namespace
        The namespace of all arrays.

    Raises
    ------
    ValueError
        If the architecture is another. The methods raise this error if images or texts do not have the shapes
        that the spec demands.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_clip.models.spec import initial_parameters
    >>> spec = ModelSpec("mlp", image_size=2, channels=1, vocabulary_size=5, context_length=3, feature_dim=4)
    >>> parameters = initial_parameters(spec, seed=0)
    >>> model = MLPModel(spec, np)
    >>> image_features, text_features, pullback = model.encode(parameters, np.ones((3, 2, 2, 1)), np.eye(3, 5))
    >>> image_features.shape, bool(np.allclose(np.sum(text_features**2, axis=1), 1.0))
    ((3, 4), True)
    >>> gradients = pullback(np.ones((3, 4)), np.ones((3, 4)))
    >>> list(gradients) == list(parameters)
    True
    """

    def __init__(self, spec: ModelSpec, xp: Namespace) -> None:
        if spec.architecture not in ("mlp", "heads"):
            raise ValueError(f"architecture must be 'mlp' or 'heads' for MLPModel, got {spec.architecture!r}")
        self.spec = spec
        self.xp = xp
        self._names = list(parameter_shapes(spec))
        layers = [f"layer{layer}" for layer in range(spec.depth)]
        self._image_layers = [f"image/{layer}" for layer in (*layers, "projection")]
        self._text_layers = [f"text/{layer}" for layer in (*layers, "projection")]

    def encode(self, parameters: Parameters, images: Array, texts: Array, /) -> tuple[Array, Array, Pullback]:
        """Return image features and text features, both (b, d), and the pullback of this call."""
        image_features, pull_image_layers, pull_image_norm = self._images(parameters, images)
        text_features, pull_text_layers, pull_text_norm = self._texts(parameters, texts)

        def pullback(image_gradient: Array, text_gradient: Array) -> Parameters:
            # The chain rule of each tower: back through the norm, then through the layers.
            gradients = pull_image_layers(pull_image_norm(image_gradient))
            gradients |= pull_text_layers(pull_text_norm(text_gradient))
            # The result has the order of the parameters.
            return {name: gradients[name] for name in self._names}

        return image_features, text_features, pullback

    def encode_images(self, parameters: Parameters, images: Array, /) -> Array:
        """Return features (b, d) of images (b, s, s, C) or of stored features (b, D)."""
        return self._images(parameters, images)[0]

    def encode_texts(self, parameters: Parameters, texts: Array, /) -> Array:
        """Return features (b, d) of bags of words (b, V) or of stored features (b, E)."""
        return self._texts(parameters, texts)[0]

    def _images(self, parameters: Parameters, images: Array) -> _Tower:
        self.spec.check_images(images)
        x = self.xp.reshape(images, (images.shape[0], -1))
        return self._tower(parameters, self._image_layers, x)

    def _texts(self, parameters: Parameters, texts: Array) -> _Tower:
        self.spec.check_texts(texts)
        return self._tower(parameters, self._text_layers, texts)

    def _tower(self, parameters: Parameters, layers: list[str], x: Array) -> _Tower:
        """Return the features of a tower, the pullback of all layers, and the pullback of `unit_norm`."""
        x, pull_layers = perceptron(parameters, layers, x, xp=self.xp)
        features, pull_norm = unit_norm(x, xp=self.xp)
        return features, pull_layers, pull_norm
