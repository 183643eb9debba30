"""The pairs of a world of heads with their features: a *pool*, which all runs share.

pairs.json    captions, concepts and labels of the pairs, and the wrong captions that training pairs get
features/     a cache for all pairs that a run may need: right pairs, pairs with a wrong caption, prompts of classes

Heads read features and no pixels, so the data sets of a pool hold no pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from drrho_clip.data import Dataset, captions_of, exchange_captions
from drrho_clip.data.content import fingerprint_of, image_numbers
from drrho_clip.data.protocol import ImageReading, Int64, Sample, UInt8
from drrho_clip.encoders import FixedFeatures
from drrho_clip.encoders.protocol import Floats
from drrho_clip.errors import BadInput
from drrho_clip.features import encode_pairs
from drrho_clip.features.manifest import Manifest, is_cache
from drrho_clip.files.disk import write_atomic
from drrho_clip.files.json_files import parse_json
from drrho_clip.files.lock import only_process
from drrho_clip.terminal.progress import Reporter

__all__ = ["Pool", "Recipe", "Source", "StoredPairs", "Towers", "features_of", "is_ready", "make_pool", "open_pool"]

_PAIRS, _FEATURES = "pairs.json", "features"
# Images or captions that the towers encode at a time.
_AT_ONCE: Final = 32
# A change of the code that changes pools gets another number.
_FORMAT: Final = 2
# The stream of random numbers that draws the wrong captions.
_WRONG: Final = 31
# Heads never see this pixel, which stands in the place of a picture.
_PIXEL: Final = np.zeros((1, 1, 1), dtype=np.uint8)


@dataclass(frozen=True)
class Recipe:
    """All that determines the content of a pool.

    Parameters
    ----------
    source : str
        The pairs: a name of `drrho_clip.reproduce.packaged.sources.SOURCES`.
    num_pairs : int
        Largest number of pairs, without further test sets.
    side : int or None
        Side of the pictures that the packaged image tower reads, in pixels; None for the towers of drawn scenes.
    swapped_fraction : float
        Share of the pairs that have a wrong caption in training, in [0, 1].

    Examples
    --------
    >>> Recipe("scenes", swapped_fraction=0.3).name
    'scenes-7ec24013'
    """

    source: str
    num_pairs: int = 12_000
    side: int | None = 96
    swapped_fraction: float = 0.0

    @property
    def name(self) -> str:
        """The name of the pool's folder; another recipe has another name."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return f"{self.source}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Towers(Protocol):
    """The frozen model of a pool."""

    @property
    def name(self) -> str:
        """The name of the model."""
        ...

    def images_of(self, dataset: Dataset, rows: Int64, *, batch_size: int, after_batch: Callable[[], None]) -> Floats:
        """Return the image features of some rows of a data set; `after_batch` is called after each batch."""
        ...

    def texts(self, captions: Sequence[str], /) -> Floats:
        """Return the text features of captions."""
        ...


@dataclass(frozen=True)
class Source:
    """The pairs of a pool before they are encoded.

    Parameters
    ----------
    pairs : Dataset
        n pairs with right captions, or with the captions that natural data have.
    concepts : sequence of int, length n
        Pairs with equal numbers show nearly the same, so they go into the same part.
    labels : sequence of int, length n
        The class of each pair; -1 for a pair without a class.
    prompts : sequence of str
        The caption that stands for each class.
    tests : mapping of str to sequence of int
        Rows of further test sets by name, which belong to no other part.
    """

    pairs: Dataset
    concepts: Sequence[int]
    labels: Sequence[int]
    prompts: Sequence[str] = ()
    tests: dict[str, list[int]] | None = None


@dataclass(frozen=True)
class Pool:
    """The contents of pairs.json, and the place of the features.

    Parameters
    ----------
    captions, wrong_captions : sequence of str, length n
        The caption of each pair, and the caption that the pair has in training; the two differ for swapped captions.
    concepts, labels : sequence of int, length n
        See `Source`.
    prompts : sequence of str
    tests : mapping
    digests : sequence of str, length n
        The digest of each image, in hex.
    """

    captions: Sequence[str]
    wrong_captions: Sequence[str]
    concepts: Sequence[int]
    labels: Sequence[int]
    prompts: Sequence[str]
    tests: dict[str, list[int]]
    digests: Sequence[str]

    @cached_property
    def image_digests(self) -> UInt8:
        """Digests of the images, shape (n, 16)."""
        return np.frombuffer(bytes.fromhex("".join(self.digests)), dtype=np.uint8).reshape(len(self.digests), -1)

    def pairs(self, name: str, rows: Int64, *, in_training: bool = False) -> StoredPairs:
        """Return the pairs of some rows; in training some have a wrong caption."""
        captions = self.wrong_captions if in_training else self.captions
        chosen = rows.tolist()
        labels = np.asarray([self.labels[row] for row in chosen], dtype=np.int64)
        is_swapped = np.asarray([captions[row] != self.captions[row] for row in chosen], dtype=np.bool_)
        return StoredPairs(name, [captions[row] for row in chosen], self.image_digests[rows], labels, is_swapped)


class StoredPairs:
    """Captions, and digests in place of images; see `Dataset`. Heads find the features of a pair by its content.

    Parameters
    ----------
    name : str
    captions : sequence of str, length n
    digests : ndarray of uint8, shape (n, 16)
    labels : ndarray of int64, shape (n,)
        The class of each pair; -1 for a pair without a class.
    is_swapped : ndarray of bool, shape (n,), optional
        True for each pair with a wrong caption; by default all False.

    Examples
    --------
    >>> pairs = StoredPairs("two", ["a", "b"], np.arange(32, dtype=np.uint8).reshape(2, 16), np.zeros(2, np.int64))
    >>> len(pairs), pairs[1].caption, pairs.image_ids.tolist()
    (2, 'b', [0, 1])
    """

    def __init__(
        self,
        name: str,
        captions: Sequence[str],
        digests: UInt8,
        labels: Int64,
        is_swapped: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self.name, self.captions, self.labels = name, tuple(captions), labels
        self.is_swapped = np.zeros(len(self.captions), dtype=np.bool_) if is_swapped is None else is_swapped
        self._digests = digests

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.captions)

    def __getitem__(self, index: int, /) -> Sample:
        """Return the pair with this row id; a single pixel stands for the image."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0 .. {len(self) - 1}, got {index}")
        return Sample(index, _PIXEL, self.captions[index])

    def subset(self, rows: Int64) -> StoredPairs:
        """Return the pairs of some rows."""
        captions = [self.captions[row] for row in rows.tolist()]
        return StoredPairs(self.name, captions, self._digests[rows], self.labels[rows], self.is_swapped[rows])

    def fingerprint(self) -> str:
        """Return the SHA-256 of digests and captions in row order, in hex."""
        return fingerprint_of([b"drrho stored pairs 1", self._digests.tobytes()], self.captions)

    def image_digests(self) -> UInt8:
        """Return the digest of each row's image, shape (n, 16)."""
        return self._digests

    @cached_property
    def image_ids(self) -> Int64:
        """Numbers of the rows' images, shape (n,)."""
        return image_numbers(self._digests)

    def zero_shot(self, *, image_size: int | None = None, resize_mode: ImageReading | str = "crop") -> None:
        """Return None: the images of the classes are rows of the pool."""


def is_ready(folder: Path) -> bool:
    """Return whether a folder has a finished pool."""
    cache = folder / _FEATURES
    return (folder / _PAIRS).is_file() and is_cache(cache) and Manifest.read(cache).finished


def make_pool(folder: Path, source: Source, towers: Towers, recipe: Recipe, *, title: str, quiet: bool) -> None:
    """Encode the pairs of a source, and write a pool.

    Parameters
    ----------
    folder : Path
    source : Source
    towers : PairEncoder
        The frozen model.
    recipe : Recipe
    title : str
        The words of the progress.
    quiet : bool
        Show no progress.

    Raises
    ------
    BadInput
        If the folder has features of other pairs or of another model, or if another process writes it.
    """
    captions = list(captions_of(source.pairs))
    tests = source.tests or {}
    # Captions of further test sets are no training captions.
    rows = np.setdiff1d(np.arange(len(captions)), [row for part in tests.values() for row in part])
    wrong = list(captions)
    changed, _ = exchange_captions(
        [captions[row] for row in rows.tolist()], recipe.swapped_fraction, np.random.default_rng([0, _WRONG])
    )
    for row, caption in zip(rows.tolist(), changed, strict=True):
        wrong[row] = caption
    swapped = [row for row, caption in enumerate(wrong) if caption != captions[row]]
    # Any image may stand beside a prompt, because texts are looked up on their own.
    images = np.asarray([*range(len(captions)), *swapped, *(0 for _ in source.prompts)], dtype=np.int64)
    texts = [*captions, *(wrong[row] for row in swapped), *source.prompts]
    digests = source.pairs.image_digests()
    folder.mkdir(parents=True, exist_ok=True)
    with only_process(folder):
        of_images, of_texts = _encoded(source.pairs, texts, towers, title=title, quiet=quiet)
        everything = StoredPairs(folder.name, texts, digests[images], np.full(len(texts), -1))
        encode_pairs(FixedFeatures(towers.name, of_images[images], of_texts), everything, folder / _FEATURES)
        pool = Pool(
            captions,
            wrong,
            list(source.concepts),
            list(source.labels),
            list(source.prompts),
            tests,
            [row.tobytes().hex() for row in digests],
        )
        write_atomic(folder / _PAIRS, json.dumps(asdict(pool)).encode())


def _encoded(pairs: Dataset, texts: Sequence[str], towers: Towers, *, title: str, quiet: bool) -> tuple[Floats, Floats]:
    """Return the features of all images (n, d) and of the texts (m, e); each different text is encoded once."""
    different = list(dict.fromkeys(texts))
    total = -(-len(pairs) // _AT_ONCE) + -(-len(different) // _AT_ONCE)
    with Reporter(title, total, quiet=quiet) as reporter:
        images = towers.images_of(pairs, np.arange(len(pairs)), batch_size=_AT_ONCE, after_batch=reporter.advance)
        parts = []
        for start in range(0, len(different), _AT_ONCE):
            parts.append(towers.texts(different[start : start + _AT_ONCE]))
            reporter.advance()
    row_of = {text: row for row, text in enumerate(different)}
    return images, np.concatenate(parts)[[row_of[text] for text in texts]]


@lru_cache(maxsize=8)
def open_pool(folder: Path) -> Pool:
    """Read a pool; raise BadInput if pairs.json is damaged."""
    try:
        return Pool(**parse_json((folder / _PAIRS).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{folder} must hold the pairs of a world, got: {error}") from None


def features_of(folder: Path) -> str:
    """Return the word of the setting `model` for heads over the features of a pool."""
    return f"features:{folder / _FEATURES}"
