"""Models with a size by name or by a configuration of the user's own, and a tokenizer that is trained on the captions.

Such a model is a CLIP (or SigLIP) with random weights. After training it becomes a Hugging Face directory like every
other model of this kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from drrho_clip.data.hf_preprocessing import HuggingFaceTokenizer, ImageProcessor
from drrho_clip.data.words import library
from drrho_clip.errors import BadInput
from drrho_clip.files.json_files import read_json
from drrho_clip.models import ModelSpec
from drrho_clip.models.hf_config import pair_sizes
from drrho_clip.terminal.safe_text import brief

__all__ = ["SIZES", "new_model", "sizes_by_name", "spec_of_size", "train_tokenizer"]

START, END = "<|startoftext|>", "<|endoftext|>"
_LARGEST_VOCABULARY: Final = 49_408


def _tower(width: int, depth: int, heads: int) -> dict[str, Any]:
    # A feed-forward layer has four times as many units as a token has numbers.
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "hidden_act": "gelu",
    }


def _clip(
    image: dict[str, Any], text: dict[str, Any], *, side: int, patch: int, context: int, features: int
) -> dict[str, Any]:
    return {
        "model_type": "clip",
        "projection_dim": features,
        "vision_config": image | {"image_size": side, "patch_size": patch},
        "text_config": text | {"max_position_embeddings": context, "vocab_size": _LARGEST_VOCABULARY},
    }


# The sizes of the last three models are those of the models of these names in open_clip.
_BASE: Final = _tower(768, 12, 12), _tower(512, 12, 8)
SIZES: Final[Mapping[str, dict[str, Any]]] = {
    "tiny": _clip(_tower(64, 2, 2), _tower(64, 2, 2), side=32, patch=8, context=32, features=64),
    "small": _clip(_tower(192, 6, 3), _tower(192, 6, 3), side=64, patch=8, context=77, features=128),
    "ViT-S-16": _clip(_tower(384, 12, 6), _tower(384, 12, 6), side=224, patch=16, context=77, features=384),
    "ViT-B-32": _clip(*_BASE, side=224, patch=32, context=77, features=512),
    "ViT-B-16": _clip(*_BASE, side=224, patch=16, context=77, features=512),
}
"""The content of config.json by the name of the size; the vocabulary is the largest that a tokenizer may have."""


def sizes_by_name(model: str) -> dict[str, Any]:
    """Return the content of a config.json for the name of a size, or for a file that ends in .json.

    Raises
    ------
    BadInput
        If the file is missing or damaged, or describes another model than CLIP or SigLIP.

    Examples
    --------
    >>> sizes_by_name("ViT-B-32")["projection_dim"]
    512
    """
    if model in SIZES:
        return SIZES[model]
    values = read_json(Path(model), "the configuration of a CLIP")
    if not isinstance(values, Mapping):
        raise BadInput(f"{model} must hold a JSON object, got {brief(values)}")
    # A configuration without a kind is a CLIPConfig.
    config = {"model_type": "clip", **values}
    try:
        pair_sizes(config)
    except BadInput as error:
        raise BadInput(f"{model}: {error}") from None
    return config


def new_model(config: Mapping[str, Any], captions: Iterable[str]) -> tuple[ModelSpec, HuggingFaceTokenizer]:
    """Return the encoders and the tokenizer of a new model for captions.

    Parameters
    ----------
    config : mapping
        The content of a config.json. The vocabulary of the tokenizer has at most vocab_size tokens; the model gets the
        vocabulary and the special tokens of the tokenizer.
    captions : iterable of str
        The training captions.

    Examples
    --------
    >>> spec, tokenizer = new_model(SIZES["tiny"], ["a red circle", "a red square"])
    >>> spec.vocabulary_size == tokenizer.vocabulary_size, tokenizer.words("A RED")
    (True, ['Ġa', 'Ġred'])
    """
    sizes = pair_sizes(config)
    tokenizer = train_tokenizer(captions, sizes.vocabulary_size, sizes.context_length)
    start, end = (tokenizer.number_of(token) for token in (START, END))
    text = dict(config.get("text_config") or {}) | {
        "vocab_size": tokenizer.vocabulary_size,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    # Images are read as by the published models of this kind.
    side = sizes.image_size
    processor = ImageProcessor(side, shortest_edge=side, crops=True)
    if sizes.kind == "siglip":
        half = (0.5, 0.5, 0.5)
        processor = ImageProcessor(side, height=side, width=side, mean=half, std=half)
    return ModelSpec.of_hugging_face({**config, "text_config": text}, processor.to_json()), tokenizer


def spec_of_size(model: str | None) -> ModelSpec:
    """Return the encoders of a model of known size, for a plan without captions: the vocabulary is the largest.

    Raises
    ------
    BadInput
        If the setting `model` names no size, no file that ends in .json and no directory.

    Examples
    --------
    >>> spec_of_size("tiny").vocabulary_size
    49408
    """
    if model is not None and (model in SIZES or model.endswith(".json")):
        return ModelSpec.of_hugging_face(sizes_by_name(model))
    raise BadInput(
        f"model must be one of {', '.join(SIZES)} or a file that ends in .json with num_pairs, because the vocabulary "
        f"of other encoders depends on the captions, got {'none' if model is None else brief(model)}"
    )


def train_tokenizer(captions: Iterable[str], vocabulary_size: int, context_length: int) -> HuggingFaceTokenizer:
    """Train a tokenizer of byte pairs (BPE) on captions.

    A caption is brought to Unicode form NFC and to lower case. Tokens are sequences of bytes, and every byte is a
    token, so the tokenizer can write every text.

    Parameters
    ----------
    captions : iterable of str
        The training captions.
    vocabulary_size : int
        Largest number of tokens, at least 258: the bytes, and the tokens for the start and the end of a caption.
    context_length : int
        Number of tokens of a text, at least 3.

    Raises
    ------
    BadInput
        If a size is too small.
    MissingExtra
        If the library `tokenizers` is not installed.
    """
    if vocabulary_size < 258:
        raise BadInput(f"vocab_size must be at least 258 for a tokenizer of bytes, got {vocabulary_size}")
    if context_length < 3:
        raise BadInput(f"max_position_embeddings must be at least 3 for start, word and end, got {context_length}")
    module = library()
    # The end token gets the number 1; the number 2 would mean an old file, see `PairSizes.end_token`.
    tokenizer = module.Tokenizer(module.models.BPE())
    tokenizer.normalizer = module.normalizers.Sequence([module.normalizers.NFC(), module.normalizers.Lowercase()])
    tokenizer.pre_tokenizer = module.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = module.decoders.ByteLevel()
    trainer = module.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        # A pair of tokens that occurs once would become a token that is learnt from a single caption.
        min_frequency=2,
        special_tokens=[START, END],
        initial_alphabet=module.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Captions of other programs may hold halves of surrogate pairs, which the library refuses.
    valid = (caption.encode("utf-8", "replace").decode() for caption in captions)
    tokenizer.train_from_iterator(valid, trainer)
    tokenizer.post_processor = module.processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, END)]
    )
    return HuggingFaceTokenizer(tokenizer.to_str(), context_length, padding=END)
