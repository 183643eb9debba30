"""The table of the estimates u of all samples of a data set, and rules for gamma.

An anchor is an image or a text of the data set. In each batch, g is the mean of exp(D) over the anchor's negatives, see
``anchor.py``. The estimate u is a moving average of g, and gamma is the weight of the new g in this average.

Sources: FastCLIP, arXiv 2407.01445, for the cosine; the released code of DRRho, arXiv 2505.06699, for the smallest
gamma; SCENT, arXiv 2602.02877, for a gamma per sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import (
    FloatArray,
    fraction,
    log_estimates,
    non_negative,
    number,
    positive,
    raw_array,
    whole_number,
)

__all__ = ["InnerEstimator", "cosine_gamma", "recommended_gamma_min", "scent_gamma"]


def cosine_gamma(epoch: float, /, *, num_epochs: float, gamma_min: float) -> float:
    """Return gamma, which falls from 1 to ``gamma_min`` along half a cosine and then stays at ``gamma_min``.

    Parameters
    ----------
    epoch : float
        The epoch e, at least 0.
    num_epochs : float
        E, the number of epochs until gamma reaches ``gamma_min``, above 0.
    gamma_min : float
        The smallest gamma, in (0, 1].

    Returns
    -------
    float
        gamma_min + (1 - gamma_min) (1 + cos(pi min(e, E) / E)) / 2.

    Raises
    ------
    TypeError, ValueError
        If an argument is no number in its domain.

    Notes
    -----
    Source: FastCLIP, arXiv 2407.01445.

    Examples
    --------
    >>> [round(cosine_gamma(epoch, num_epochs=4, gamma_min=0.2), 4) for epoch in (0, 1, 2, 4, 9)]
    [1.0, 0.8828, 0.6, 0.2, 0.2]
    """
    last, smallest = positive("num_epochs", num_epochs), fraction("gamma_min", gamma_min)
    # Half a cosine from 1 at epoch 0 to gamma_min at epoch E; the epoch is clipped at E.
    reached = min(non_negative("epoch", epoch), last)
    return smallest + (1.0 - smallest) * (1.0 + math.cos(math.pi * reached / last)) / 2.0


def recommended_gamma_min(num_epochs: float, /) -> float:
    """Compute a smallest gamma from the number of epochs: min(1, 4.177 E^-0.7265).

    Parameters
    ----------
    num_epochs : float
        E, above 0.

    Returns
    -------
    float
        The smallest gamma, in (0, 1].

    Raises
    ------
    TypeError, ValueError
        If ``num_epochs`` is no positive number.

    Notes
    -----
    Source: the released code of DRRho, arXiv 2505.06699.

    Examples
    --------
    >>> recommended_gamma_min(5), round(recommended_gamma_min(30), 4)
    (1.0, 0.353)
    """
    return min(1.0, 4.177 * math.pow(positive("num_epochs", num_epochs), -0.7265))


def scent_gamma(log_inner: npt.ArrayLike, /, *, log_alpha: float, gamma_floor: float = 1e-3) -> FloatArray:
    """Compute one gamma per sample: max(floor, alpha u / (1 + alpha u)) with the old estimate u; 1 on the first visit.

    Parameters
    ----------
    log_inner : array of any shape
        log u before the update; -inf for samples that were never visited.
    log_alpha : float
        The logarithm of alpha, the step size of SCENT.
    gamma_floor : float
        The smallest gamma, in (0, 1].

    Returns
    -------
    array of float64, the shape of ``log_inner``
        One gamma per sample, in [gamma_floor, 1].

    Raises
    ------
    TypeError, ValueError
        If an argument is no number in its domain.

    Notes
    -----
    alpha u / (1 + alpha u) is sigmoid(log_alpha + log u). Source: SCENT, arXiv 2602.02877.

    Examples
    --------
    >>> scent_gamma([-float("inf"), 0.0, -50.0], log_alpha=0.0).tolist()
    [1.0, 0.5, 0.001]
    """
    state = raw_array("log_inner", log_inner).astype(np.float64)
    shift, floor = number("log_alpha", log_alpha), fraction("gamma_floor", gamma_floor)
    if np.any(np.isnan(state) | (state == np.inf)):
        raise ValueError(f"log_inner must be finite or -inf, got {state.tolist()}")
    gamma = np.ones(state.shape)
    for index in np.ndindex(state.shape):
        if state[index] != -math.inf:
            # sigmoid(log alpha + log u). The exponential is at most 1, so it cannot overflow. Samples that were never
            # visited keep gamma = 1.
            exponent = shift + float(state[index])
            small = math.exp(-abs(exponent))
            gamma[index] = max(floor, (1.0 if exponent >= 0.0 else small) / (1.0 + small))
    return gamma


class InnerEstimator:
    """Store log u of the image anchor and of the text anchor of every sample of a data set.

    The oracle, the slow NumPy implementation, keeps two dictionaries, one per kind of anchor. A key is the position of
    a sample, and the value is log u of this sample.

    Parameters
    ----------
    num_samples : int
        n, the number of samples of the data set, at least 1.
    like : object
        An array; the core (drrho_core) puts the state on the device of this array. The oracle ignores ``like``: its
        state is float64 in NumPy.
    dtype : object, optional
        The dtype of the core's state. The oracle ignores ``dtype``.

    Raises
    ------
    TypeError, ValueError
        If ``num_samples`` is no integer of at least 1.

    Notes
    -----
    u is the moving average of SogCLR, arXiv 2202.12387.

    Examples
    --------
    >>> estimator = InnerEstimator(3, like=None).scatter([2], [0.5], [-1.5])
    >>> [side.tolist() for side in estimator.gather([0, 2])]
    [[-inf, 0.5], [-inf, -1.5]]
    """

    def __init__(self, num_samples: int, *, like: Any, dtype: Any = None) -> None:
        del like, dtype
        self.num_samples = whole_number("num_samples", num_samples, 1)
        self._image: dict[int, float] = {}
        self._text: dict[int, float] = {}

    def gather(self, index: npt.ArrayLike, /) -> tuple[FloatArray, FloatArray]:
        """Return log u of the samples of a batch; log u is -inf if a sample was never visited.

        Parameters
        ----------
        index : array (b,) of integers
            Positions in [0, n), no repeats.

        Returns
        -------
        image, text : array (b,) of float64

        Raises
        ------
        TypeError, ValueError
            If ``index`` is no such array.
        """
        positions = self._positions(index)
        # A position that was never written has log u = -inf.
        image = np.array([self._image.get(position, -math.inf) for position in positions])
        return image, np.array([self._text.get(position, -math.inf) for position in positions])

    def scatter(
        self, index: npt.ArrayLike, log_inner_image: npt.ArrayLike, log_inner_text: npt.ArrayLike, /
    ) -> InnerEstimator:
        """Write log u of the samples of a batch and return this estimator.

        Parameters
        ----------
        index : array (b,) of integers
            Positions in [0, n), no repeats.
        log_inner_image, log_inner_text : array (b,)
            log u of these samples: finite, or -inf for samples that were never visited.

        Returns
        -------
        InnerEstimator

        Raises
        ------
        TypeError, ValueError
            If an argument is no such array. In this case the state is unchanged.
        """
        # All checks come before the first write, so that a refused call leaves the state unchanged.
        positions = self._positions(index)
        image = log_estimates("log_inner_image", log_inner_image, len(positions))
        text = log_estimates("log_inner_text", log_inner_text, len(positions))
        for position, of_image, of_text in zip(positions, image.tolist(), text.tolist(), strict=True):
            self._image[position], self._text[position] = of_image, of_text
        return self

    def grow(self, num_samples: int, /) -> InnerEstimator:
        """Return an estimator for more samples; the new samples were never visited.

        Parameters
        ----------
        num_samples : int
            The new number of samples, at least the present number.

        Returns
        -------
        InnerEstimator

        Raises
        ------
        TypeError, ValueError
            If ``num_samples`` is no integer, or smaller than the present number.
        """
        grown = InnerEstimator(whole_number("num_samples", num_samples, self.num_samples), like=None)
        grown._image, grown._text = dict(self._image), dict(self._text)
        return grown

    def state_dict(self) -> dict[str, FloatArray]:
        """Return log u of all image anchors and of all text anchors: two arrays (n,), each under its name."""
        image, text = self.gather(np.arange(self.num_samples))
        return {"log_inner_image": image, "log_inner_text": text}

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike], /) -> None:
        """Load the state that :meth:`state_dict` has returned.

        Parameters
        ----------
        state : mapping
            ``log_inner_image`` and ``log_inner_text``, each an array (n,).

        Raises
        ------
        TypeError, ValueError
            If the names are not these two, or an array is refused by :meth:`scatter`. In this case the estimator's
            state is unchanged.
        """
        if set(state) != {"log_inner_image", "log_inner_text"}:
            raise ValueError(f"state must hold log_inner_image and log_inner_text, got {sorted(state)}")
        self.scatter(np.arange(self.num_samples), state["log_inner_image"], state["log_inner_text"])

    def _positions(self, index: npt.ArrayLike) -> list[int]:
        """Check positions: integers along one axis, in [0, n), no repeats."""
        array = np.asarray(index)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise TypeError(f"index must be integers along one axis, got dtype {array.dtype}, shape {array.shape}")
        positions = [int(position) for position in array]
        for position in positions:
            if not 0 <= position < self.num_samples:
                raise ValueError(f"index must lie in [0, {self.num_samples}), got {position}")
        if len(set(positions)) < len(positions):
            raise ValueError(f"index must have no repeats, got {positions}")
        return positions
