"""Weights per anchor that are the probability, by a reference model, that image and text of a pair belong together.

Some pairs of a data set are *swapped*: the image has the text of a random other pair. `posterior_anchor_weight`
estimates the share of these pairs and the probability of each pair that it is right, by maximum likelihood, so nothing
about the noise has to be known. The loss with these probabilities as `anchor_weight` estimates the loss of the right
pairs alone. docs/theory/contrastive.md, "Weights per anchor", has the derivation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, device_of, wide_dtype
from drrho_core._validate import FINITE
from drrho_core.numerics import log

# The slopes that are tried first, from almost flat to almost a step; the calibrated slope is 1.
_SLOPES: Final = tuple(2.0**power for power in range(-4, 7))
# Steps of a root search, which needs about ten; the limit is reached only if rounding hides the root.
_MOST_STEPS: Final = 60


class PosteriorWeights(NamedTuple):
    """Result of `posterior_anchor_weight`, in the dtype of the pair losses (float32 for half types).

    Attributes
    ----------
    anchor_weight : array, shape (b,)
        The probability that each pair is right, divided by the mean of these probabilities; mean 1.
    swapped_share : array, shape ()
        The estimated share of swapped pairs, in [0, 1].
    slope : array, shape ()
        The estimated factor that makes the negative pair loss a logarithm of a density ratio. It is 1 for a calibrated
        reference model, and above 1 if the differences of the pair losses are too small.
    """

    anchor_weight: Array
    swapped_share: Array
    slope: Array


def posterior_anchor_weight(
    pair_loss: Array, swapped_pair_loss: Array, /, *, xp: Namespace | None = None
) -> PosteriorWeights:
    """Return weights of anchors: the probability that a pair is right, from pair losses of a reference model.

    Parameters
    ----------
    pair_loss : array, shape (b,)
        `pair_loss` of each pair, from the features of a reference model that has not memorised the pairs.
    swapped_pair_loss : array, shape (m,)
        Pair losses, of the same model and in the same dtype, of the images with texts of random other pairs, such as
        ``pair_loss(images, xp.roll(texts, 1, axis=0), temperature=...)`` for pairs in random order. Several thousand
        losses make the estimates exact.
    xp : namespace, optional
        The arrays' namespace.

    Returns
    -------
    PosteriorWeights
        Weights with mean 1 for `contrastive_step`, the estimated share of swapped pairs, and the estimated slope.

    Raises
    ------
    TypeError
        If an argument is no array of a real floating dtype, or the dtypes differ.
    ValueError
        If a shape is wrong, a loss is not finite, or an input requires gradients of autograd. Values are read, so the
        function cannot be traced.

    Notes
    -----
    The model of the pairs is a mixture: a share p of the pairs is swapped, and the density of the right pairs relative
    to the swapped pairs is ``r_i = exp(-s l_i) / Z(s)`` at the pair loss l_i. Z is the mean of ``exp(-s l)`` over
    images with a random text; such a text is the own text of the image with probability 1 / b. The share p and the
    slope s maximise the likelihood ``sum_i log((1 - p) r_i + p)``, with s from 1/16 to 64. A pair is right with
    probability ``(1 - p) r_i / ((1 - p) r_i + p)``.

    The function reads each array about 500 times.

    Examples
    --------
    3,000 of 4,000 pairs are right, and fit better than random pairs:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> random_pairs = rng.exponential(2.0, size=4000) - 3.0
    >>> right, wrong = rng.exponential(0.2, size=3000) - 3.0, rng.exponential(2.0, size=1000) - 3.0
    >>> weights = posterior_anchor_weight(np.concatenate([right, wrong]), random_pairs)
    >>> round(float(weights.swapped_share), 2), round(float(np.mean(weights.anchor_weight[3000:])), 1)
    (0.25, 0.4)
    """
    call = _validate.arrays({"pair_loss": pair_loss, "swapped_pair_loss": swapped_pair_loss}, xp)
    xp = call.xp
    for name, array in call.arrays.items():
        call.array(name, axes=1, meaning="(num_pairs,)")
        if array.shape[0] == 0:
            raise ValueError(f"{name} must hold at least 1 entry, got shape (0,)")
        call.values(name, array, FINITE)
    call.same_dtype("pair_loss", "swapped_pair_loss")
    work = wide_dtype(pair_loss.dtype, xp)
    # A slope times a loss must not overflow.
    largest = float(xp.finfo(work).max) / 256.0
    losses, swapped = (
        xp.clip(xp.astype(array, work, copy=False), -largest, largest) for array in (pair_loss, swapped_pair_loss)
    )
    mixture = _Mixture(losses, swapped, xp)
    slope = mixture.best_slope()
    ratios, share = mixture.fit(slope)[:2]
    # The mean is divided off with logarithms, so that ratios of weights are right even if every probability is tiny.
    log_right = mixture.log_right(ratios, share)
    right = xp.exp(log_right - xp.max(log_right))
    swapped_share = 1.0 / (1.0 + math.exp(-share)) if abs(share) < mixture.farthest else float(share > 0.0)
    numbers = (xp.asarray(number, dtype=work, device=device_of(losses)) for number in (swapped_share, slope))
    return PosteriorWeights(right / xp.mean(right), *numbers)


class _Mixture:
    """The likelihood of right pairs and swapped pairs, as a function of the slope and the share.

    Parameters
    ----------
    losses, swapped : array, shapes (b,) and (m,)
        Pair losses of the pairs and of swapped pairs.
    """

    def __init__(self, losses: Array, swapped: Array, xp: Namespace) -> None:
        self.losses, self.xp = losses, xp
        b, m = losses.shape[0], swapped.shape[0]
        # A random text of the data set is the own text with probability 1 / b. Without these texts a single pair with
        # a smaller loss than all swapped pairs would make the likelihood infinite.
        self.random = xp.concat([swapped, losses])
        log_weights = (math.log1p(-1.0 / b) - math.log(m) if b > 1 else -math.inf, -2.0 * math.log(b))
        self.log_weight = xp.concat(
            [xp.full_like(part, weight) for part, weight in zip((swapped, losses), log_weights, strict=True)]
        )
        # Beyond this distance from 0 the log-odds of the share change no weight by more than rounding.
        self.farthest = math.log(b) - math.log(float(xp.finfo(losses.dtype).eps)) + 2.0

    def fit(self, slope: float) -> tuple[Array, float, float]:
        """Return y = -log r (b,), the best log-odds of the share of swapped pairs, and the mean tilted loss."""
        xp = self.xp
        exponents = self.log_weight - slope * self.random
        top = xp.max(exponents)
        tilted = xp.exp(exponents - top)
        total = xp.sum(tilted)
        ratios = slope * self.losses + (top + xp.log(total))
        return ratios, self._best_share(ratios), float(xp.sum(tilted / total * self.random))

    def log_right(self, ratios: Array, share: float) -> Array:
        """Return the logarithm of the probability that each pair is right."""
        y = ratios + share
        return -self.xp.logaddexp(self.xp.zeros_like(y), y)

    def best_slope(self) -> float:
        """Return the slope with the largest likelihood."""
        values = [self._likelihood(slope) for slope in _SLOPES]
        # If the pairs fit no better than swapped pairs, every likelihood is 0 up to rounding. The flattest slope among
        # equal likelihoods leaves the weights about equal.
        rounding = 16.0 * float(self.xp.finfo(self.losses.dtype).eps)
        best = next(place for place, value in enumerate(values) if value >= max(values) - rounding)
        low, high = (math.log(_SLOPES[min(max(best + step, 0), len(_SLOPES) - 1)]) for step in (-1, 1))
        return math.exp(_root(lambda log_slope: self._slope_score(math.exp(log_slope)), low, high))

    def _likelihood(self, slope: float) -> float:
        ratios, share, _ = self.fit(slope)
        log_share = [-_softplus(-share), -_softplus(share)]
        constant = self.xp.full_like(ratios, log_share[0])
        return float(self.xp.mean(self.xp.logaddexp(log_share[1] - ratios, constant)))

    def _slope_score(self, slope: float) -> float:
        """Return the derivative of the likelihood in the slope, at the best share.

        It is 0 if the tilted losses of random texts have the same mean as the losses of the pairs that are right.
        """
        ratios, share, mean = self.fit(slope)
        log_right = self.log_right(ratios, share)
        right = self.xp.exp(log_right - self.xp.max(log_right))
        return float(self.xp.mean(right * (mean - self.losses)) / self.xp.mean(right))

    def _best_share(self, ratios: Array) -> float:
        """Return the log-odds of the share with the largest likelihood, which is a concave function of the share."""
        # The derivative in the share p is the mean of (1 - r) / ((1 - p) r + p). With y = -log r and the log-odds t of
        # p, times p, a pair with y > 0 contributes (1 - exp(-y)) sigmoid(y + t), and a pair with y < 0 contributes
        # -(1 - exp(y)) exp(t) sigmoid(-y - t). The logarithms of both sums are compared.
        xp = self.xp
        size = log(-xp.expm1(-xp.abs(ratios)), xp=xp)
        sign = xp.sign(ratios)
        nothing = xp.full_like(ratios, -math.inf)

        def score(share: float) -> float:
            y = -sign * (ratios + share)
            terms = size - xp.logaddexp(xp.zeros_like(y), y)
            above, below = (float(_log_sum(xp.where(sign == side, terms, nothing), xp)) for side in (1, -1))
            # -inf on both sides means that every r is 1; then no share is better than another.
            return above - share - below if above > -math.inf else -math.inf

        return _root(score, -self.farthest, self.farthest)


def _log_sum(x: Array, xp: Namespace) -> Array:
    """Return the logarithm of the sum of exp(x); -inf if every entry is -inf."""
    top = xp.max(x)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    return top + log(xp.sum(xp.exp(x - top)), xp=xp)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Return the root of a falling function between `low` and `high`, or the end that is closest to a root.

    The steps are those of the Illinois method: false position, and the value of an end that stays is halved.
    """
    at_low, at_high = f(low), f(high)
    if at_low <= 0.0:
        return low
    if at_high >= 0.0:
        return high
    kept = 0
    for _ in range(_MOST_STEPS):
        middle = 0.5 * (low + high)
        if math.isfinite(at_low) and math.isfinite(at_high):
            middle = low + (high - low) * at_low / (at_low - at_high)
        value = f(middle)
        if value == 0.0 or middle in (low, high):
            return middle
        if value > 0.0:
            low, at_low = middle, value
            at_high, kept = (0.5 * at_high if kept > 0 else at_high), 1
        else:
            high, at_high = middle, value
            at_low, kept = (0.5 * at_low if kept < 0 else at_low), -1
    return low if abs(at_low) < abs(at_high) else high
