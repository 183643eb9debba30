"""Names, shapes and initial values of the parameters of Hugging Face's CLIP and SigLIP.

The names and shapes are those of the state dictionary of `transformers`, so weights go in both directions without a
translation. Kernels of products are (out, in), to be used as ``x @ kernel.T``; kernels of convolutions are OIHW. The
scale and the bias of the logits are no parameters here, because the training has a temperature of its own.

Initial values are normal numbers with the variances of `transformers`, which draws a part of SigLIP's initial values
from uniform distributions of the same variance.
"""

from __future__ import annotations

import math

from drrho_clip.models.hf_config import PairSizes, TowerSizes
from drrho_clip.models.starts import Start

__all__ = ["pair_starts"]


def pair_starts(sizes: PairSizes) -> dict[str, Start]:
    """Return shape and distribution of every parameter by name, in the order in which the parameters are drawn.

    Examples
    --------
    >>> from drrho_clip.models.hf_config import pair_sizes
    >>> starts = pair_starts(pair_sizes({"model_type": "clip", "projection_dim": 32}))
    >>> starts["visual_projection.weight"].shape
    (32, 768)
    """
    return _clip(sizes) if sizes.kind == "clip" else _siglip(sizes)


def _clip(sizes: PairSizes) -> dict[str, Start]:
    # The order is that of the random draws: a new parameter must go to the end.
    text, image, factor = sizes.text, sizes.image, sizes.factor
    patch = (image.width, sizes.channels, sizes.patch_size, sizes.patch_size)
    vision = "vision_model.embeddings"
    return {
        "text_model.embeddings.token_embedding.weight": Start((sizes.vocabulary_size, text.width), 0.02 * factor),
        "text_model.embeddings.position_embedding.weight": Start((sizes.context_length, text.width), 0.02 * factor),
        **_clip_blocks("text_model", text, factor),
        **_norm("text_model.final_layer_norm", text.width),
        f"{vision}.class_embedding": Start((image.width,), factor / math.sqrt(image.width)),
        f"{vision}.patch_embedding.weight": Start(patch, image.spread * factor),
        # One position more than patches: the first is that of the class token.
        f"{vision}.position_embedding.weight": Start((sizes.grid**2 + 1, image.width), image.spread * factor),
        # The misspelt name is the name in the state dictionary.
        **_norm("vision_model.pre_layrnorm", image.width),
        **_clip_blocks("vision_model", image, factor),
        **_norm("vision_model.post_layernorm", image.width),
        "visual_projection.weight": Start((sizes.feature_dim, image.width), factor / math.sqrt(image.width)),
        "text_projection.weight": Start((sizes.feature_dim, text.width), factor / math.sqrt(text.width)),
    }


def _clip_blocks(model: str, tower: TowerSizes, factor: float) -> dict[str, Start]:
    # The deeper the tower, the smaller are the kernels whose outputs are added to the tokens.
    base = factor / math.sqrt(tower.width)
    small = base / math.sqrt(2 * tower.depth)
    deviations = {"q_proj": small, "k_proj": small, "v_proj": small, "out_proj": base}
    return _blocks(model, tower, deviations, (base / math.sqrt(2.0), 0.0), (small, 0.0))


def _siglip(sizes: PairSizes) -> dict[str, Start]:
    text, image = sizes.text, sizes.image
    patch = (image.width, sizes.channels, sizes.patch_size, sizes.patch_size)
    vision, head = "vision_model.embeddings", "vision_model.head"
    # Rows of both tables have a norm of about 1.
    in_embedding = 1.0 / math.sqrt(text.width)
    return {
        "text_model.embeddings.token_embedding.weight": Start((sizes.vocabulary_size, text.width), in_embedding),
        "text_model.embeddings.position_embedding.weight": Start((sizes.context_length, text.width), in_embedding),
        **_siglip_blocks("text_model", text),
        **_norm("text_model.final_layer_norm", text.width),
        "text_model.head.weight": Start((sizes.feature_dim, text.width), 1.0 / math.sqrt(text.width)),
        "text_model.head.bias": Start((sizes.feature_dim,)),
        f"{vision}.patch_embedding.weight": Start(patch, 1.0 / math.sqrt(math.prod(patch[1:]))),
        f"{vision}.patch_embedding.bias": Start((image.width,)),
        f"{vision}.position_embedding.weight": Start((sizes.grid**2, image.width), 1.0 / math.sqrt(image.width)),
        **_siglip_blocks("vision_model", image),
        **_norm("vision_model.post_layernorm", image.width),
        # The head is an attention of one learned query, the probe, over all patches.
        f"{head}.probe": Start((1, 1, image.width), 1.0 / math.sqrt(image.width)),
        # A single kernel holds those of queries, keys and values, one below the other.
        f"{head}.attention.in_proj_weight": Start((3 * image.width, image.width), math.sqrt(0.5 / image.width)),
        f"{head}.attention.in_proj_bias": Start((3 * image.width,)),
        f"{head}.attention.out_proj.weight": Start((image.width, image.width), 1.0 / math.sqrt(image.width)),
        f"{head}.attention.out_proj.bias": Start((image.width,)),
        **_norm(f"{head}.layernorm", image.width),
        **_siglip_feed_forward(f"{head}.mlp", image),
    }


def _siglip_blocks(model: str, tower: TowerSizes) -> dict[str, Start]:
    # Unlike CLIP's, these spreads do not depend on the depth of the tower.
    kernel = _glorot(tower.width, tower.width)
    deviations = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), kernel)
    feed_forward = _glorot(tower.width, tower.hidden), 1e-6
    return _blocks(model, tower, deviations, feed_forward, feed_forward)


def _siglip_feed_forward(name: str, tower: TowerSizes) -> dict[str, Start]:
    deviation = _glorot(tower.width, tower.hidden)
    return {
        **_linear(f"{name}.fc1", tower.width, tower.hidden, deviation, 1e-6),
        **_linear(f"{name}.fc2", tower.hidden, tower.width, deviation, 1e-6),
    }


def _blocks(
    model: str,
    tower: TowerSizes,
    attention: dict[str, float],
    first: tuple[float, float],
    second: tuple[float, float],
) -> dict[str, Start]:
    """Return the parameters of all blocks; `first` and `second` have the deviations of kernel and bias of fc1, fc2."""
    # Both encoders of both kinds of model have the same blocks.
    width, starts = tower.width, {}
    for block in range(tower.depth):
        name = f"{model}.encoder.layers.{block}"
        starts.update(_norm(f"{name}.layer_norm1", width))
        for product, deviation in attention.items():
            starts.update(_linear(f"{name}.self_attn.{product}", width, width, deviation))
        starts.update(_norm(f"{name}.layer_norm2", width))
        starts.update(_linear(f"{name}.mlp.fc1", width, tower.hidden, *first))
        starts.update(_linear(f"{name}.mlp.fc2", tower.hidden, width, *second))
    return starts


def _linear(name: str, inputs: int, outputs: int, deviation: float, of_bias: float = 0.0) -> dict[str, Start]:
    return {f"{name}.weight": Start((outputs, inputs), deviation), f"{name}.bias": Start((outputs,), of_bias)}


def _norm(name: str, width: int) -> dict[str, Start]:
    return {f"{name}.weight": Start((width,), mean=1.0), f"{name}.bias": Start((width,))}


def _glorot(inputs: int, outputs: int) -> float:
    """Return the standard deviation of Glorot and Bengio (2010), for a kernel between layers of these sizes."""
    return math.sqrt(2.0 / (inputs + outputs))
