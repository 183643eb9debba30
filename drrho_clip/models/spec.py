"""The sizes of a pair of encoders, the shapes of the parameters, and the initial values of the parameters.

A model is a pair of encoders, also called towers: the first reads images, the second texts. Every backend builds the
model from the same `ModelSpec` and the same NumPy arrays, so training starts from the same numbers everywhere. Shapes:
batch b, image side s, C channels, vocabulary V, L tokens per text, feature_dim d.

``"mlp"``: images (b, s, s, C) are flattened in that order, texts are bags of words (b, V). Each encoder applies `depth`
layers ``relu(x @ kernel + bias)`` with ``4 * width`` units and a projection.

``"conv"``: images (b, s, s, C) pass three 3 x 3 convolutions of stride 2, padded by one pixel of zeros on every side,
with ``width``, ``2 * width`` and ``4 * width`` channels, each followed by ReLU. The result, (b, h, h, 4 width) with
h = ceil(s / 8), is flattened in that order and projected. A text is a row of L tokens; token 0 is padding.
With w = ``2 * width`` the text tower has three steps:

1. ``x`` is the sum of the token's vector and the position's vector, which are rows of two tables of parameters.
2. Each of `depth` blocks computes ``x = x + attention(norm(x))``, then ``x = x + feed_forward(norm(x))``. Attention is
   softmax attention with `heads` heads over the tokens that are not padding; scores are multiplied by
   ``sqrt(heads / w)``. A single product yields queries, keys and values side by side. Each head reads a contiguous
   part of the queries, of the keys and of the values. Feed-forward is ``relu(x @ kernel + bias) @ kernel + bias`` with
   2 w hidden units.
3. The mean of ``x`` over the tokens that are not padding passes a norm and a projection.

``norm`` is layer normalisation with `LAYER_NORM_EPSILON`. A projection is ``x @ kernel + bias`` with d outputs. After
the projection the features are divided by ``sqrt(sum of squares + NORM_EPSILON)``.

Kernels of products are (in, out), to be used as ``x @ kernel``; kernels of convolutions are OIHW, (out, in, 3, 3).

``"heads"``: multilayer perceptrons like those of ``"mlp"`` over features that another model has computed: (b, D) of
the images and (b, E) of the texts. With `depth` 0 a head is a projection.

``"hf"``: CLIP or SigLIP with the config.json of a Hugging Face model and the parameters of `hf_parameters`, which have
kernels (out, in). A text is a row of L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from drrho_clip.constants import LARGEST_DEPTH, LARGEST_MODEL
from drrho_clip.errors import BadInput
from drrho_clip.models.hf_config import PairSizes, pair_sizes
from drrho_clip.models.hf_parameters import pair_starts
from drrho_clip.models.starts import Start
from drrho_clip.terminal.safe_text import brief
from drrho_core.checks import Array

ARCHITECTURES = ("mlp", "conv", "hf", "heads")

LAYER_NORM_EPSILON = 1e-5
"""Added to the variance in layer normalisation."""

NORM_EPSILON = 1e-24
"""Added to the squared norm of a feature: too small to change a result, but it avoids 0 / 0 for a feature of zeros."""


@dataclass(frozen=True)
class ModelSpec:
    """Architecture and sizes of a pair of encoders.

    Parameters
    ----------
    architecture : {"mlp", "conv", "hf", "heads"}
        Two multilayer perceptrons; a convolution tower for images and a transformer for texts; a model of the Hugging
        Face hub, for which `of_hugging_face` builds the spec; or heads, for which `of_heads` builds the spec.
    image_size : int
        Side s of the square images.
    channels : int
        Channels C of the images.
    vocabulary_size : int
        Number V of different tokens; token 0 (padding) is one of them.
    context_length : int
        Number L of tokens in a text.
    feature_dim : int
        Size d of the features.
    width : int
        Scale of all hidden layers; the docstring of this module has the sizes.
    depth : int
        Hidden layers of an MLP tower, or blocks of the transformer.
    heads : int
        Attention heads of the transformer; the number must divide ``2 * width``. An MLP tower has no heads.
    hf_config : mapping, optional
        Content of config.json; for the architecture ``"hf"`` only. Width, depth and heads are then those of the image
        encoder.
    stored_features : mapping, optional
        For the architecture ``"heads"`` only: the sizes D ("image") and E ("text") of the features that the heads read,
        and the identity of the model that has computed these features ("model").
    image_processor : mapping, optional
        The way in which the model reads images, as `drrho_clip.data.ImageProcessor.to_json` returns it; for the
        architecture ``"hf"`` only.

    Raises
    ------
    BadInput
        If a field has the wrong type or is out of its range.

    Examples
    --------
    >>> spec = ModelSpec("mlp", image_size=8, channels=1, vocabulary_size=20, context_length=6, width=16)
    >>> spec.text_input, spec.hidden
    ('bag_of_words', 64)
    >>> ModelSpec.from_json(spec.to_json()) == spec
    True
    """

    architecture: str
    image_size: int
    channels: int
    vocabulary_size: int
    context_length: int
    feature_dim: int = 64
    width: int = 32
    depth: int = 2
    heads: int = 4
    # A dictionary has no hash, and the other fields tell most specs apart.
    hf_config: Mapping[str, Any] | None = field(default=None, hash=False)
    image_processor: Mapping[str, Any] | None = field(default=None, hash=False)
    stored_features: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(map(repr, ARCHITECTURES))
            raise BadInput(f"architecture must be one of {known}, got {self.architecture!r}")
        # Python counts True as an integer, but True is not a size.
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            minimum = 0 if name == "depth" and self.architecture == "heads" else minimum
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise BadInput(f"{name} must be an integer of at least {minimum}, got {brief(value)}")
            # Sizes of a damaged file, such as a width of 10**12, are refused here and not by the memory.
            most = LARGEST_DEPTH if name == "depth" else LARGEST_MODEL
            if value > most:
                raise BadInput(f"{name} must be at most {most}, got {brief(value)}")
        if (self.architecture == "hf") != (self.hf_config is not None):
            raise BadInput(f"hf_config must be given for the architecture 'hf' only, got {brief(self.hf_config)}")
        if (self.architecture == "heads") != (self.stored_features is not None):
            raise BadInput(
                f"stored_features must be given for the architecture 'heads' only, got {brief(self.stored_features)}"
            )
        if self.stored_features is not None:
            _check_stored(self.stored_features)
        if self.hf_config is not None:
            for name, value in _sizes_of(pair_sizes(self.hf_config)).items():
                if getattr(self, name) != value:
                    raise BadInput(f"{name} must be that of hf_config ({value}), got {brief(getattr(self, name))}")
        if self.architecture == "conv" and self.text_width % self.heads:
            raise BadInput(f"heads must divide 2 * width = {self.text_width}, got {brief(self.heads)}")
        count = sum(math.prod(shape) for shape in parameter_shapes(self).values())
        if count > LARGEST_MODEL:
            sizes = ", ".join(f"{name} {getattr(self, name)}" for name in _MINIMA if name != "heads")
            raise BadInput(f"a model must have at most {LARGEST_MODEL:,} parameters, got the sizes {sizes}")

    @classmethod
    def of_hugging_face(cls, config: Mapping[str, Any], image_processor: Mapping[str, Any] | None = None) -> ModelSpec:
        """Return the spec of a Hugging Face model.

        Parameters
        ----------
        config : mapping
            The content of config.json.
        image_processor : mapping, optional
            The way in which the model reads images.

        Raises
        ------
        BadInput
            If the model is neither CLIP nor SigLIP, or if a size is out of its range.

        Examples
        --------
        >>> spec = ModelSpec.of_hugging_face({"model_type": "siglip", "vision_config": {"image_size": 64}})
        >>> spec.architecture, spec.image_size, spec.feature_dim
        ('hf', 64, 768)
        """
        return cls("hf", **_sizes_of(pair_sizes(config)), hf_config=dict(config), image_processor=image_processor)

    @classmethod
    def of_heads(
        cls, image: int, text: int, *, model: Mapping[str, Any], feature_dim: int = 64, width: int = 32, depth: int = 2
    ) -> ModelSpec:
        """Return the spec of heads over the features of another model.

        Parameters
        ----------
        image, text : int
            Sizes D and E of the features of images and texts.
        model : mapping
            Identity of the model that has computed the features.
        feature_dim, width, depth : int
            Sizes of the heads.

        Examples
        --------
        >>> spec = ModelSpec.of_heads(512, 384, model={"name": "clip"}, depth=0)
        >>> parameter_shapes(spec)["text/projection/kernel"]
        (384, 64)
        """
        stored = {"image": image, "text": text, "model": dict(model)}
        # Heads see neither pixels nor tokens, so the sizes of both are the smallest.
        return cls("heads", 1, 1, 2, 1, feature_dim, width, depth, stored_features=stored)

    @property
    def hf_sizes(self) -> PairSizes:
        """Sizes of both encoders of a Hugging Face model.

        Raises
        ------
        ValueError
            If the architecture is another.
        """
        if self.hf_config is None:
            raise ValueError(f"architecture must be 'hf', got {self.architecture!r}")
        return pair_sizes(self.hf_config)

    @property
    def text_input(self) -> str:
        """Kind of input of the text tower.

        ``"bag_of_words"``, floats (b, V); ``"tokens"``, int32 (b, L); or ``"features"``, floats (b, E).
        """
        return {"mlp": "bag_of_words", "heads": "features"}.get(self.architecture, "tokens")

    @property
    def hidden(self) -> int:
        """Units in a hidden layer of an MLP tower."""
        return 4 * self.width

    @property
    def text_width(self) -> int:
        """Numbers per token inside the transformer."""
        return 2 * self.width

    def check_images(self, images: Array, /) -> None:
        """Raise ValueError unless images have shape (b, s, s, C) or, if they are features, (b, D)."""
        if self.stored_features is not None:
            _check_rows("images", images, self.stored_features["image"])
            return
        expected = (self.image_size, self.image_size, self.channels)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must have shape (b, {', '.join(map(str, expected))}), got {tuple(images.shape)}")

    def check_texts(self, texts: Array, /) -> None:
        """Raise ValueError unless texts have shape (b, V), (b, E) or, if they are tokens, (b, at most L)."""
        if self.stored_features is not None:
            _check_rows("texts", texts, self.stored_features["text"])
            return
        # A bag of words has a column per word; a batch of tokens may be cut to the longest text in it.
        bag = self.text_input == "bag_of_words"
        expected = self.vocabulary_size if bag else self.context_length
        if texts.ndim != 2 or texts.shape[1] > expected or (bag and texts.shape[1] < expected):
            rule = f"(b, {expected})" if bag else f"(b, at most {expected})"
            raise ValueError(f"texts must have shape {rule}, got {tuple(texts.shape)}")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary of numbers and strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Build a spec from the result of `to_json`.

        Raises
        ------
        BadInput
            If a field is unknown, missing or bad.
        """
        known = {field.name for field in fields(cls)}
        # Descriptions by earlier versions lack the fields of Hugging Face models.
        if not isinstance(values, Mapping) or set(values) | _LATER != known:
            names = brief(sorted(values) if isinstance(values, Mapping) else values)
            raise BadInput(f"a model must have the fields {', '.join(sorted(known - _LATER))}, got {names}")
        return cls(**values)


_LATER = {"hf_config", "image_processor", "stored_features"}

_MINIMA = {
    "image_size": 1,
    "channels": 1,
    "vocabulary_size": 2,
    "context_length": 1,
    "feature_dim": 1,
    "width": 1,
    "depth": 1,
    "heads": 1,
}


def _sizes_of(sizes: PairSizes) -> dict[str, Any]:
    """Return the sizes of a Hugging Face model as fields of a spec."""
    return {
        "image_size": sizes.image_size,
        "channels": sizes.channels,
        "vocabulary_size": sizes.vocabulary_size,
        "context_length": sizes.context_length,
        "feature_dim": sizes.feature_dim,
        "width": sizes.image.width,
        "depth": sizes.image.depth,
        "heads": sizes.image.heads,
    }


def _check_stored(stored: Mapping[str, Any]) -> None:
    """Raise BadInput unless the description of stored features has two sizes and a model."""
    if not isinstance(stored, Mapping) or set(stored) != {"image", "text", "model"}:
        raise BadInput(f"stored_features must have image, text and model, got {brief(stored)}")
    for name in ("image", "text"):
        size = stored[name]
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST_MODEL:
            raise BadInput(f"stored_features: {name} must be an integer of at least 1, got {brief(size)}")
    if not isinstance(stored["model"], Mapping):
        raise BadInput(f"stored_features: model must be an object, got {brief(stored['model'])}")


# The sizes of stored features are not among the sizes above, because heads see neither pixels nor tokens.
def _check_rows(name: str, rows: Array, size: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != size:
        raise ValueError(f"{name} must have shape (b, {size}), got {tuple(rows.shape)}")


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, in the order in which the parameters are drawn.

    Examples
    --------
    >>> spec = ModelSpec("mlp", image_size=8, channels=1, vocabulary_size=20, context_length=6, width=16, depth=1)
    >>> for name, shape in parameter_shapes(spec).items():
    ...     print(name, shape)
    image/layer0/kernel (64, 64)
    image/layer0/bias (64,)
    image/projection/kernel (64, 64)
    image/projection/bias (64,)
    text/layer0/kernel (20, 64)
    text/layer0/bias (64,)
    text/projection/kernel (64, 64)
    text/projection/bias (64,)
    """
    return {name: start.shape for name, start in _starts(spec).items()}


def initial_parameters(spec: ModelSpec, *, seed: int) -> dict[str, np.ndarray]:
    """Draw the parameters with which training starts on every backend.

    Parameters
    ----------
    spec : ModelSpec
        The encoders.
    seed : int
        At least 0. The numbers come from ``numpy.random.default_rng(seed)``, in the order of `parameter_shapes`.

    Returns
    -------
    dict of str to ndarray
        float64 arrays by name. Kernels that a ReLU follows have variance 2 / inputs (He et al. 2015, arXiv 1502.01852),
        all others 1 / inputs. In the transformer, the last kernel of each attention and of each feed-forward is divided
        by sqrt(2 depth), so that the variance of the sum over all blocks does not grow with the depth. Hugging Face
        models have the rules of `hf_parameters`.

    Raises
    ------
    BadInput
        If `seed` is not an integer of at least 0.

    Examples
    --------
    >>> spec = ModelSpec("mlp", image_size=8, channels=1, vocabulary_size=20, context_length=6)
    >>> initial_parameters(spec, seed=0)["image/layer0/kernel"].dtype
    dtype('float64')
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise BadInput(f"seed must be an integer of at least 0, got {seed!r}")
    generator = np.random.default_rng(seed)
    parameters = {}
    for name, start in _starts(spec).items():
        if start.deviation == 0.0:
            parameters[name] = np.full(start.shape, start.mean)
        else:
            parameters[name] = start.mean + start.deviation * generator.standard_normal(start.shape)
    return parameters


def _starts(spec: ModelSpec) -> dict[str, Start]:
    # The order of this dictionary is the order of the random draws: a new parameter must go to the end.
    if spec.hf_config is not None:
        return pair_starts(spec.hf_sizes)
    if spec.stored_features is not None:
        sides = ("image", "text")
        heads = (_mlp_tower(side, spec.stored_features[side], spec) for side in sides)
        return {name: start for head in heads for name, start in head.items()}
    if spec.architecture == "mlp":
        return {
            **_mlp_tower("image", spec.image_size**2 * spec.channels, spec),
            **_mlp_tower("text", spec.vocabulary_size, spec),
        }
    return {**_convolution_tower(spec), **_transformer_tower(spec)}


def _mlp_tower(side: str, inputs: int, spec: ModelSpec) -> dict[str, Start]:
    starts = {}
    # A ReLU halves the mean square of the activations; the gain of sqrt(2) compensates for that.
    for layer in range(spec.depth):
        starts.update(_linear(f"{side}/layer{layer}", inputs, spec.hidden, gain=math.sqrt(2.0)))
        inputs = spec.hidden
    return {**starts, **_projection(side, inputs, spec)}


def _convolution_tower(spec: ModelSpec) -> dict[str, Start]:
    starts = {}
    inputs, side = spec.channels, spec.image_size
    # Each convolution halves the side of the image, rounded up, and a 3 x 3 kernel has 9 * inputs weights per output.
    for layer, outputs in enumerate((spec.width, 2 * spec.width, 4 * spec.width)):
        starts[f"image/conv{layer}/kernel"] = Start((outputs, inputs, 3, 3), math.sqrt(2.0 / (9 * inputs)))
        starts[f"image/conv{layer}/bias"] = Start((outputs,))
        inputs, side = outputs, (side + 1) // 2
    return {**starts, **_projection("image", side**2 * inputs, spec)}


def _transformer_tower(spec: ModelSpec) -> dict[str, Start]:
    width = spec.text_width
    # The outputs of 2 * depth branches (attention or feed-forward) are added to x. This factor divides the variance of
    # each output by 2 * depth.
    at_end = 1.0 / math.sqrt(2 * spec.depth)
    starts = {
        "text/tokens": Start((spec.vocabulary_size, width), 0.5),
        "text/positions": Start((spec.context_length, width), 0.25),
    }
    for block in range(spec.depth):
        name = f"text/block{block}"
        starts.update(_norm(f"{name}/attention/norm", width))
        starts.update(_linear(f"{name}/attention/query_key_value", width, 3 * width))
        starts.update(_linear(f"{name}/attention/output", width, width, gain=at_end))
        starts.update(_norm(f"{name}/feed_forward/norm", width))
        starts.update(_linear(f"{name}/feed_forward/hidden", width, 2 * width, gain=math.sqrt(2.0)))
        starts.update(_linear(f"{name}/feed_forward/output", 2 * width, width, gain=at_end))
    return {**starts, **_norm("text/norm", width), **_projection("text", width, spec)}


def _linear(name: str, inputs: int, outputs: int, *, gain: float = 1.0) -> dict[str, Start]:
    return {
        f"{name}/kernel": Start((inputs, outputs), gain / math.sqrt(inputs)),
        f"{name}/bias": Start((outputs,)),
    }


def _norm(name: str, width: int) -> dict[str, Start]:
    return {f"{name}/scale": Start((width,), mean=1.0), f"{name}/bias": Start((width,))}


def _projection(side: str, inputs: int, spec: ModelSpec) -> dict[str, Start]:
    # All other biases start at 0. If this bias were 0 as well, an input of zeros would get a feature of zeros,
    # which has no direction.
    return {
        f"{side}/projection/kernel": Start((inputs, spec.feature_dim), 1.0 / math.sqrt(inputs)),
        f"{side}/projection/bias": Start((spec.feature_dim,), 0.01),
    }
