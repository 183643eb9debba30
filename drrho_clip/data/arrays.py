"""Data sets in memory, and the exchange of captions that makes a data set noisy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from drrho_clip.data._checks import row_index
from drrho_clip.data.content import digests_of_pixels, fingerprint_of, image_numbers
from drrho_clip.data.preprocess import check_resize_mode
from drrho_clip.data.protocol import ImageReading, Int64, Sample, UInt8, ZeroShot
from drrho_clip.errors import BadInput

__all__ = ["ArrayDataset", "exchange_captions", "swap_captions"]

_Scalar = TypeVar("_Scalar", bound=np.generic)

# Attempts to give a sample another text; each succeeds with a chance of more than a half if no text is frequent.
_ROUNDS = 20


class ArrayDataset:
    """Images and captions in memory.

    Parameters
    ----------
    name : str
        A short name for tables and reports.
    images : ndarray of uint8, shape (n, H, W, C)
        C is 1 or 3. The array is not copied; the attribute is a read-only view.
    captions : sequence of str, length n
        No caption is empty.
    own_captions : sequence of str, length n, optional
        Caption i is the one that belongs to image i, even if `swap_captions` exchanged captions. Default: `captions`.
    is_swapped : ndarray of bool, shape (n,), optional
        True for each pair that has the caption of another sample; by default all False.
    zero_shot : callable, optional
        Takes `image_size` and returns the classification task, or None.

    Attributes
    ----------
    name, images, captions, own_captions, is_swapped
        The parameters of the same name; both kinds of captions are tuples.

    Raises
    ------
    BadInput
        The images are not uint8 of shape (n, H, W, C), or the lengths differ.

    Examples
    --------
    >>> import numpy as np
    >>> pair = ArrayDataset("two", np.zeros((2, 8, 8, 1), np.uint8), ["black", "black too"])
    >>> pair[1].sample_index, pair[1].caption
    (1, 'black too')
    """

    def __init__(
        self,
        name: str,
        images: UInt8,
        captions: Sequence[str],
        *,
        own_captions: Sequence[str] | None = None,
        is_swapped: npt.NDArray[np.bool_] | None = None,
        zero_shot: Callable[[int | None], ZeroShot | None] | None = None,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise BadInput(f"images must be uint8 of shape (n, H, W, 1 or 3), got {images.dtype} {images.shape}")
        # The arrays are read-only views, so that no pixel can change after the fingerprint was taken.
        size = images.shape[0]
        self.name = name
        self.images = _read_only(images)
        self.captions = tuple(captions)
        self.own_captions = self.captions if own_captions is None else tuple(own_captions)
        self.is_swapped = _read_only(np.zeros(size, dtype=np.bool_) if is_swapped is None else is_swapped)
        self._zero_shot = zero_shot
        self._fingerprint: str | None = None
        for argument, length in (
            ("captions", len(self.captions)),
            ("own_captions", len(self.own_captions)),
            ("is_swapped", self.is_swapped.shape[0]),
        ):
            if length != size:
                raise BadInput(f"{argument} must have one entry per image ({size}), got {length}")
        if not all(caption.strip() for caption in self.captions):
            raise BadInput("captions must not be empty, got an empty caption")

    def __repr__(self) -> str:
        """Return name, size and number of swapped captions."""
        swapped = int(self.is_swapped.sum())
        return f"<{self.name}: {len(self)} pairs {self.images.shape[1:]}, {swapped} captions swapped>"

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.captions)

    def __getitem__(self, index: int, /) -> Sample:
        """Return the pair with this row id; the image is a read-only view."""
        row = row_index(index, len(self))
        return Sample(row, self.images[row], self.captions[row])

    def fingerprint(self) -> str:
        """Return the SHA-256 of images, captions and their order, in hex; computed once."""
        if self._fingerprint is None:
            pixels = np.ascontiguousarray(self.images).data
            head = (b"drrho arrays 1", repr(self.images.shape).encode(), pixels)
            self._fingerprint = fingerprint_of(head, self.captions)
        return self._fingerprint

    def image_digests(self) -> UInt8:
        """Return the first 16 bytes of the SHA-256 of each image's pixels, shape (n, 16)."""
        return digests_of_pixels(self.images)

    @cached_property
    def image_ids(self) -> Int64:
        """Numbers of the rows' images, shape (n,): rows with equal pixels have equal numbers."""
        return image_numbers(self.image_digests())

    def zero_shot(self, *, image_size: int | None = None, resize_mode: ImageReading | str = "crop") -> ZeroShot | None:
        """Return the classification task of this data set, or None if there is no such task.

        The built-in tasks have square images, so `resize_mode` changes nothing.
        """
        check_resize_mode(resize_mode)
        return None if self._zero_shot is None else self._zero_shot(image_size)

    def subset(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> ArrayDataset:
        """Return the pairs of some rows as a new data set, numbered 0 .. len(rows) - 1 in the order of `rows`.

        Raises
        ------
        BadInput
            No row is given, a row is given twice, or a row lies outside 0 .. len - 1.
        """
        # A row that is given twice would be compared with itself as if it were two samples.
        chosen = np.asarray(rows, dtype=np.int64)
        if chosen.ndim != 1 or chosen.size == 0 or np.unique(chosen).size != chosen.size:
            raise BadInput(f"rows must be a list of one or more distinct rows, got shape {chosen.shape}")
        if chosen.min() < 0 or chosen.max() >= len(self):
            raise BadInput(f"rows must lie in 0 .. {len(self) - 1}, got {chosen.min()} .. {chosen.max()}")
        return ArrayDataset(
            self.name,
            self.images[chosen],
            [self.captions[row] for row in chosen],
            own_captions=[self.own_captions[row] for row in chosen],
            is_swapped=self.is_swapped[chosen],
            zero_shot=self._zero_shot,
        )


def swap_captions(
    captions: Sequence[str], fraction: float, rng: np.random.Generator
) -> tuple[tuple[str, ...], npt.NDArray[np.bool_]]:
    """Exchange the captions of randomly chosen samples, so that no chosen sample keeps its caption.

    Exactly `round(fraction * n)` samples are chosen, or none if that number is 1: a single sample has no partner. Every
    chosen sample gets a caption with a different *text*, unless more than half of the chosen samples share one text.

    Parameters
    ----------
    captions : sequence of str, length n
    fraction : float
        In [0, 1].
    rng : numpy.random.Generator
        The generator that draws the samples.

    Returns
    -------
    captions : tuple of str, length n
    is_swapped : ndarray of bool, shape (n,)
        True for each sample that has the caption of another sample now.

    Examples
    --------
    >>> import numpy as np
    >>> swapped, mask = swap_captions(["a", "b", "c", "d"], 0.5, np.random.default_rng(0))
    >>> int(mask.sum()), [old != new for old, new in zip("abcd", swapped)] == mask.tolist()
    (2, True)
    """
    size = len(captions)
    count = round(fraction * size)
    is_swapped = np.zeros(size, dtype=np.bool_)
    if count < 2:
        return tuple(captions), is_swapped
    # The chosen rows are in random order, except that rows with equal texts are side by side.
    groups: dict[str, list[int]] = {}
    for row in rng.permutation(size)[:count].tolist():
        groups.setdefault(captions[row], []).append(row)
    # Each chosen row takes the caption of the row `longest` places further on in `chosen`. No run of equal texts is
    # longer than that, so the row gets the text of another run.
    longest = max(len(rows) for rows in groups.values())
    chosen = [row for rows in groups.values() for row in rows]
    mixed = list(captions)
    for position, row in enumerate(chosen):
        mixed[row] = captions[chosen[(position + longest) % count]]
    is_swapped[chosen] = True
    return tuple(mixed), is_swapped


def exchange_captions(
    captions: Sequence[str], fraction: float, rng: np.random.Generator
) -> tuple[tuple[str, ...], npt.NDArray[np.bool_]]:
    """Exchange the captions of randomly chosen samples at random, also if few texts are different.

    `swap_captions` gives all chosen samples with one text the captions of the same few other texts. If the captions
    name one of ten classes, a model would learn two captions per class. Here the new text of a sample does not depend
    on its old text, except that the two differ.

    Parameters
    ----------
    captions : sequence of str, length n
    fraction : float
        Share of the samples that are chosen, in [0, 1].
    rng : numpy.random.Generator
        The generator that draws the samples and their captions.

    Returns
    -------
    captions : tuple of str, length n
    is_swapped : ndarray of bool, shape (n,)
        True for each sample whose text has changed. That is each chosen sample, unless too many of them share one text.

    Examples
    --------
    >>> import numpy as np
    >>> swapped, mask = exchange_captions(["cat", "dog", "cow"] * 100, 0.5, np.random.default_rng(0))
    >>> int(mask.sum()), len({text for text, old in zip(swapped, ["cat", "dog", "cow"] * 100) if old == "cat"})
    (150, 3)
    """
    _, old = np.unique(np.asarray(captions, dtype=object).astype(str), return_inverse=True)
    chosen = rng.permutation(len(captions))[: round(fraction * len(captions))]
    new = rng.permutation(chosen)  # the sample from which each chosen sample takes the caption
    for _ in range(_ROUNDS):
        # Exchange the captions of those that kept their text with those of random partners, if both change then.
        for place in np.flatnonzero(old[chosen] == old[new]).tolist():
            partner = int(rng.integers(len(chosen)))
            if old[new[partner]] != old[chosen[place]] and old[new[place]] != old[chosen[partner]]:
                new[[place, partner]] = new[[partner, place]]
    mixed = list(captions)
    for row, source in zip(chosen.tolist(), new.tolist(), strict=True):
        mixed[row] = captions[source]
    is_swapped = np.zeros(len(captions), dtype=np.bool_)
    is_swapped[chosen] = old[chosen] != old[new]
    return tuple(mixed), is_swapped


def _read_only(array: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    view = array.view()
    view.flags.writeable = False
    return view
