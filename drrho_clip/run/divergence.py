"""Finding out that a run has diverged: its numbers have grown until they overflow.

Reading a number from a GPU waits for all earlier work there, so the losses are watched on the device, and the answer is
read only where the run waits anyway: for a line of metrics and before a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from drrho_core.checks import Array, Namespace

__all__ = ["Watch", "all_finite"]


class Watch:
    """Remember on the device whether one of many numbers was not finite.

    Parameters
    ----------
    xp : namespace
        The namespace of the numbers.

    Examples
    --------
    >>> watch = Watch(np)
    >>> watch.add(np.float32(1.0))
    >>> watch.add(np.float32("inf"))
    >>> watch.all_finite()
    False
    """

    def __init__(self, xp: Namespace) -> None:
        self._xp = xp
        self._finite: Array | None = None

    def add(self, number: Array) -> None:
        """Watch a number; this does not wait for the device."""
        finite = self._xp.isfinite(number)
        self._finite = finite if self._finite is None else self._finite & finite

    def all_finite(self) -> bool:
        """Wait for the device, and return whether all numbers so far were finite."""
        return self._finite is None or bool(self._finite)


def all_finite(arrays: Iterable[np.ndarray]) -> bool:
    """Return whether all numbers of some arrays are finite.

    Examples
    --------
    >>> all_finite([np.zeros(3), np.asarray([1.0, np.nan])])
    False
    """
    return all(bool(np.isfinite(array).all()) for array in arrays)
