"""The ``"conv"`` architecture in torch: pure functions of a flat mapping of tensors, differentiated by autograd.

`drrho_clip.models.spec` holds the formulas, parameter by parameter. Shapes: batch b, image side s, C channels,
context L, feature_dim d, w numbers per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor

from drrho_clip.models import LAYER_NORM_EPSILON, NORM_EPSILON, ModelSpec, parameter_shapes
from drrho_core.backend import Parameters, Pullback
from drrho_torch.pullback import with_pullback


class ConvModel:
    """A convolution tower for images and a transformer for texts; see `drrho_core.backend.Model`.

    Parameters
    ----------
    spec : ModelSpec
        The encoders, with architecture ``"conv"``.

    Raises
    ------
    ValueError
        If the architecture is not ``"conv"``; in the methods, if images or texts do not have the shape of the spec.

    Examples
    --------
    >>> from drrho_clip.models import initial_parameters
    >>> spec = ModelSpec("conv", image_size=8, channels=3, vocabulary_size=5, context_length=4, width=8)
    >>> parameters = {name: torch.asarray(values) for name, values in initial_parameters(spec, seed=0).items()}
    >>> model = ConvModel(spec)
    >>> images, texts = torch.zeros((2, 8, 8, 3), dtype=torch.float64), torch.asarray([[1, 2, 0, 0], [4, 3, 1, 0]])
    >>> image_features, text_features, pullback = model.encode(parameters, images, texts)
    >>> text_features.shape, text_features.requires_grad
    (torch.Size([2, 64]), False)
    >>> pullback(image_features, torch.ones_like(text_features))["text/tokens"].shape
    torch.Size([5, 16])
    """

    def __init__(self, spec: ModelSpec) -> None:
        if spec.architecture != "conv":
            raise ValueError(f"architecture must be 'conv' for ConvModel, got {spec.architecture!r}")
        self.spec = spec
        self._names = list(parameter_shapes(spec))

    def encode(self, parameters: Parameters, images: Tensor, texts: Tensor, /) -> tuple[Tensor, Tensor, Pullback]:
        """Return image features, text features, both (b, d), and the pullback of this call, to be called once."""
        own = {name: parameters[name] for name in self._names}
        return with_pullback(lambda leaves: (self._images(leaves, images), self._texts(leaves, texts)), own)

    def encode_images(self, parameters: Parameters, images: Tensor, /) -> Tensor:
        """Return features (b, d) of images (b, s, s, C)."""
        with torch.no_grad():
            return self._images(parameters, images)

    def encode_texts(self, parameters: Parameters, texts: Tensor, /) -> Tensor:
        """Return features (b, d) of tokens (b, L), 0 = padding."""
        with torch.no_grad():
            return self._texts(parameters, texts)

    def _images(self, parameters: Parameters, images: Tensor) -> Tensor:
        """Apply three convolutions of stride 2 and a projection: (b, s, s, C) -> (b, d)."""
        self.spec.check_images(images)
        # torch expects the axes (b, C, s, s). The view leaves the memory in the order (b, s, s, C), "channels last", in
        # which torch's convolutions are fastest.
        x = images.permute(0, 3, 1, 2)
        for layer in ("image/conv0", "image/conv1", "image/conv2"):
            kernel, bias = parameters[f"{layer}/kernel"], parameters[f"{layer}/bias"]
            x = F.relu(F.conv2d(x, kernel, bias, stride=2, padding=1))
        # The axes return to the order (b, s, s, C), in which the rows of the projection's kernel are stored.
        x = x.permute(0, 2, 3, 1).flatten(1)
        return _unit_norm(_linear(parameters, "image/projection", x))

    def _texts(self, parameters: Parameters, texts: Tensor) -> Tensor:
        """Apply the transformer, the mean over real tokens and a projection: (b, L) -> (b, d)."""
        self.spec.check_texts(texts)
        # Token 0 is padding: no token attends to it, and it does not count in the mean.
        real = texts != 0
        x = F.embedding(texts, parameters["text/tokens"]) + parameters["text/positions"][: texts.shape[1]]
        for block in range(self.spec.depth):
            x = x + self._attention(parameters, f"text/block{block}/attention", x, real)
            x = x + _feed_forward(parameters, f"text/block{block}/feed_forward", x)
        # The mean over the real tokens, as a weighted sum over all tokens.
        share = real.to(x.dtype) / torch.sum(real, dim=1, keepdim=True)
        x = torch.einsum("bl,blw->bw", share, x)
        return _unit_norm(_linear(parameters, "text/projection", _norm(parameters, "text/norm", x)))

    def _attention(self, parameters: Parameters, name: str, x: Tensor, real: Tensor) -> Tensor:
        """Apply layer normalisation and softmax attention over the real tokens: (b, L, w) -> (b, L, w)."""
        b, length, width = x.shape
        x = _linear(parameters, f"{name}/query_key_value", _norm(parameters, f"{name}/norm", x))
        # One projection computes query, key and value side by side; each head has w / heads of the numbers of a token.
        by_head = x.reshape(b, length, 3, self.spec.heads, width // self.spec.heads)
        query, key, value = by_head.permute(2, 0, 3, 1, 4)  # each (b, heads, L, w / heads)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None, :])
        return _linear(parameters, f"{name}/output", x.transpose(1, 2).reshape(b, length, width))


def _feed_forward(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """Apply layer normalisation and two linear maps with ReLU in between."""
    x = F.relu(_linear(parameters, f"{name}/hidden", _norm(parameters, f"{name}/norm", x)))
    return _linear(parameters, f"{name}/output", x)


def _linear(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """Return ``x kernel + bias``; torch's `linear` expects the transpose of the kernel."""
    return F.linear(x, parameters[f"{name}/kernel"].T, parameters[f"{name}/bias"])


def _norm(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """Apply layer normalisation over the last axis."""
    scale, bias = parameters[f"{name}/scale"], parameters[f"{name}/bias"]
    return F.layer_norm(x, scale.shape, scale, bias, LAYER_NORM_EPSILON)


def _unit_norm(x: Tensor) -> Tensor:
    """Divide each row by its length; NORM_EPSILON keeps the gradient of a zero row finite."""
    return x / torch.sqrt(torch.sum(x * x, dim=1, keepdim=True) + NORM_EPSILON)
