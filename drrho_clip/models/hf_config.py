"""The sizes of a CLIP or SigLIP model of the Hugging Face hub, read from the content of config.json.

config.json may leave out every value that equals the default of the library `transformers`, so the defaults stand here
as well. Both encoders are transformers: the image encoder reads patches of the image, the text encoder reads tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from drrho_clip.constants import LARGEST_DEPTH, LARGEST_MODEL
from drrho_clip.errors import BadInput
from drrho_clip.options import nearest_name
from drrho_clip.terminal.safe_text import brief

__all__ = ["KINDS", "PairSizes", "TowerSizes", "pair_sizes"]

KINDS = ("clip", "siglip")
"""The kinds of models that can be trained, by their names in config.json."""


class TowerSizes(NamedTuple):
    """Sizes of the transformer in one encoder.

    Attributes
    ----------
    width, hidden : int
        Numbers per token, and hidden units of a feed-forward layer.
    depth, heads : int
        Number of blocks, and of attention heads in a block.
    activation : str or None
        Activation of the feed-forward layers, by the name in config.json; None: the default of the kind of model.
    epsilon : float
        Added to the variance in layer normalisation.
    spread : float
        Standard deviation of initial values that `transformers` calls initializer_range.
    """

    width: int
    hidden: int
    depth: int
    heads: int
    activation: str | None
    epsilon: float
    spread: float


class PairSizes(NamedTuple):
    """Sizes of both encoders.

    Attributes
    ----------
    kind : {"clip", "siglip"}
        The kind of the model.
    image, text : TowerSizes
        The two transformers.
    image_size, patch_size, channels : int
        Sides of the image and of a patch, in pixels, and channels of the image.
    vocabulary_size, context_length : int
        Number of different tokens, and number of tokens of a text.
    feature_dim : int
        Size of the features.
    end_token : int
        The token at the end of a text, whose output is the feature of the text (CLIP only). With 2, the number in old
        files, the output of the largest token is taken.
    factor : float
        Factor of the standard deviations of initial values.
    """

    kind: str
    image: TowerSizes
    text: TowerSizes
    image_size: int
    patch_size: int
    channels: int
    vocabulary_size: int
    context_length: int
    feature_dim: int
    end_token: int
    factor: float

    @property
    def grid(self) -> int:
        """Number of patches along a side of the image; pixels that fill no whole patch are not read."""
        return self.image_size // self.patch_size


# The defaults of the configurations in transformers 5; they have been the same since SigLIP was added.
_CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
    "initializer_range": 0.02,
}
_CLIP_IMAGE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
}
_SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
_SIGLIP_TEXT = _SIGLIP | {"vocab_size": 32000, "max_position_embeddings": 64, "eos_token_id": 49407}
_SIGLIP_IMAGE = _SIGLIP | {"num_channels": 3, "image_size": 224, "patch_size": 16, "vision_use_head": True}
_DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": (_CLIP_TEXT, _CLIP_IMAGE),
    "siglip": (_SIGLIP_TEXT, _SIGLIP_IMAGE),
}


def pair_sizes(config: Mapping[str, Any]) -> PairSizes:
    """Return the sizes of the encoders that the content of a config.json describes.

    Parameters
    ----------
    config : mapping
        The content of config.json.

    Raises
    ------
    BadInput
        If the model is of another kind, or if a size is no number in its range.

    Examples
    --------
    >>> sizes = pair_sizes({"model_type": "clip", "text_config": {"hidden_size": 64}, "projection_dim": 32})
    >>> sizes.text.width, sizes.image.width, sizes.feature_dim
    (64, 768, 32)
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise BadInput(
            f"model_type must be one of {', '.join(KINDS)}, got {brief(kind)}{nearest_name(str(kind), KINDS)}"
        )
    text, image = (_part(config, name, _DEFAULTS[kind][place]) for place, name in enumerate(("text", "vision")))
    # The features of SigLIP have the size of the image encoder's tokens, those of CLIP have a size of their own.
    if kind == "clip":
        feature_dim = _size(config.get("projection_dim", 512), "projection_dim")
    else:
        feature_dim = _size(image["hidden_size"], "vision_config: hidden_size")
        # Without a value the text encoder has no other size than that of its tokens.
        from_text = text.get("projection_size") or text["hidden_size"]
        if from_text != feature_dim:
            raise BadInput(
                f"text_config: projection_size must be hidden_size of the image encoder ({feature_dim}), "
                f"got {brief(from_text)}"
            )
        if image["vision_use_head"] is not True:
            raise BadInput(f"vision_config: vision_use_head must be true, got {brief(image['vision_use_head'])}")
    # The names in a message are those of config.json, so that the user finds the entry.
    numbers = {name: _size(text[name], f"text_config: {name}") for name in ("vocab_size", "max_position_embeddings")}
    numbers |= {
        name: _size(image[name], f"vision_config: {name}") for name in ("num_channels", "image_size", "patch_size")
    }
    # Image processors give RGB, also for a grey image.
    if numbers["num_channels"] != 3:
        raise BadInput(f"vision_config: num_channels must be 3, got {numbers['num_channels']}")
    if numbers["patch_size"] > numbers["image_size"]:
        raise BadInput(
            f"vision_config: patch_size must be at most image_size ({numbers['image_size']}), got "
            f"{numbers['patch_size']}"
        )
    # SigLIP reads the last position of a text, so no token has a meaning of its own.
    end = text["eos_token_id"]
    if kind == "clip" and (isinstance(end, bool) or not isinstance(end, int)):
        raise BadInput(f"text_config: eos_token_id must be a whole number, got {brief(end)}")
    return PairSizes(
        kind=kind,
        image=_tower(image, "vision_config"),
        text=_tower(text, "text_config"),
        image_size=numbers["image_size"],
        patch_size=numbers["patch_size"],
        channels=numbers["num_channels"],
        vocabulary_size=numbers["vocab_size"],
        context_length=numbers["max_position_embeddings"],
        feature_dim=feature_dim,
        end_token=end if kind == "clip" else -1,
        factor=_positive(config.get("initializer_factor", 1.0), "initializer_factor"),
    )


def _part(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of text_config or vision_config, with the defaults."""
    values = config.get(f"{name}_config") or {}
    # Files of the first models hold a second copy of the values, which counts as a whole.
    copy = config.get(f"{name}_config_dict")
    for part in (values, copy or {}):
        if not isinstance(part, Mapping):
            raise BadInput(f"{name}_config must be an object, got {brief(part)}")
    return {**defaults, **values} if copy is None else {**values, **defaults, **copy}


def _tower(values: Mapping[str, Any], name: str) -> TowerSizes:
    # Each head reads an equal part of the numbers of a token.
    width, heads = (_size(values[key], f"{name}: {key}") for key in ("hidden_size", "num_attention_heads"))
    if width % heads:
        raise BadInput(f"{name}: num_attention_heads must divide hidden_size ({width}), got {heads}")
    depth = _size(values["num_hidden_layers"], f"{name}: num_hidden_layers", most=LARGEST_DEPTH)
    # Each backend knows the names of the activations that it has.
    activation = values.get("hidden_act")
    if not isinstance(activation, str | None):
        raise BadInput(f"{name}: hidden_act must be the name of an activation, got {brief(activation)}")
    return TowerSizes(
        width=width,
        hidden=_size(values["intermediate_size"], f"{name}: intermediate_size"),
        depth=depth,
        heads=heads,
        activation=activation,
        epsilon=_positive(values["layer_norm_eps"], f"{name}: layer_norm_eps"),
        spread=_positive(values["initializer_range"], f"{name}: initializer_range"),
    )


def _size(value: Any, name: str, *, most: int = LARGEST_MODEL) -> int:
    # Sizes of a damaged file, such as a width of 10**12, are refused here and not by the memory.
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise BadInput(f"{name} must be a whole number from 1 to {most}, got {brief(value)}")
    return value


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise BadInput(f"{name} must be a number above 0, got {brief(value)}")
    return float(value)
