"""The contrastive step against the oracle on every array library, and against mpmath where the oracle's exp ends."""

from __future__ import annotations

from typing import Any

import mpmath as mp
import numpy as np
from drrho_reference import contrastive_step as oracle_step
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import ContrastiveStep

SEEDS = st.integers(0, 2**32 - 1)
FEATURES = st.sampled_from(["random", "aligned", "opposite", "identical", "ties"])
SCALARS = ("temperature", "gamma", "reference_weight", "radius", "eps")

# XLA compiles per shape and per structure of the arguments, so JAX gets few of them and draws values only.
FIXED = [
    {"b": 2, "d": 1, "r": None, "mask": None, "per_anchor_temperature": False, "gamma": "number", "as_arrays": ()},
    {"b": 5, "d": 4, "r": 3, "mask": None, "per_anchor_temperature": False, "gamma": "pair", "as_arrays": SCALARS},
    {"b": 6, "d": 3, "r": 5, "mask": "empty", "per_anchor_temperature": True, "gamma": "pair", "as_arrays": ("eps",)},
]


@st.composite
def structures(draw: Any, space: Any) -> dict[str, Any]:
    """Sizes and forms of the arguments."""
    if space.name == "jax":
        return dict(draw(st.sampled_from(FIXED if space.jit else FIXED[-1:])))
    return {
        "b": draw(st.integers(2, 7)),
        "d": draw(st.integers(1, 5)),
        "r": draw(st.sampled_from([None, 1, 3, 6])),
        "mask": draw(st.sampled_from([None, "random", "empty", "none"])),
        "per_anchor_temperature": draw(st.booleans()),
        "gamma": draw(st.sampled_from(["number", "pair", "one"])),
        "as_arrays": draw(st.sampled_from([(), SCALARS, ("temperature", "eps"), ("gamma", "radius")])),
    }


@st.composite
def values(draw: Any, b: int) -> dict[str, Any]:
    """Scalars and what the features look like."""
    return {
        "seed": draw(SEEDS),
        "features": draw(FEATURES),
        "reference_weight": draw(st.sampled_from([0.0, 0.5, 1.0, 1.5])),
        "eps": draw(st.sampled_from([0.0, 1e-4, 1 / (b - 1)])),
        "radius": draw(st.sampled_from([0.0, 0.7])),
    }


def drawn(data: Any, space: Any, problems: Any, **fixed: Any) -> Any:
    structure = data.draw(structures(space))
    return problems.draw(**structure, **data.draw(values(structure["b"])), **fixed)


def oracle(p: Any) -> ContrastiveStep:
    result = oracle_step(*p.arrays, **p.options)
    return ContrastiveStep(*(getattr(result, name) for name in ContrastiveStep._fields))


@given(data=st.data())
@settings(max_examples=40)
def test_the_step_is_the_oracles(space: Any, problems: Any, data: Any) -> None:
    coldest = data.draw(st.sampled_from([0.01, 0.1, 1.0]))
    p = drawn(data, space, problems, temperature=(coldest, 10 * coldest), log_inner=3.0)
    exact = p.rounded(space)
    problems.check_step(p.run(space), oracle(exact), exact, space.unit)


# ---------------------------------------------------------------------------------------------------------------------
# Beyond the linear domain of float64
# ---------------------------------------------------------------------------------------------------------------------


def mpmath_step(p: Any) -> ContrastiveStep:
    """The step as docs/theory writes it, in the linear domain of numbers of 60 digits with any exponent."""
    with mp.workdps(60):
        b = p.batch_size
        E1, E2 = ([[mp.mpf(float(x)) for x in row] for row in side] for side in (p.image_features, p.text_features))

        def dot(left: Any, right: Any) -> Any:
            return mp.fsum(x * y for x, y in zip(left, right, strict=True))

        Z = [[dot(image, text) for text in E2] for image in E1]
        if p.reference_features is not None:
            R1, R2 = ([[mp.mpf(float(x)) for x in row] for row in side] for side in p.reference_features)
            Z = [[Z[i][j] - mp.mpf(p.reference_weight) * dot(R1[i], R2[j]) for j in range(b)] for i in range(b)]
        t, gamma = (
            [np.broadcast_to(side, b) for side in (option if isinstance(option, tuple) else (option,) * 2)]
            for option in (p.temperature, p.gamma)
        )
        counts = ~np.eye(b, dtype=bool) & (True if p.pair_mask is None else p.pair_mask)
        loss = surrogate = mp.mpf(0)
        V = [[mp.mpf(0)] * b for _ in range(b)]
        c = [mp.mpf(0)] * b
        slopes, states = np.zeros((2, b)), np.array([p.log_inner_image, p.log_inner_text])
        total_slope = mp.mpf(0)
        for side in (0, 1):
            for a in range(b):
                others = [j for j in range(b) if (counts[a, j] if side == 0 else counts[j, a])]
                if not others:
                    continue
                tau = mp.mpf(float(t[side][a]))
                D = {j: ((Z[a][j] if side == 0 else Z[j][a]) - Z[a][a]) / tau for j in others}
                g = mp.fsum(map(mp.exp, D.values())) / len(others)
                weight = mp.mpf(float(gamma[side][a]))
                old = states[side, a]
                u = g if old == -np.inf else (1 - weight) * mp.exp(mp.mpf(float(old))) + weight * g
                w = {j: mp.exp(D[j]) / (mp.mpf(p.eps) + u) / len(others) for j in others}
                level = mp.log(mp.mpf(p.eps) + u) + mp.mpf(p.radius)
                loss += tau * level
                surrogate += tau * level + tau * g / (mp.mpf(p.eps) + u)
                slope = level - mp.fsum(w[j] * D[j] for j in others)
                total_slope += slope
                slopes[side, a] = float(slope / (2 * b))
                states[side, a] = float(mp.log(u))
                for j in others:
                    i, k = (a, j) if side == 0 else (j, a)
                    V[i][k] += w[j]
                    c[a] += w[j]

        def pulled(matrix: Any, other: Any) -> np.ndarray:
            width = range(len(other[0]))
            sums = [[mp.fsum(row[j] * other[j][k] for j in range(b)) for k in width] for row in matrix]
            return np.array([[float((sums[i][k] - c[i] * other[i][k]) / (2 * b)) for k in width] for i in range(b)])

        gradients = [pulled(V, E2), pulled(list(zip(*V, strict=True)), E1)]
        return ContrastiveStep(
            np.float64(loss / (2 * b)),
            np.float64(surrogate / (2 * b)),
            *gradients,
            tuple(slopes) if isinstance(p.temperature, tuple) else np.float64(total_slope / (2 * b)),
            *states,
        )


def test_mpmath_and_the_oracle_agree_where_both_can(problems: Any) -> None:
    p = problems.draw(3, mask="empty", per_anchor_temperature=True, gamma="pair", radius=0.3, eps=0.1)
    problems.check_step(mpmath_step(p), oracle(p), p, 1e-13)


@given(data=st.data())
@settings(max_examples=25)
def test_beyond_the_linear_domain_the_step_is_mpmaths(space: Any, problems: Any, data: Any) -> None:
    coldest = data.draw(st.sampled_from([1e-4, 1e-3, 1e-2]))
    log_inner = data.draw(st.sampled_from([1.0, 1e2, 1e4]))
    p = drawn(data, space, problems, temperature=(coldest, 2 * coldest), log_inner=log_inner)
    exact = p.rounded(space)
    problems.check_step(p.run(space), mpmath_step(exact), exact, space.unit, far=True)
