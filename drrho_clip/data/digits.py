"""Scikit-learn's handwritten digits, with captions made from properties of the images.

The data set has 1,797 real images of 8 x 8 pixels. It is part of scikit-learn, so nothing is downloaded. A caption
names the digit and four properties that were measured on the image: the amount of ink, the slant, the width, and the
mean height of the ink. Each measure is a ratio of integers. A measure has two thresholds, the tertiles
over all images: one third of the images lies below the first tertile, one third above the second.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.data._checks import share, whole_number
from drrho_clip.data.arrays import ArrayDataset, swap_captions
from drrho_clip.data.preprocess import resize
from drrho_clip.data.protocol import DataSplits, Int64, UInt8, ZeroShot
from drrho_clip.errors import BadInput, MissingExtra

__all__ = ["DIGITS", "PARTS", "digit_splits", "digits"]

DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PARTS: Final = ("train", "validation", "test", "reference")
_HELDOUT_PER_CLASS: Final = 20

# For each measure, the words of a caption below the first tertile, between the tertiles, and above the second one.
_INK: Final = ("thin", "medium", "bold")
_WIDTH: Final = ("narrow", "regular", "wide")
_SLANT: Final = ("leaning left", "upright", "leaning right")
_WEIGHT: Final = ("heavy at the top", "balanced", "heavy at the bottom")

_FULL: Final = "a {ink} {width} handwritten {digit}, {slant} and {weight}"
_TEMPLATES: Final = (
    "a photo of the digit {digit}",
    "a {adjectives}handwritten {digit}{rest}",
    "the digit {digit}{rest}",
    "a {adjectives}{digit}{rest}",
    "a photo of a {adjectives}{digit}{rest}",
)


class _Source(NamedTuple):
    """All images; `attributes` has one column for each of ink, width, slant and weight, with values 0 to 2."""

    images: UInt8
    labels: Int64
    attributes: Int64


def digits(
    part: str,
    *,
    seed: int = 0,
    swapped_fraction: float | None = None,
    omit_probability: float = 0.3,
    reference_share: float = 0.5,
) -> ArrayDataset:
    """Return one part of scikit-learn's digits with captions.

    Validation and test have 200 pairs each, 20 of every digit. Their captions follow one template, which names all
    properties. The other 1,397 images are divided class by class: a share of them, the part "reference", is for
    training a reference model, and the rest, the part "train", is for training the model that the reference model
    steers. The captions of these two parts follow several templates, may leave out properties and may be swapped.

    Parameters
    ----------
    part : str
        One of `PARTS`: train, validation, test, reference.
    seed : int
        At least 0. The seed decides to which part each image belongs, and the captions.
    swapped_fraction : float, optional
        Share in [0, 1] of the captions that are exchanged; by default 0.3 for train and reference. For validation and
        test it must be 0 or left out.
    omit_probability : float
        Probability in [0, 1] with which a training caption leaves out each of the four properties.
    reference_share : float
        Share in [0, 1] of the 1,397 images that is kept for the reference model.

    Returns
    -------
    ArrayDataset
        `images` is uint8 (n, 8, 8, 1). The zero-shot task has 10 classes and the images of this part.

    Raises
    ------
    BadInput, TypeError
        An argument is outside its domain or has the wrong type, or the part would be empty.
    MissingExtra
        scikit-learn is not installed.

    Examples
    --------
    >>> digits("test").captions[0]
    'a thin wide handwritten five, leaning left and balanced'
    """
    if part not in PARTS:
        raise BadInput(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    seed = whole_number(seed, "seed", at_least=0)
    heldout = part in ("validation", "test")
    default_fraction = 0.0 if heldout else 0.3
    fraction = share(default_fraction if swapped_fraction is None else swapped_fraction, "swapped_fraction")
    if heldout and fraction > 0.0:
        raise BadInput(f"swapped_fraction must be 0 for {part}: held-out pairs are clean, got {fraction}")
    omit_probability = share(omit_probability, "omit_probability")
    rows = _deal(seed, share(reference_share, "reference_share"))[part]
    if rows.size == 0:
        raise BadInput(f"reference_share must leave images for {part}, got {reference_share}")
    source = _load()
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, PARTS.index(part))))
    if heldout:
        own_captions = [_full_caption(source, row) for row in rows.tolist()]
    else:
        own_captions = [_varied_caption(source, row, omit_probability, rng) for row in rows.tolist()]
    captions, is_swapped = swap_captions(own_captions, fraction, rng)
    return ArrayDataset(
        f"digits-{part}",
        source.images[rows],
        captions,
        own_captions=own_captions,
        is_swapped=is_swapped,
        zero_shot=partial(_zero_shot, source.images[rows], source.labels[rows]),
    )


def digit_splits(
    *,
    seed: int = 0,
    swapped_fraction: float = 0.3,
    omit_probability: float = 0.3,
    reference_share: float = 0.5,
) -> DataSplits:
    """Return training, validation and test digits of one seed.

    Parameters
    ----------
    seed, swapped_fraction, omit_probability, reference_share
        As in `digits`; captions are swapped in the training split only.

    Returns
    -------
    DataSplits
        Validation and test have 200 pairs each. None of the three data sets shares an image with the part for a
        reference model, `digits("reference", ...)` with the same seed and share.

    Raises
    ------
    BadInput, TypeError, MissingExtra
        As in `digits`.

    Examples
    --------
    >>> [len(split) for split in digit_splits()]
    [699, 200, 200]
    """
    make = partial(digits, seed=seed, omit_probability=omit_probability, reference_share=reference_share)
    return DataSplits(make("train", swapped_fraction=swapped_fraction), make("validation"), make("test"))


@lru_cache(maxsize=1)
def _load() -> _Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("the digits data set", "scikit-learn") from None
    bunch = load_digits()
    # scikit-learn's ink is a whole number in 0 .. 16; in the images, which are bytes, 16 becomes 255.
    ink = np.asarray(bunch.images).astype(np.int64)
    labels = np.asarray(bunch.target).astype(np.int64)
    images = ((ink * 255 + 8) // 16).astype(np.uint8)[..., None]
    images.flags.writeable = False
    return _Source(images, labels, _measure(ink))


def _measure(ink: Int64) -> Int64:
    """Return the four attributes of each image: 0 below both tertiles, 1 between them, 2 above both tertiles."""
    # Coordinates are counted from the image's centre and doubled, so that all sums are integers.
    x = np.arange(8, dtype=np.int64)[None, None, :] * 2 - 7
    y = np.arange(8, dtype=np.int64)[None, :, None] * 2 - 7
    total = ink.sum(axis=(1, 2))

    # A moment m(f) of the ink is the sum of ink * f(x, y) over the pixels. The variances that follow are multiplied by
    # m(1)^2, so that they are integers.
    def moment_of(values: Int64) -> Int64:
        moment: Int64 = (ink * values).sum(axis=(1, 2))
        return moment

    sum_x, sum_y = moment_of(x), moment_of(y)
    var_x = total * moment_of(x * x) - sum_x * sum_x
    var_y = total * moment_of(y * y) - sum_y * sum_y
    covariance = total * moment_of(x * y) - sum_x * sum_y
    measures = (
        total.astype(np.float64),  # ink
        var_x / (total * total),  # width: variance of x
        -covariance / var_y,  # slant: shift of the ink to the right per row upwards
        sum_y / total,  # weight: mean row, downwards
    )
    columns = []
    # The attribute of an image, 0, 1 or 2, is the number of tertiles that the measure reaches.
    for measure in measures:
        ordered = np.sort(measure)
        low, high = ordered[len(ordered) // 3], ordered[2 * len(ordered) // 3]
        columns.append((measure >= low).astype(np.int64) + (measure >= high).astype(np.int64))
    return np.stack(columns, axis=1)


def _deal(seed: int, reference_share: float) -> dict[str, npt.NDArray[np.int64]]:
    """Distribute the rows over the parts, class by class; the rows of each part are in random order."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    labels = _load().labels
    # The held-out parts take their rows first, so that `reference_share` does not change them.
    dealt: dict[str, list[int]] = {part: [] for part in PARTS}
    for label in range(len(DIGITS)):
        rows = rng.permutation(np.flatnonzero(labels == label)).tolist()
        dealt["validation"] += rows[:_HELDOUT_PER_CLASS]
        dealt["test"] += rows[_HELDOUT_PER_CLASS : 2 * _HELDOUT_PER_CLASS]
        rest = rows[2 * _HELDOUT_PER_CLASS :]
        for_reference = round(len(rest) * reference_share)
        dealt["reference"] += rest[:for_reference]
        dealt["train"] += rest[for_reference:]
    return {part: rng.permutation(np.array(rows, dtype=np.int64)) for part, rows in dealt.items()}


def _full_caption(source: _Source, row: int) -> str:
    ink, width, slant, weight = source.attributes[row].tolist()
    return _FULL.format(
        ink=_INK[ink],
        width=_WIDTH[width],
        digit=DIGITS[int(source.labels[row])],
        slant=_SLANT[slant],
        weight=_WEIGHT[weight],
    )


def _varied_caption(source: _Source, row: int, omit_probability: float, rng: np.random.Generator) -> str:
    # One random number is drawn for each property, then one for the template. Another order would change the data set.
    is_named = (rng.random(4) >= omit_probability).tolist()
    template = _TEMPLATES[int(rng.integers(0, len(_TEMPLATES)))]
    ink, width, slant, weight = source.attributes[row].tolist()
    adjectives = [word for word, named in ((_INK[ink], is_named[0]), (_WIDTH[width], is_named[1])) if named]
    rest = [word for word, named in ((_SLANT[slant], is_named[2]), (_WEIGHT[weight], is_named[3])) if named]
    caption = template.format(
        digit=DIGITS[int(source.labels[row])],
        adjectives="".join(word + " " for word in adjectives),
        rest=f", {' and '.join(rest)}" if rest else "",
    )
    return caption.replace("a eight", "an eight")


def _zero_shot(images: UInt8, labels: Int64, image_size: int | None) -> ZeroShot:
    sized = images if image_size is None else resize(images, image_size)
    return ZeroShot(DIGITS, tuple(f"a photo of the digit {name}" for name in DIGITS), sized, labels)
