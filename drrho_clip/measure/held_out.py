"""Checks of held-out pairs: their images can be decoded, and the model has not seen their images in training.

A run records the digests of the images that it was trained on and validated with. A digest is computed from the content
of the image file, so an image is recognised under any name and in any table. A picture that was saved again, for
example in another format, has other content and is not recognised.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from drrho_clip.data import Dataset, DataSplits, PairsDataset, UnreadableImage
from drrho_clip.data.content import DIGEST_SIZE
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import load_arrays, save_arrays
from drrho_clip.run import Run
from drrho_clip.terminal.printing import say
from drrho_clip.terminal.progress import Reporter

__all__ = ["Unseen", "check_held_out", "known_images", "save_known_images", "shows_known_image", "unseen_pairs"]

_THREADS = 4


def check_held_out(
    splits: DataSplits, *, reference: Run | None = None, init: Run | None = None, quiet: bool = False
) -> None:
    """Check the validation and test data of a run before the first step.

    Every image is decoded once, so that an unreadable image stops the run here and not after the last epoch. Data of
    which a share may be unreadable have that many unreadable images at most, which are left out of the figures. If the
    reference model, or the run from which this run starts, was trained on test images, the results of the run will look
    too good, and a warning says so.

    Parameters
    ----------
    splits : DataSplits
        The data of the run.
    reference, init : Run, optional
        The run of the reference model, and the run from which this run starts.
    quiet : bool
        Show no progress and no warning.

    Raises
    ------
    BadInput
        If an image cannot be decoded, or too many images of data of which a share may be unreadable.
    """
    # An image with several captions is decoded once: at the first row that shows the image.
    held_out = [(data, np.unique(data.image_ids, return_index=True)[1]) for data in (splits.validation, splits.test)]
    total = sum(len(rows) for _, rows in held_out)
    title = "decoding the held-out images"
    with Reporter(title, total, quiet=quiet, brief=True) as reporter, ThreadPoolExecutor(_THREADS) as threads:
        for data, rows in held_out:
            unreadable: list[UnreadableImage] = []
            # The results come in the order of the rows, so the first unreadable image is the one that is reported.
            for flaw in threads.map(functools.partial(_flaw, data), rows.tolist()):
                reporter.advance()
                unreadable += [] if flaw is None else [flaw]
            if unreadable and len(unreadable) > getattr(data, "max_unreadable", 0.0) * len(data):
                raise _counted(unreadable)
            if not quiet:
                say(*(f"warning: {flaw}; it is left out" for flaw in unreadable), stream=sys.stderr)
    for other, words in ((reference, "the reference model"), (init, "the run to start from")):
        known = None if other is None else known_images(other)
        count = 0 if known is None else int(shows_known_image(splits.test, known).sum())
        if count > 0 and not quiet:
            pairs = f"{count:,} of {len(splits.test):,} test pairs"
            say(f"warning: {pairs} show images that {words} was trained on", stream=sys.stderr)


def _flaw(data: Dataset, row: int) -> UnreadableImage | None:
    """Return the error of an unreadable image; the picture is dropped, so that pictures do not pile up in memory."""
    try:
        data[row]
    except UnreadableImage as error:
        return error
    return None


def _counted(unreadable: Sequence[UnreadableImage]) -> BadInput:
    more = f" (and {len(unreadable) - 1} more such held-out images)" if len(unreadable) > 1 else ""
    return BadInput(f"{unreadable[0]}{more}")


def save_known_images(run: Run, splits: DataSplits, *, reference: Run | None = None, init: Run | None = None) -> None:
    """Write training_images.safetensors: digests of the images that influence the parameters of a run.

    These are the training and the validation images of the run. If the reference model's run or the run `init`, from
    which the run starts, has such a file, its digests are included.
    """
    digests = np.concatenate([splits.train.image_digests(), splits.validation.image_digests()])
    arrays = {"digests": np.unique(digests, axis=0)}
    for other, name in ((reference, "reference_digests"), (init, "init_digests")):
        known = None if other is None else known_images(other)
        if known is not None:
            arrays[name] = known
    save_arrays(run.training_images, "training-images", arrays, {"data": run.fingerprint})


def known_images(run: Run) -> NDArray[np.uint8] | None:
    """Return the digests (k, 16) that `save_known_images` wrote, or None if the run is older than this file.

    Raises
    ------
    BadInput
        If the file is damaged.
    """
    if not run.training_images.exists():
        return None
    arrays, _ = load_arrays(run.training_images, "training-images")
    if not arrays or any(array.dtype != np.uint8 or array.shape[1:] != (DIGEST_SIZE,) for array in arrays.values()):
        raise BadInput(f"{run.training_images} must hold digests of {DIGEST_SIZE} bytes, got other arrays")
    return np.concatenate([arrays[name] for name in sorted(arrays)])


def shows_known_image(dataset: Dataset, known: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return, for each pair of a data set, whether the digest of the image is among the digests `known`, (k, 16)."""
    digests = {digest.tobytes() for digest in known}
    return np.array([digest.tobytes() in digests for digest in dataset.image_digests()])


class Unseen(NamedTuple):
    """The pairs of a table that the model of a run can be measured on, and a sentence about those left out."""

    pairs: PairsDataset
    num_left_out: int
    sentence: str


def unseen_pairs(table: PairsDataset, *runs: Run) -> Unseen:
    """Leave out the pairs whose images one of the runs was trained on or validated with.

    Raises
    ------
    BadInput
        If fewer than 2 images are left, or if a file of a run is damaged.
    """
    known = {run.folder: known_images(run) for run in runs}
    missing = [str(folder) for folder, digests in known.items() if digests is None]
    sentences = []
    if missing:
        file = runs[0].training_images.name
        sentences.append(f"{file} is missing in {', '.join(missing)}, so training pairs cannot be recognised there")
    digests = [array for array in known.values() if array is not None]
    if not digests:
        return Unseen(table, 0, sentences[0])
    seen = shows_known_image(table, np.concatenate(digests))
    count, total = int(seen.sum()), len(table)
    subject = "the run was" if len(runs) == 1 else "the runs were"
    if count == 0:
        sentences.append(f"none of the {total:,} pairs shows an image that {subject} trained on")
        return Unseen(table, 0, "; ".join(sentences))
    left = np.flatnonzero(~seen)
    images = len(np.unique(table.image_ids[left]))
    if images < 2:
        raise BadInput(
            f"data must have at least 2 images that {subject} not trained on, got {images} "
            f"({count:,} of {total:,} pairs show images that {subject} trained on or validated with)"
        )
    sentences.append(
        f"{count:,} of {total:,} pairs show images that {subject} trained on or validated with; they are left out"
    )
    return Unseen(table.subset(left), count, "; ".join(sentences))
