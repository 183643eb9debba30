"""The interface of a data set, and the types that it returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from drrho_clip.errors import BadInput

__all__ = [
    "DataSplits",
    "Dataset",
    "ImageReading",
    "Int32",
    "Int64",
    "Readable",
    "Sample",
    "Tokenizer",
    "UInt8",
    "UnreadableImage",
    "ZeroShot",
    "captions_of",
    "channels_of",
    "first_rows",
    "image_names",
]

# Arrays of one dtype and any shape; docstrings name the shape.
UInt8: TypeAlias = npt.NDArray[np.uint8]
Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]


class Tokenizer(Protocol):
    """Captions as numbers."""

    @property
    def context_length(self) -> int:
        """Length L of every row of tokens."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Number of different tokens."""
        ...

    def encode(self, captions: Iterable[str], /) -> Int32:
        """Return the tokens (b, L) of b captions."""
        ...

    def words(self, caption: str, /) -> list[str]:
        """Return the words or parts of words of a whole caption, as the tokenizer distinguishes them."""
        ...

    def knows(self, word: str, /) -> bool:
        """Return whether a word, as `words` returns it, has a token of its own."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as an object for `json.dump`."""
        ...


class ImageReading(Protocol):
    """The way in which a model reads images, if it has settings of its own; `ImageProcessor` is such a way."""

    def square(self, image: UInt8, /) -> UInt8:
        """Return an image (H, W, C) as the square (s, s, C) that the model reads."""
        ...

    def normalise(self, images: UInt8, /) -> npt.NDArray[np.float32]:
        """Return bytes as the numbers that the model reads."""
        ...


class UnreadableImage(BadInput):
    """The image of a pair cannot be decoded; training may take another pair in its place."""


class Sample(NamedTuple):
    """One image with its caption.

    Attributes
    ----------
    sample_index : int
        Stable row id, 0 .. len - 1 within a data set. The training methods store the running averages of the sample
        under this number.
    image : ndarray of uint8, shape (H, W, C)
        C is 1 (grey) or 3 (RGB).
    caption : str
        The caption; it is never empty.
    """

    sample_index: int
    image: UInt8
    caption: str


class ZeroShot(NamedTuple):
    """Images to classify by comparing them with one prompt per class.

    Attributes
    ----------
    class_names : tuple of str, length k
    prompts : tuple of str, length k
        The caption that stands for each class.
    images : ndarray of uint8, shape (m, H, W, C)
    labels : ndarray of int64, shape (m,)
        Positions in `class_names`.
    """

    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    images: UInt8
    labels: Int64


class Dataset(Protocol):
    """Random access to image-caption pairs.

    For every i in 0 .. len - 1, `dataset[i].sample_index == i`; another i raises IndexError.
    """

    @property
    def name(self) -> str:
        """A short name for tables and reports."""
        ...

    def __len__(self) -> int:
        """Return the number of pairs."""
        ...

    def __getitem__(self, index: int, /) -> Sample:
        """Return the pair with this row id."""
        ...

    def fingerprint(self) -> str:
        """Return a hex digest of the content (images, captions and labels in row order, and no paths)."""
        ...

    def image_digests(self) -> UInt8:
        """Return the first 16 bytes of the SHA-256 of each row's image, shape (n, 16).

        The SHA-256 is that of the bytes of the image file, or of the pixels if the image is not a file.
        """
        ...

    @property
    def image_ids(self) -> Int64:
        """Numbers of the rows' images, shape (n,): rows with equal numbers show the same image (equal digests).

        Images are numbered from 0 in the order in which they appear first.
        """
        ...

    def zero_shot(self, *, image_size: int | None = None, resize_mode: ImageReading | str = "crop") -> ZeroShot | None:
        """Return a classification task for images like those of this data set, or None if there is no such task.

        The images are square with side `image_size`; with None the data set chooses the size. `resize_mode` says how
        images that are not square become square; see `resize`.
        """
        ...


class Readable(Protocol):
    """A data set, or the part of a data set that reads images."""

    def __getitem__(self, index: int, /) -> Sample:
        """Return the pair with this row id."""
        ...


class DataSplits(NamedTuple):
    """Three data sets of one family that share no sample; validation and test captions are never swapped."""

    train: Dataset
    validation: Dataset
    test: Dataset


def captions_of(dataset: Dataset) -> Sequence[str]:
    """Return all captions in row order, without decoding images if the data set has an attribute `captions`.

    Parameters
    ----------
    dataset : Dataset
        Any data set.

    Returns
    -------
    sequence of str, length n

    Examples
    --------
    >>> from drrho_clip.data import scenes
    >>> len(captions_of(scenes(3, seed=0)))
    3
    """
    # The protocol does not ask for this attribute, because a data set on disk may not hold its captions in memory.
    captions: Sequence[str] | None = getattr(dataset, "captions", None)
    if captions is None:
        return tuple(dataset[index].caption for index in range(len(dataset)))
    return captions


def image_names(dataset: Dataset) -> Sequence[str]:
    """Return a name for the image of each row: the path that the table writes, or the row if there is no table.

    Examples
    --------
    >>> from drrho_clip.data import scenes
    >>> list(image_names(scenes(2, seed=0)))
    ['scenes-train row 0', 'scenes-train row 1']
    """
    paths: Sequence[str] | None = getattr(dataset, "paths", None)
    return [f"{dataset.name} row {row}" for row in range(len(dataset))] if paths is None else paths


def channels_of(dataset: Dataset) -> int:
    """Return the number of channels of the images, 1 or 3, by the first image that can be read.

    Raises
    ------
    UnreadableImage
        No image can be read.
    """
    flaw: UnreadableImage | None = None
    for row in range(len(dataset)):
        try:
            return int(dataset[row].image.shape[2])
        except UnreadableImage as error:
            flaw = flaw or error
    raise flaw or BadInput("dataset must hold at least one pair, got none")


def first_rows(dataset: Dataset) -> Int64:
    """Return the first row of each image, in rising order, so that an image with several captions counts once.

    Examples
    --------
    >>> from drrho_clip.data import scenes
    >>> first_rows(scenes(3, seed=0)).tolist()
    [0, 1, 2]
    """
    return np.sort(np.unique(dataset.image_ids, return_index=True)[1]).astype(np.int64)
