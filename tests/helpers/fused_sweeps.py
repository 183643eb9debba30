"""The results that fused kernels must return, in plain NumPy, and a contrastive step made of kernels, without the core.

A sweep is one pass over all pairs of a batch. The first sweep returns sums over the negatives of each anchor, the
second sweep the products of the weights of all pairs with the features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from drrho_core.extend import Batch, FirstSweep, SecondSweep

Convert = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class FusedProblem:
    """One batch in NumPy float64; features are rounded to the tested dtype, so that rounding them is no error."""

    image_features: np.ndarray
    text_features: np.ndarray
    reference_features: tuple[np.ndarray, np.ndarray] | None
    reference_weight: float
    temperature_image: np.ndarray
    temperature_text: np.ndarray
    pair_mask: np.ndarray | None
    weight_image: np.ndarray
    weight_text: np.ndarray

    def given(self, features: Convert, anchors: Convert, mask: Convert) -> Batch:
        """Convert the batch to a library: `features` converts to the dtype that is tested, `anchors` to float32."""
        reference = self.reference_features
        return Batch(
            features(self.image_features),
            features(self.text_features),
            None if reference is None else (features(reference[0]), features(reference[1])),
            self.reference_weight,
            anchors(self.temperature_image),
            anchors(self.temperature_text),
            None if self.pair_mask is None else mask(self.pair_mask),
        )

    def expected(self) -> tuple[FirstSweep, SecondSweep, float]:
        """Return both sweeps, computed for all pairs at once in float64, and the largest sum of a row or column of V.

        V_ij is the sum of the weights that image anchor i and text anchor j give to the pair (i, j).
        """
        # z = S - lambda R, and the exponents D of both directions: rows for images, columns for texts.
        e1, e2 = self.image_features, self.text_features
        z = e1 @ e2.T
        if self.reference_features is not None:
            z = z - self.reference_weight * self.reference_features[0] @ self.reference_features[1].T
        counts = ~np.eye(len(z), dtype=bool)
        if self.pair_mask is not None:
            counts &= self.pair_mask
        positive = np.diagonal(z)
        d = (z - positive[:, None]) / self.temperature_image[:, None]
        d_text = (z - positive[None, :]) / self.temperature_text[None, :]
        # log sum exp(D) and softmax(D) over the negatives of every anchor.
        sides = [_softmax(np.where(c, x, -np.inf)) for c, x in ((counts, d), (counts.T, d_text.T))]
        (log_sum, p), (log_sum_text, p_text) = sides
        first = FirstSweep(
            log_sum, log_sum_text, (p * d).sum(1), (p_text * d_text.T).sum(1), counts.sum(1), counts.sum(0), None
        )
        # V = w + w': each anchor's softmax times the sum of the anchor's weights, an input of the second sweep.
        v = self.weight_image[:, None] * p + (self.weight_text[:, None] * p_text).T
        return first, SecondSweep(v @ e2, v.T @ e1), float(max(v.sum(1).max(), v.sum(0).max()))


def _softmax(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-sum-exp of each row, and the softmax; if all entries of a row are -inf, the softmax is 0."""
    peak = np.max(x, axis=1, keepdims=True)
    e = np.exp(x - np.where(peak == -np.inf, 0.0, peak))
    total = e.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        return (peak + np.log(total))[:, 0], e / np.where(total == 0, 1.0, total)


def draw(
    *,
    b: int,
    d: int,
    r: int | None = None,
    mask: bool = False,
    coldest: float = 0.1,
    one_temperature: bool = False,
    rounded: Convert = lambda x: x.astype(np.float32).astype(np.float64),
) -> FusedProblem:
    """Draw features of unit norm, and weights near 1 / (2 b); every fifth weight is 0."""
    rng = np.random.default_rng([b, d, r or 0, int(mask)])

    def unit(columns: int) -> np.ndarray:
        features = rng.normal(size=(b, columns))
        return rounded(features / np.linalg.norm(features, axis=1, keepdims=True))

    reference = None if r is None else (unit(r), unit(r))
    return _problem(rng, (unit(d), unit(d)), reference, mask, coldest, one_temperature)


def draw_exact(
    *, b: int, d: int, r: int | None = None, mask: bool = False, temperature: float, one_temperature: bool = False
) -> FusedProblem:
    """Draw features that are small integers times a power of two, so that every product of features is exact.

    Then all errors come from the steps after the products. Many similarities are equal, and different similarities
    differ by about the temperature. One column of the features adds 1 to all similarities, if float32 can represent the
    sum.
    """
    rng = np.random.default_rng([b, d, r or 0, int(mask)])
    # Entries are integers times `step`, so products are integers times step^2, which is about the temperature.
    step = 2.0 ** np.round(np.log2(temperature) / 2)

    def whole(columns: int) -> np.ndarray:
        return step * rng.integers(-3, 4, size=(b, columns)).astype(np.float64)

    features = [whole(d), whole(d)]
    if step**2 > 2.0**-21:
        for side in features:
            side[:, 0] = 1.0
    reference = None if r is None else (whole(r), whole(r))
    return _problem(rng, (features[0], features[1]), reference, mask, temperature, one_temperature)


def _problem(
    rng: np.random.Generator,
    features: tuple[np.ndarray, np.ndarray],
    reference: tuple[np.ndarray, np.ndarray] | None,
    mask: bool,
    coldest: float,
    one_temperature: bool,
) -> FusedProblem:
    b = len(features[0])

    def anchors(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, b).astype(np.float32).astype(np.float64)

    pair_mask = None
    if mask:
        pair_mask = rng.random((b, b)) < 0.7
        pair_mask[1, :] = False  # an image without negatives
        pair_mask[:, b - 1] = False  # and a text
    temperatures = [np.full(b, np.float32(coldest), dtype=np.float64)] * 2
    if not one_temperature:
        temperatures = [anchors(coldest, 4 * coldest), anchors(coldest, 4 * coldest)]
    weights = [anchors(0.1 / b, 1.0 / b), anchors(0.1 / b, 1.0 / b)]
    for weight in weights:
        weight[::5] = 0.0
    if pair_mask is not None:
        weights[0][1] = weights[1][b - 1] = 0.0
    return FusedProblem(*features, reference, 0.75, temperatures[0], temperatures[1], pair_mask, weights[0], weights[1])


def check(
    first: FirstSweep, second: SecondSweep, problem: FusedProblem, *, unit: float, pull_unit: float | None = None
) -> None:
    """Compare both sweeps with the expected results; `unit` bounds the relative errors, `pull_unit` those of pulls.

    Errors of the first sweep are divided by max(1, |value|), errors of pulls (V E2 and V^T E1) by the largest sum of
    weights times the largest feature.
    """
    # The first sweep: log-sum-exps, means and numbers of negatives.
    expected_first, expected_second, largest = problem.expected()
    for name, right in expected_first._asdict().items():
        if name == "saved":
            continue
        got = np.asarray(getattr(first, name), dtype=np.float64)
        assert got.shape == right.shape, name
        differ = got != right  # -inf is equal
        error = np.abs(got[differ] - right[differ]) / np.maximum(1.0, np.abs(right[differ]))
        assert np.max(error, initial=0.0) <= unit, (name, np.max(error))
    # The second sweep: V E2 and V^T E1.
    sides = (problem.text_features, problem.image_features)
    for side, (name, right) in zip(sides, expected_second._asdict().items(), strict=True):
        got = np.asarray(getattr(second, name), dtype=np.float64)
        assert got.shape == right.shape, name
        error = float(np.max(np.abs(got - right)) / (largest * np.max(np.abs(side))))
        assert error <= (unit if pull_unit is None else pull_unit), (name, error)


def step(sweeps: Any, to_numpy: Convert) -> Callable[..., dict[str, Any]]:
    """Return a `contrastive_step` that calls the kernels, for the conformance kit; NumPy computes the arrays (b,)."""

    def contrastive_step(
        image_features: Any,
        text_features: Any,
        log_inner_image: Any,
        log_inner_text: Any,
        /,
        *,
        temperature: Any,
        gamma: Any = 1.0,
        reference_features: Any = None,
        reference_weight: Any = 1.0,
        radius: Any = 0.0,
        eps: Any = 0.0,
        pair_mask: Any = None,
        anchor_weight: Any = None,
        tile_size: Any = None,
        memory_budget: Any = None,
    ) -> dict[str, Any]:
        b = image_features.shape[0]
        given = anchor_weight if isinstance(anchor_weight, tuple) else (anchor_weight, anchor_weight)
        factors = [np.ones(b) if side is None else to_numpy(side).astype(np.float64) for side in given]
        pairs = [value if isinstance(value, tuple) else (value, value) for value in (temperature, gamma)]
        like = image_features[:, 0]
        t = [like * 0 + side for side in pairs[0]]
        batch = Batch(image_features, text_features, reference_features, reference_weight, *t, pair_mask)
        assert sweeps.declines(batch, "always") is None
        # The first sweep; then g, u and the sums of weights, arrays of size b, in float64.
        first = sweeps.sum_negatives(batch)
        old = [to_numpy(x).astype(np.float64) for x in (log_inner_image, log_inner_text)]
        temperatures = [to_numpy(side).astype(np.float64) for side in t]
        gammas = [np.broadcast_to(np.asarray(side, dtype=np.float64), (b,)) for side in map(to_numpy, pairs[1])]
        eps, radius, scale = float(eps), float(radius), 1.0 / (2 * b)
        new, value, weights = [], [], []
        for log_sum, count, u, weight in zip(
            map(to_numpy, (first.log_sum_image, first.log_sum_text)),
            map(to_numpy, (first.count_image, first.count_text)),
            old,
            gammas,
            strict=True,
        ):
            has = count > 0
            # log g, the moving average log u (first visit: log g), and log(eps + u).
            own = np.where(has, log_sum, 0.0) - np.log(np.where(has, count, 1.0))
            with np.errstate(divide="ignore"):
                mixed = np.logaddexp(np.log1p(-weight) + u, np.log(weight) + own)
                log_u = np.where(has, np.where(u == -np.inf, own, mixed), u)
                log_value = np.where(has, np.logaddexp(np.log(eps), np.where(has, log_u, 0.0)), 0.0)
            new.append(log_u)
            value.append(np.where(has, log_value + radius, 0.0))
            weights.append(np.where(has, scale * np.exp(own - log_value), 0.0))
        value, weights = ([factor * x for factor, x in zip(factors, xs, strict=True)] for xs in (value, weights))
        second = sweeps.pull_back(batch, first, *(_as(side, like) for side in weights))
        # The gradients are the pulls of the second sweep minus c times the features of the positive.
        means = [to_numpy(x).astype(np.float64) for x in (first.mean_image, first.mean_text)]
        c = (weights[0] + weights[1])[:, None]
        e1, e2 = (to_numpy(x).astype(np.float64) for x in (image_features, text_features))
        loss = scale * sum(np.sum(t_ * v_) for t_, v_ in zip(temperatures, value, strict=True))
        surrogate = loss + sum(np.sum(t_ * w_) for t_, w_ in zip(temperatures, weights, strict=True))
        slopes = tuple(scale * v_ - w_ * m_ for v_, w_, m_ in zip(value, weights, means, strict=True))
        return {
            "loss": loss,
            "surrogate": surrogate,
            "image_gradient": to_numpy(second.image_pull) - c * e2,
            "text_gradient": to_numpy(second.text_pull) - c * e1,
            "temperature_gradient": slopes if isinstance(temperature, tuple) else sum(map(np.sum, slopes)),
            "log_inner_image": new[0],
            "log_inner_text": new[1],
        }

    return contrastive_step


def _as(values: np.ndarray, like: Any) -> Any:
    """Convert a vector to float32 in the library and on the device of `like`."""
    import array_api_compat

    xp = array_api_compat.array_namespace(like)
    return xp.asarray(values.astype(np.float32), device=array_api_compat.device(like))
