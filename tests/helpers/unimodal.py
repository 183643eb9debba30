"""The unimodal step once more, in 60 digits, and calls of the core's step."""

from __future__ import annotations

from typing import Any

import mpmath as mp
import numpy as np

from drrho_core import UnimodalStep, unimodal_contrastive_step

NEVER = -np.inf
FULL = {"per_anchor_temperature": True, "gamma": "pair", "radius": 0.3, "eps": 1e-4, "reference_weight": 1.5}
jitted_steps: dict[Any, Any] = {}


def run(p: Any, space: Any, **static: Any) -> UnimodalStep:
    """Take the step in the library; results come back as float64 NumPy arrays."""

    def step(arrays: Any, options: Any) -> UnimodalStep:
        return unimodal_contrastive_step(*arrays, **options, **static)

    if space.jit is not None:
        step = jitted_steps.setdefault((space.dtype_name, tuple(static.items())), space.jit(step))
    return to_numpy(step(*p.given(space)), space.to_numpy)


def to_numpy(step: Any, convert: Any) -> UnimodalStep:
    def one(value: Any) -> Any:
        return tuple(map(one, value)) if isinstance(value, tuple) else np.asarray(convert(value)).astype(np.float64)

    return UnimodalStep(*map(one, step))


def both(value: Any, b: int) -> np.ndarray:
    """One value per anchor, view 1 first."""
    return np.concatenate([np.broadcast_to(side, b) for side in (value if isinstance(value, tuple) else (value,) * 2)])


def exact(p: Any) -> UnimodalStep:
    """The step over 2b anchors, in the linear domain of numbers of 60 digits with any exponent."""
    with mp.workdps(60):
        b = p.batch_size
        anchors = range(2 * b)
        views = [[mp.mpf(float(x)) for x in row] for row in np.concatenate([p.image_features, p.text_features])]

        def dot(left: Any, right: Any) -> Any:
            return mp.fsum(x * y for x, y in zip(left, right, strict=True))

        A = [[dot(views[i], views[j]) for j in anchors] for i in anchors]
        if p.reference_features is not None:
            reference = [[mp.mpf(float(x)) for x in row] for row in np.concatenate(p.reference_features)]
            weight = mp.mpf(p.reference_weight)
            A = [[A[i][j] - weight * dot(reference[i], reference[j]) for j in anchors] for i in anchors]
        tau, gamma = ([mp.mpf(float(x)) for x in both(value, b)] for value in (p.temperature, p.gamma))
        old = np.concatenate([p.log_inner_image, p.log_inner_text])
        loss = surrogate = mp.mpf(0)
        slopes, states = [], []
        pull = [[mp.mpf(0)] * len(views[0]) for _ in anchors]
        for a in anchors:
            positive = (a + b) % (2 * b)
            # A text's similarity to an image is read from the same entry as the image's to the text.
            p_a = A[a % b][a % b + b]
            D = {j: (A[a][j] - p_a) / tau[a] for j in anchors if j % b != a % b}
            g = mp.fsum(map(mp.exp, D.values())) / (2 * b - 2)
            u = g if old[a] == NEVER else (1 - gamma[a]) * mp.exp(mp.mpf(float(old[a]))) + gamma[a] * g
            w = {j: mp.exp(D[j]) / (mp.mpf(p.eps) + u) / (2 * b - 2) for j in D}
            level = mp.log(mp.mpf(p.eps) + u) + mp.mpf(p.radius)
            loss += tau[a] * level
            surrogate += tau[a] * (level + g / (mp.mpf(p.eps) + u))
            slopes.append(float((level - mp.fsum(w[j] * D[j] for j in D)) / (2 * b)))
            states.append(float(mp.log(u)))
            for j in D:
                for left, right, size in ((a, j, w[j]), (j, a, w[j]), (a, positive, -w[j]), (positive, a, -w[j])):
                    pull[left] = [x + size * y for x, y in zip(pull[left], views[right], strict=True)]
        gradient = np.array([[float(x / (2 * b)) for x in row] for row in pull])
        pair = np.array(slopes[:b]), np.array(slopes[b:])
        return UnimodalStep(
            np.float64(loss / (2 * b)),
            np.float64(surrogate / (2 * b)),
            gradient[:b],
            gradient[b:],
            pair if isinstance(p.temperature, tuple) else np.float64(sum(slopes)),
            np.array(states[:b]),
            np.array(states[b:]),
        )


def check(actual: UnimodalStep, expected: UnimodalStep, p: Any, unit: float) -> None:
    """Compare all fields within max(1, 0.1 / temperature) units of the size of what is summed, before it cancels."""
    b, tau = p.batch_size, both(p.temperature, p.batch_size)
    views = np.concatenate([p.image_features, p.text_features])
    A = views @ views.T
    if p.reference_features is not None:
        reference = np.concatenate(p.reference_features)
        A = A - p.reference_weight * reference @ reference.T
    positive = A[np.arange(2 * b), (np.arange(2 * b) + b) % (2 * b)]
    negative = (np.arange(2 * b)[:, None] - np.arange(2 * b)[None, :]) % b != 0
    with np.errstate(divide="ignore"):
        level = np.logaddexp(np.concatenate([expected.log_inner_view1, expected.log_inner_view2]), np.log(p.eps))
    D = (A - positive[:, None]) / tau[:, None]
    w = np.exp(np.where(negative, D - level[:, None] - np.log(2 * b - 2), NEVER))
    terms = np.maximum(1.0, np.maximum(np.abs(level) + p.radius, (w * np.abs(D)).sum(axis=1)))
    total = w.sum(axis=1)
    pull = max(float(np.max(total[:b] + total[b:])) / (2 * b), 1e-37)  # what float32 cannot hold is no error
    slope = np.full(b, np.max(terms) / (2 * b))
    scales = UnimodalStep(
        float(np.mean(tau * terms)),
        float(np.mean(tau * (terms + total))),
        pull,
        pull,
        (slope, slope) if isinstance(p.temperature, tuple) else float(np.max(terms)),
        np.maximum(1.0, np.abs(expected.log_inner_view1)),
        np.maximum(1.0, np.abs(expected.log_inner_view2)),
    )
    bound = max(1.0, 0.1 / float(np.min(tau))) * unit
    for name, got, wanted, scale in zip(UnimodalStep._fields, actual, expected, scales, strict=True):
        for one, other, size in (
            zip(got, wanted, scale, strict=True) if isinstance(wanted, tuple) else [(got, wanted, scale)]
        ):
            assert np.shape(one) == np.shape(other), name
            error = np.abs(one - other) / size
            assert np.all(error <= bound), f"{name}: off by {np.max(error):.2e}, allowed {bound:.2e}; {one} for {other}"


def surrogate(xp: Any, p: Any, Z1: Any, Z2: Any, t1: Any, t2: Any, frozen: Any) -> Any:
    """sum_a [ t_a (sg L_a + radius) + sg t_a g_a / (eps + sg u_a) ] / 2b; `frozen` is u, or None: then t L."""
    b = p.batch_size
    views, tau = xp.concatenate([Z1, Z2]), xp.concatenate([t1, t2])
    A = views @ views.T
    if p.reference_features is not None:
        reference = np.concatenate(p.reference_features)
        A = A - xp.asarray(p.reference_weight * reference @ reference.T)
    index = np.arange(2 * b)
    negative = xp.asarray(((index[:, None] - index[None, :]) % b != 0) * 1.0)
    g = (xp.exp((A - A[index, (index + b) % (2 * b)][:, None]) / tau[:, None]) * negative).sum(1) / (2 * b - 2)
    if frozen is None:
        return (tau * (xp.log(p.eps + g) + p.radius)).sum() / (2 * b)
    level = xp.asarray(np.log(p.eps + frozen) + p.radius)
    return (tau * level + xp.asarray(both(p.temperature, b)) * g / xp.asarray(p.eps + frozen)).sum() / (2 * b)
