"""A step that is made of a library's own kernels, whatever the core does with them, and the same in plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from drrho_core._fused import Batch, FirstSweep, SecondSweep

Convert = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class FusedProblem:
    """One batch in NumPy float64: already rounded to the features' dtype, so that rounding is no error."""

    image_features: np.ndarray
    text_features: np.ndarray
    reference_features: tuple[np.ndarray, np.ndarray] | None
    reference_weight: float
    temperature_image: np.ndarray
    temperature_text: np.ndarray
    pair_mask: np.ndarray | None
    log_denominator_image: np.ndarray
    log_denominator_text: np.ndarray

    def given(self, features: Convert, anchors: Convert, mask: Convert) -> Batch:
        """Carry it to a library: `features` converts to the dtype that is tested, `anchors` to float32."""
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
        """All pairs at once, in float64; and the largest sum over a row or a column of V."""
        e1, e2 = self.image_features, self.text_features
        z = e1 @ e2.T
        if self.reference_features is not None:
            z = z - self.reference_weight * self.reference_features[0] @ self.reference_features[1].T
        counts = ~np.eye(len(z), dtype=bool)
        if self.pair_mask is not None:
            counts &= self.pair_mask
        positive = np.diagonal(z).copy()
        d = (z - positive[:, None]) / self.temperature_image[:, None]
        d_text = (z - positive[None, :]) / self.temperature_text[None, :]
        masked, masked_text = np.where(counts, d, -np.inf), np.where(counts, d_text, -np.inf)
        first = FirstSweep(
            positive,
            np.logaddexp.reduce(masked, axis=1),
            np.logaddexp.reduce(masked_text, axis=0),
            counts.sum(1),
            counts.sum(0),
        )
        w = np.exp(masked - self.log_denominator_image[:, None])
        w_text = np.exp(masked_text - self.log_denominator_text[None, :])
        v = w + w_text
        second = SecondSweep(
            v @ e2, v.T @ e1, w.sum(1), w_text.sum(0), (w * d).sum(1), (w_text * d_text).sum(0)
        )  # fmt: skip
        return first, second, float(max(v.sum(1).max(), v.sum(0).max()))


def draw(
    *,
    b: int,
    d: int,
    r: int | None = None,
    mask: bool = False,
    coldest: float = 0.1,
    rounded: Convert = lambda x: x.astype(np.float32).astype(np.float64),
) -> FusedProblem:
    """Draw features of unit norm, and denominators near what the batch itself has, so that weights are of size 1."""
    rng = np.random.default_rng([b, d, r or 0, int(mask)])

    def unit(columns: int) -> np.ndarray:
        features = rng.normal(size=(b, columns))
        return rounded(features / np.linalg.norm(features, axis=1, keepdims=True))

    def anchors(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, b).astype(np.float32).astype(np.float64)

    pair_mask = None
    if mask:
        pair_mask = rng.random((b, b)) < 0.7
        pair_mask[1, :] = False  # an image without negatives
        pair_mask[:, b - 1] = False  # and a text
    problem = FusedProblem(
        unit(d),
        unit(d),
        None if r is None else (unit(r), unit(r)),
        0.75,
        anchors(coldest, 4 * coldest),
        anchors(coldest, 4 * coldest),
        pair_mask,
        np.full(b, np.inf),
        np.full(b, np.inf),
    )
    first, _, _ = problem.expected()
    image, text = (
        np.where(np.isfinite(log_sum), log_sum, 0.0) + anchors(-1.0, 1.0)
        for log_sum in (first.log_sum_image, first.log_sum_text)
    )
    changed = {"log_denominator_image": image.astype(np.float32).astype(np.float64)}
    changed["log_denominator_text"] = text.astype(np.float32).astype(np.float64)
    return FusedProblem(**{**vars(problem), **changed})


def check(
    first: FirstSweep, second: SecondSweep, problem: FusedProblem, *, unit: float, pull_unit: float | None = None
) -> None:
    """Compare both sweeps: logarithms with max(1, their size), the rest with what is summed before it cancels."""
    expected_first, expected_second, c = problem.expected()
    c = max(1.0, c)
    for name, wanted in expected_first._asdict().items():
        got = np.asarray(getattr(first, name), dtype=np.float64)
        assert got.shape == wanted.shape, name
        differ = got != wanted  # -inf is equal
        error = np.abs(got[differ] - wanted[differ]) / np.maximum(1.0, np.abs(wanted[differ]))
        assert np.max(error, initial=0.0) <= unit, (name, np.max(error))
    hottest = max(float(np.max(np.abs(x))) for x in (expected_second.weighted_image, expected_second.weighted_text))
    for name, wanted in expected_second._asdict().items():
        got = np.asarray(getattr(second, name), dtype=np.float64)
        assert got.shape == wanted.shape, name
        size = max(c, hottest) if name.startswith("weighted") else c
        bound = pull_unit if pull_unit is not None and name.endswith("pull") else unit
        error = float(np.max(np.abs(got - wanted)) / size)
        assert error <= bound, (name, error)


def step(sweeps: Any, to_numpy: Convert) -> Callable[..., dict[str, Any]]:
    """Return a `contrastive_step` of the kernels, for the conformance kit; what is left is (b,) and done in NumPy."""

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
        tile_size: Any = None,
        memory_budget: Any = None,
    ) -> dict[str, Any]:
        b = image_features.shape[0]
        pairs = [value if isinstance(value, tuple) else (value, value) for value in (temperature, gamma)]
        like = image_features[:, 0]
        t = [like * 0 + side for side in pairs[0]]
        batch = Batch(image_features, text_features, reference_features, reference_weight, *t, pair_mask)
        assert sweeps.declines(batch, "always") is None
        first = sweeps.sum_negatives(batch)
        old = [to_numpy(x).astype(np.float64) for x in (log_inner_image, log_inner_text)]
        temperatures = [to_numpy(side).astype(np.float64) for side in t]
        gammas = [np.broadcast_to(np.asarray(side, dtype=np.float64), (b,)) for side in map(to_numpy, pairs[1])]
        eps, radius = float(eps), float(radius)
        new, value, denominator, active = [], [], [], []
        for log_sum, count, u, weight in zip(
            map(to_numpy, (first.log_sum_image, first.log_sum_text)),
            map(to_numpy, (first.count_image, first.count_text)),
            old,
            gammas,
            strict=True,
        ):
            has = count > 0
            own = np.where(has, log_sum, 0.0) - np.log(np.where(has, count, 1.0))
            with np.errstate(divide="ignore"):
                mixed = np.logaddexp(np.log1p(-weight) + u, np.log(weight) + own)
                log_u = np.where(has, np.where(u == -np.inf, own, mixed), u)
                log_value = np.where(has, np.logaddexp(np.log(eps), np.where(has, log_u, 0.0)), 0.0)
            new.append(log_u)
            value.append(np.where(has, log_value + radius, 0.0))
            denominator.append(log_value + np.log(np.where(has, count, 1.0)))
            active.append(has)
        second = sweeps.pull_back(batch, first.positive, *(like * 0 + _as(side, like) for side in denominator))
        weights = [to_numpy(x).astype(np.float64) for x in (second.weight_image, second.weight_text)]
        weighted = [to_numpy(x).astype(np.float64) for x in (second.weighted_image, second.weighted_text)]
        c = (weights[0] + weights[1])[:, None]
        e1, e2 = (to_numpy(x).astype(np.float64) for x in (image_features, text_features))
        scale = 1.0 / (2 * b)
        loss = scale * sum(np.sum(t_ * v_) for t_, v_ in zip(temperatures, value, strict=True))
        surrogate = loss + scale * sum(np.sum(t_ * w_) for t_, w_ in zip(temperatures, weights, strict=True))
        slopes = tuple(scale * (v_ - w_) for v_, w_ in zip(value, weighted, strict=True))
        return {
            "loss": loss,
            "surrogate": surrogate,
            "image_gradient": scale * (to_numpy(second.image_pull) - c * e2),
            "text_gradient": scale * (to_numpy(second.text_pull) - c * e1),
            "temperature_gradient": slopes if isinstance(temperature, tuple) else sum(map(np.sum, slopes)),
            "log_inner_image": new[0],
            "log_inner_text": new[1],
        }

    return contrastive_step


def _as(values: np.ndarray, like: Any) -> Any:
    """Carry a float32 vector to the library of `like`."""
    import array_api_compat

    xp = array_api_compat.array_namespace(like)
    return xp.asarray(values.astype(np.float32), device=array_api_compat.device(like))


@dataclass(frozen=True)
class Fused:
    """What the tests of the kernels share."""

    draw: Callable[..., FusedProblem] = draw
    check: Callable[..., None] = check
    step: Callable[..., Any] = step


@pytest.fixture(scope="session")
def fused() -> Fused:
    return Fused()
