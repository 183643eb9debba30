"""Masks of the pairs of a batch that show the same image, and are therefore no negatives of each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from drrho_clip.data.protocol import Int64

__all__ = ["PairMasks", "has_siblings"]


def has_siblings(image_ids: Int64) -> bool:
    """Return whether an image has several rows, by the numbers of the images of all rows.

    Examples
    --------
    >>> has_siblings(np.asarray([0, 1, 1])), has_siblings(np.arange(3))
    (True, False)
    """
    return bool(np.unique(image_ids).size < image_ids.size)


class PairMasks:
    """The masks of all batches of a data set.

    Parameters
    ----------
    image_ids : ndarray of int64, shape (n,)
        The image of each row, by number; see `drrho_clip.data.protocol.Dataset.image_ids`.

    Examples
    --------
    >>> PairMasks(np.asarray([0, 1, 1])).of(np.asarray([0, 1]), np.asarray([0, 1, 2]))
    array([[False,  True,  True],
           [ True, False, False]])
    >>> PairMasks(np.arange(3)).of(np.asarray([0, 1]), np.asarray([0, 1, 2])) is None
    True
    """

    def __init__(self, image_ids: Int64) -> None:
        # If no image has several rows, no batch needs a mask.
        self._image_ids = image_ids if has_siblings(image_ids) else None

    def of(self, own: Int64, whole: Int64 | None = None) -> npt.NDArray[np.bool_] | None:
        """Return the mask of a batch, (b, B), or None if no image of the data set has several rows.

        Parameters
        ----------
        own : ndarray of int64, shape (b,)
            The own rows, one for each image.
        whole : ndarray of int64, shape (B,), optional
            The rows of all processes, one for each caption; by default the own rows.
        """
        if self._image_ids is None:
            return None
        whole = own if whole is None else whole
        mask: npt.NDArray[np.bool_] = self._image_ids[own][:, None] != self._image_ids[whole][None, :]
        return mask
