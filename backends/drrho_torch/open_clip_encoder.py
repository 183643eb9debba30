"""Models of open_clip as reference models: the word ``open_clip:NAME/PRETRAINED`` of the command line.

The adapter calls open_clip's own preprocessing and tokenizer. Of the package it needs `create_model_and_transforms` and
`get_tokenizer`, and of the model `encode_image`, `encode_text` and `logit_scale`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from drrho_clip.encoders import ForeignEncoder
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import digest

__all__ = ["OpenClipTokenizer", "open_open_clip"]

# Names that lead to a repository or a folder, which holds the weights as well.
_WHOLE = ("hf-hub:", "local-dir:")
# The content of preprocessing and tokenizer is known by what they do to an image and to texts.
_PROBE = np.add.outer(np.arange(61) * 4, np.arange(97) * 2).astype(np.uint8)[..., None].repeat(3, axis=2)
_TEXTS = ("a photo of a cat.", "Zwölf Bären, 12 bears & 3 mice!")


class OpenClipTokenizer:
    """A tokenizer of open_clip with the methods of `drrho_clip.data.Tokenizer`.

    Parameters
    ----------
    tokenize : callable
        Maps a list of b texts to tokens (b, L).
    """

    def __init__(self, tokenize: Any) -> None:
        self._tokenize = tokenize
        self.context_length = self.encode(["a"]).shape[1]

    @property
    def vocabulary_size(self) -> int:
        """Number of different tokens, as far as the tokenizer tells it, else the largest possible number."""
        return int(getattr(self._tokenize, "vocab_size", np.iinfo(np.int32).max))

    def encode(self, captions: Iterable[str], /) -> npt.NDArray[np.int32]:
        """Return the tokens (b, L) of b captions."""
        return np.asarray(self._tokenize(list(captions))).astype(np.int32)

    def words(self, caption: str, /) -> list[str]:
        """Return the tokens of a caption as numbers in text form; a caption is cut off after L tokens."""
        return [str(token) for token in self.encode([caption])[0].tolist() if token]

    def knows(self, word: str, /) -> bool:  # noqa: ARG002 (contract)
        """Return True: the tokenizers of open_clip divide every word into known parts."""
        return True

    def to_json(self) -> dict[str, Any]:
        """Return the tokens of two texts, which identify the tokenizer."""
        return {"kind": type(self._tokenize).__name__, "tokens": self.encode(_TEXTS).tolist()}


def open_open_clip(place: str, *, device: torch.device) -> ForeignEncoder:
    """Open a model of open_clip.

    Parameters
    ----------
    place : str
        ``NAME/PRETRAINED``, such as ``ViT-B-32/laion2b_s34b_b79k``; ``NAME`` alone if open_clip has weights of one
        kind for this name; or a name that begins with ``hf-hub:`` or ``local-dir:``. PRETRAINED may be a path.
    device : torch.device
        The device of the model.

    Returns
    -------
    ForeignEncoder

    Raises
    ------
    BadInput
        If open_clip is not installed, cannot be imported, or refuses the name.
    """
    word = f"open_clip:{place}"
    try:
        library = importlib.import_module("open_clip")
    # A version that does not fit to the installed torch fails with errors of many classes.
    except Exception as error:
        raise BadInput(f"{word} needs the package open_clip_torch, got: {_line(error)}") from None
    name, pretrained = (place, None) if place.startswith(_WHOLE) else _parts(library, place)
    try:
        model, _, preprocess = library.create_model_and_transforms(name, pretrained=pretrained, device=str(device))
        tokenize = library.get_tokenizer(name)
    except Exception as error:
        raise BadInput(f"model must be one that open_clip can open, got {word}: {_line(error)}") from None
    model.eval()

    def read_image(image: npt.NDArray[np.uint8]) -> np.ndarray:
        from PIL import Image

        picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
        return np.asarray(preprocess(picture.convert("RGB")))

    @torch.no_grad()
    def encode_images(images: np.ndarray) -> np.ndarray:
        return _host(model.encode_image(torch.asarray(images, device=device)))

    @torch.no_grad()
    def encode_texts(tokens: np.ndarray) -> np.ndarray:
        return _host(model.encode_text(torch.asarray(tokens, dtype=torch.int64, device=device)))

    tokenizer = OpenClipTokenizer(tokenize)
    probe = read_image(_PROBE)
    widths = encode_images(probe[None]).shape[1], encode_texts(tokenizer.encode(["a"])).shape[1]
    return ForeignEncoder(
        name=word,
        encode_images=encode_images,
        encode_texts=encode_texts,
        read_image=read_image,
        tokenizer=tokenizer,
        image_size=probe.shape[-1],
        feature_dims=widths,
        temperature=math.exp(-float(model.logit_scale.detach())),
        weights=digest({key: _host(value) for key, value in model.state_dict().items()}),
        configuration=_configuration(model),
        preprocessing={"image": hashlib.sha256(probe.tobytes()).hexdigest(), "text": tokenizer.to_json()},
    )


def _configuration(model: Any) -> list[Any]:
    """Return class and settings of each module, such as activations, attention heads and the eps of normalisations."""
    return [
        [name, type(module).__name__, {key: value for key, value in vars(module).items() if _is_setting(key, value)}]
        for name, module in model.named_modules()
    ]


def _is_setting(key: str, value: object) -> bool:
    return not key.startswith("_") and key != "training" and isinstance(value, bool | int | float | str)


def _parts(library: Any, place: str) -> tuple[str, str]:
    """Return name and weights; without weights in the word, those of the only kind that there is."""
    name, _, pretrained = place.partition("/")
    names = list(library.list_models()) if hasattr(library, "list_models") else [name]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise BadInput(f"model must be one that open_clip has, got open_clip:{place}{hint}")
    if pretrained:
        return name, pretrained
    tags = (
        list(library.list_pretrained_tags_by_model(name)) if hasattr(library, "list_pretrained_tags_by_model") else []
    )
    # Without weights open_clip would draw random parameters.
    if len(tags) != 1:
        known = f", such as {', '.join(tags[:3])}" if tags else ""
        raise BadInput(f"model must name the weights, open_clip:NAME/PRETRAINED{known}, got open_clip:{place}")
    return name, str(tags[0])


def _host(tensor: torch.Tensor) -> np.ndarray:
    # NumPy has no bfloat16, and features of half precision are compared in float32.
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    array: np.ndarray = (tensor.float() if half else tensor).detach().cpu().numpy()
    return array


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
