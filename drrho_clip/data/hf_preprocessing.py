"""Images and captions as a model of the Hugging Face hub reads them, from the files beside its weights.

`ImageProcessor` follows preprocessor_config.json, and `HuggingFaceTokenizer` follows tokenizer.json. Pillow and the
library `tokenizers` are enough for both. The results equal those of the library `transformers`, which
`tests/clip/data/test_hf_preprocessing.py` compares.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.data._checks import whole_number
from drrho_clip.data.hf_vocabulary import clip_tokenizer, has_vocabulary
from drrho_clip.data.preprocess import to_channels
from drrho_clip.data.protocol import Int32, UInt8
from drrho_clip.data.words import encoded_in_parts, library
from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.files.json_files import read_json
from drrho_clip.terminal.safe_text import brief

if TYPE_CHECKING:
    import tokenizers

__all__ = ["HuggingFaceTokenizer", "ImageProcessor", "read_model_config"]

_FORMAT: Final = "hugging-face-tokenizer"


class _Defaults(NamedTuple):
    """The values of a kind of image processor that preprocessor_config.json may leave out."""

    size: Mapping[str, int]
    crops: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# OpenAI's statistics of their training images; SigLIP maps bytes to [-1, 1].
_CLIP: Final = _Defaults(
    {"shortest_edge": 224}, True, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
_SIGLIP: Final = _Defaults({"height": 224, "width": 224}, False, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_KINDS: Final = {"CLIPImageProcessor": _CLIP, "CLIPFeatureExtractor": _CLIP, "SiglipImageProcessor": _SIGLIP}
# Numbers of Pillow's filters, which preprocessor_config.json contains.
_FILTERS: Final = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_LENGTHS: Final = {"clip": 77, "siglip": 64}


@dataclass(frozen=True)
class ImageProcessor:
    """The way in which a model reads an image: resize, crop, and normalise each channel.

    Parameters
    ----------
    image_size : int
        Side s of the square that the model reads, in pixels.
    height, width : int
        Size to which the whole image is brought, in pixels, if `shortest_edge` is None; both 0: no resizing.
    shortest_edge : int or None
        Size of the shorter side, in pixels; the longer side keeps the ratio.
    crops : bool
        Cut out the central square of side s. A smaller image gets black borders.
    resample : int
        Pillow's number of the filter, 0 to 5.
    scale : float
        Factor of the bytes, mostly 1/255.
    mean, std : tuple of float, length 3
        Subtracted from each scaled channel; then each channel is divided by `std`.

    Examples
    --------
    >>> processor = ImageProcessor(4, shortest_edge=4, crops=True)
    >>> square = processor.square(np.full((8, 12, 3), 255, np.uint8))
    >>> square.shape, processor.normalise(square[None]).dtype.name
    ((4, 4, 3), 'float32')
    """

    image_size: int
    height: int = 0
    width: int = 0
    shortest_edge: int | None = None
    crops: bool = False
    resample: int = 3
    scale: float = 1 / 255
    mean: tuple[float, float, float] = _CLIP.mean
    std: tuple[float, float, float] = _CLIP.std

    def __post_init__(self) -> None:
        whole_number(self.image_size, "image_size", at_least=1)
        if not self.crops and self.shortest_edge is None and (self.height, self.width) != (self.image_size,) * 2:
            raise BadInput(
                f"height and width must equal image_size ({self.image_size}) without a crop, got {self.height} and "
                f"{self.width}"
            )
        if not self.crops and self.shortest_edge is not None:
            raise BadInput("crops must be true if only the shorter side has a size, got false")
        if self.resample not in _FILTERS:
            raise BadInput(f"resample must be a number of a filter of Pillow, 0 to 5, got {brief(self.resample)}")
        if 0.0 in self.std:
            raise BadInput(f"image_std must not be 0, got {list(self.std)}")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> ImageProcessor:
        """Read the image processor of a model directory.

        Parameters
        ----------
        folder : path
            A directory with preprocessor_config.json, or with processor_config.json, in which newer versions of
            `transformers` write the same values.

        Raises
        ------
        BadInput
            If no such file is there, or if the file describes an image processor of another kind than CLIP's and
            SigLIP's.
        """
        file = Path(folder) / "preprocessor_config.json"
        combined = Path(folder) / "processor_config.json"
        if not file.exists() and combined.exists():
            file, values = combined, _mapping(combined).get("image_processor")
            if not isinstance(values, Mapping):
                raise BadInput(f"{file} must have an entry 'image_processor', got none")
        else:
            values = _mapping(file)
        try:
            return cls._from_config(values)
        except BadInput as error:
            raise BadInput(f"{file}: {error}") from None
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise BadInput(f"{file} must describe an image processor, got a damaged description ({error!r})") from None

    @classmethod
    def _from_config(cls, values: Mapping[str, Any]) -> ImageProcessor:
        kind = str(values.get("image_processor_type", values.get("feature_extractor_type", "CLIPImageProcessor")))
        # The fast variants and those that use Pillow have the same settings.
        defaults = _KINDS.get(kind.removesuffix("Fast").removesuffix("Pil"))
        if defaults is None:
            raise BadInput(f"image_processor_type must be one of {', '.join(_KINDS)}, got {brief(kind)}")
        if values.get("do_pad"):
            raise BadInput("do_pad must be false, got true")
        for name in ("do_rescale", "do_normalize"):
            if not values.get(name, True):
                raise BadInput(f"{name} must be true, got false")
        resize: dict[str, Any] = {}
        if values.get("do_resize", True):
            resize = _size(values.get("size", defaults.size), square=defaults is _SIGLIP)
        crops = bool(values.get("do_center_crop", defaults.crops))
        final = _size(values.get("crop_size", 224), square=True) if crops else resize
        if final.get("height") is None or final["height"] != final["width"]:
            raise BadInput(f"the model must read square images of one size, got {brief(final)}")
        return cls(
            final["height"],
            **resize,
            crops=crops,
            resample=values.get("resample", 3),
            scale=float(values.get("rescale_factor", 1 / 255)),
            mean=_channels(values.get("image_mean", defaults.mean)),
            std=_channels(values.get("image_std", defaults.std)),
        )

    def square(self, image: UInt8) -> UInt8:
        """Return an image as the square that the model reads, before normalising.

        Parameters
        ----------
        image : ndarray of uint8, shape (H, W, C)
            C is 1 (grey) or 3 (RGB).

        Returns
        -------
        ndarray of uint8, shape (s, s, 3)

        Raises
        ------
        MissingExtra
            If Pillow is not installed.
        """
        image = to_channels(image, 3)
        height, width = image.shape[:2]
        if self.shortest_edge is not None:
            # The longer side is rounded down, as in `transformers`.
            shorter, longer = sorted((height, width))
            long = int(self.shortest_edge * longer / shorter)
            size = (self.shortest_edge, long) if height <= width else (long, self.shortest_edge)
        else:
            size = (self.height, self.width) if self.height else (height, width)
        image = _resized(image, size, self.resample)
        return _central_square(image, self.image_size) if self.crops else image

    def normalise(self, images: UInt8) -> npt.NDArray[np.float32]:
        """Return the numbers that the model reads.

        Parameters
        ----------
        images : ndarray of uint8, shape (..., 3)

        Returns
        -------
        ndarray of float32, shape (..., 3)
            ``(scale * byte - mean) / std``, for each channel.
        """
        # A channel has 256 different values, so a table of them is exact, and quicker than arithmetic per pixel.
        values = (np.arange(256) * self.scale).astype(np.float32)[:, None]
        table = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        result: npt.NDArray[np.float32] = table.astype(np.float32)[images, np.arange(3)]
        return result

    def to_json(self) -> dict[str, Any]:
        """Return the fields as an object for `json.dump`; `from_json` reads it."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ImageProcessor:
        """Build the processor from the result of `to_json`.

        Raises
        ------
        BadInput
            If a field is unknown, missing or bad.

        Examples
        --------
        >>> processor = ImageProcessor(8, height=8, width=8)
        >>> ImageProcessor.from_json(json.loads(json.dumps(processor.to_json()))) == processor
        True
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != known:
            got = brief(sorted(map(str, values)) if isinstance(values, Mapping) else values)
            raise BadInput(f"an image processor must have the fields {', '.join(sorted(known))}, got {got}")
        return cls(**{**values, "mean": _channels(values["mean"]), "std": _channels(values["std"])})


class HuggingFaceTokenizer:
    """Captions as numbers, by the tokenizer of a Hugging Face model; the interface is that of `WordTokenizer`.

    Parameters
    ----------
    text : str
        The content of tokenizer.json.
    context_length : int
        Length L of every row of tokens, at least 1.
    padding : str
        The token that fills a row.

    Attributes
    ----------
    context_length : int
    vocabulary_size : int
        Number of different tokens.
    text, padding : str
        The arguments.

    Raises
    ------
    BadInput
        If the text is no tokenizer, or the tokenizer has no token `padding`.
    MissingExtra
        If the library `tokenizers` is not installed.
    """

    def __init__(self, text: str, context_length: int, *, padding: str) -> None:
        self.context_length = whole_number(context_length, "context_length", at_least=1)
        self.padding = padding
        self.text = text
        try:
            self._tokenizer: tokenizers.Tokenizer = library().Tokenizer.from_str(text)
        # The library raises a bare Exception.
        except Exception as error:
            if isinstance(error, MissingExtra):
                raise
            raise BadInput(f"tokenizer must be a tokenizer.json of the library tokenizers, got: {error}") from None
        number = self._tokenizer.token_to_id(padding)
        if number is None:
            raise BadInput(f"padding must be a token of the tokenizer, got {brief(padding)}")
        # The file may hold other settings, those of the program that wrote it.
        self._tokenizer.enable_truncation(max_length=self.context_length)
        self._tokenizer.enable_padding(pad_id=number, pad_token=padding, length=self.context_length)
        self._whole: tokenizers.Tokenizer = library().Tokenizer.from_str(text)
        self._whole.no_padding()
        self._whole.no_truncation()
        self._unknown: str | None = getattr(self._whole.model, "unk_token", None)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> HuggingFaceTokenizer:
        """Read the tokenizer of a model directory.

        Parameters
        ----------
        folder : path
            A directory with config.json and tokenizer.json (or, of a CLIP model, vocab.json and merges.txt);
            tokenizer_config.json names the token for padding. L is
            the number of positions of the text encoder.

        Raises
        ------
        BadInput
            If a file is missing or damaged, or if rows are filled at their start.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        config = read_model_config(folder)
        from_vocabulary = not file.is_file() and config["model_type"] == "clip" and has_vocabulary(folder)
        if not file.is_file() and not from_vocabulary:
            raise BadInput(
                f"{folder} must hold tokenizer.json, got no such file; with transformers, "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it"
            )
        length = config.get("text_config", {}).get("max_position_embeddings", _LENGTHS[config["model_type"]])
        beside = folder / "tokenizer_config.json"
        settings = _mapping(beside) if beside.exists() else {}
        if settings.get("padding_side", "right") != "right":
            raise BadInput(f"{beside}: padding_side must be 'right', got {brief(settings['padding_side'])}")
        padding = settings.get("pad_token", "<|endoftext|>" if config["model_type"] == "clip" else "</s>")
        padding = padding.get("content") if isinstance(padding, Mapping) else padding
        text = clip_tokenizer(folder) if from_vocabulary else None
        try:
            return cls(text or file.read_text(encoding="utf-8"), length, padding=str(padding))
        except BadInput as error:
            raise BadInput(f"{file}: {error}") from None
        except (UnicodeDecodeError, TypeError) as error:
            raise BadInput(f"{file} must be a tokenizer, got: {error}") from None

    @property
    def vocabulary_size(self) -> int:
        """Number of different tokens, the special tokens included."""
        # A vocabulary may have gaps, so the largest number counts.
        return max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, captions: Iterable[str]) -> Int32:
        """Return the tokens of captions.

        Parameters
        ----------
        captions : iterable of str, length b

        Returns
        -------
        ndarray of int32, shape (b, L)
            With the special tokens of the model. A long caption loses tokens at the end, but not the special token
            that ends a caption; a short row is filled with the token for padding.
        """
        return encoded_in_parts(captions, self._encoded, self.context_length)

    def _encoded(self, captions: Sequence[str]) -> Int32:
        rows = [row.ids for row in self._tokenizer.encode_batch_fast([_valid(caption) for caption in captions])]
        return np.array(rows, dtype=np.int32)

    def words(self, caption: str) -> list[str]:
        """Return all tokens of a caption as text, without special tokens; captions with equal tokens are one text.

        A part of the caption that has no token stands for itself, so that captions with different parts stay different.
        """
        text = _valid(caption)
        encoding = self._whole.encode(text, add_special_tokens=False)
        parts = zip(encoding.tokens, encoding.offsets, strict=True)
        return [self._normal(text[slice(*place)]) if token == self._unknown else token for token, place in parts]

    def _normal(self, text: str) -> str:
        """Return a text in the form that the tokenizer reads, such as lower case."""
        normalizer = self._whole.normalizer
        form: str = text if normalizer is None else normalizer.normalize_str(text)
        return form

    def token_of(self, number: object) -> str | None:
        """Return the token with a number, or None if there is no such token."""
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            return None
        return self._tokenizer.id_to_token(number)

    def cut_off(self, caption: str) -> bool:
        """Return whether a caption has more tokens than a row holds beside the special tokens."""
        room = self.context_length - self._tokenizer.num_special_tokens_to_add(False)
        return len(self.words(caption)) > room

    def number_of(self, token: str) -> int:
        """Return the number of a token.

        Raises
        ------
        BadInput
            If there is no such token.
        """
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise BadInput(f"token must be a token of the tokenizer, got {brief(token)}")
        return number

    def knows(self, word: str) -> bool:
        """Return whether a word, as `words` returns it, has a token of its own."""
        return word != self._unknown and self._tokenizer.token_to_id(word) is not None

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as an object for `json.dump`; `from_json` reads it."""
        return {
            "format": _FORMAT,
            "context_length": self.context_length,
            "padding": self.padding,
            "tokenizer": json.loads(self.text),
        }

    @staticmethod
    def wrote(document: object) -> bool:
        """Return whether an object is a result of `to_json`."""
        return isinstance(document, Mapping) and document.get("format") == _FORMAT

    @classmethod
    def from_json(cls, document: object) -> HuggingFaceTokenizer:
        """Build the tokenizer from the result of `to_json`.

        Raises
        ------
        BadInput
            If the document has another format, or is damaged.
        """
        if not isinstance(document, Mapping) or document.get("format") != _FORMAT:
            raise BadInput(f"tokenizer must be a JSON object of format {_FORMAT!r}, got something else")
        length, padding = document.get("context_length"), document.get("padding")
        if isinstance(length, bool) or not isinstance(length, int) or not isinstance(padding, str):
            raise BadInput("tokenizer must have a whole number 'context_length' and a text 'padding'")
        return cls(json.dumps(document.get("tokenizer"), ensure_ascii=False), length, padding=padding)


def read_model_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return config.json of a CLIP or SigLIP directory.

    Raises
    ------
    BadInput
        If the directory or the file is missing or damaged, or describes another kind of model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder} must be the directory of a Hugging Face model, got no such directory")
    config = dict(_mapping(folder / "config.json"))
    kind = config.get("model_type")
    if kind not in _LENGTHS:
        raise BadInput(f"{folder / 'config.json'}: model_type must be {' or '.join(_LENGTHS)}, got {brief(kind)}")
    if not isinstance(config.get("text_config", {}), Mapping):
        raise BadInput(f"{folder / 'config.json'}: text_config must be an object, got {brief(config['text_config'])}")
    return config


def _mapping(file: Path) -> Mapping[str, Any]:
    values = read_json(file, "a part of a Hugging Face model")
    if not isinstance(values, Mapping):
        raise BadInput(f"{file} must hold a JSON object, got {brief(values)}")
    return values


def _size(value: object, *, square: bool) -> dict[str, Any]:
    """Return the entry `size` or `crop_size` as fields of the processor; older files hold a single number."""
    if isinstance(value, Mapping):
        if set(value) == {"shortest_edge"}:
            return {"shortest_edge": whole_number(value["shortest_edge"], "shortest_edge", at_least=1)}
        if set(value) == {"height", "width"}:
            return {name: whole_number(value[name], name, at_least=1) for name in ("height", "width")}
        raise BadInput(f"size must have shortest_edge, or height and width, got {brief(dict(value))}")
    side = whole_number(value, "size", at_least=1)
    return {"height": side, "width": side} if square else {"shortest_edge": side}


def _channels(value: Any) -> tuple[float, float, float]:
    """Return one number per channel; a single number holds for all channels."""
    numbers = tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),) * 3
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise BadInput(f"image_mean and image_std must have 3 finite numbers, got {brief(value)}")
    return numbers


def _resized(image: UInt8, size: tuple[int, int], resample: int) -> UInt8:
    """Return an image with the size (rows, columns)."""
    if image.shape[:2] == size:
        return image
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("resizing images", "Pillow") from None
    picture = Image.fromarray(np.ascontiguousarray(image))
    resized = picture.resize((size[1], size[0]), Image.Resampling(resample))
    return np.asarray(resized, dtype=np.uint8)


def _central_square(image: UInt8, side: int) -> UInt8:
    """Cut out the central square; where the image is too small, the square is black."""
    square = np.zeros((side, side, 3), dtype=np.uint8)
    places = []
    for length in image.shape[:2]:
        # If the difference is odd, a border has its additional pixel at the start, and a cut at the end.
        border, cut = max(0, math.ceil((side - length) / 2)), max(0, (length - side) // 2)
        places.append((slice(border, border + min(length, side)), slice(cut, cut + min(length, side))))
    (rows, from_rows), (columns, from_columns) = places
    square[rows, columns] = image[from_rows, from_columns]
    return square


def _valid(caption: str) -> str:
    # The library refuses half of a surrogate pair, which a caption from JSON may hold.
    return caption.encode("utf-8", "replace").decode("utf-8") if not caption.isascii() else caption
