"""The ambiguity sets of the oracle that its tests share, and their divergences and duals in high precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from drrho_reference import (
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    worst_case,
)
from hypothesis import settings
from hypothesis import strategies as st

FAMILIES: dict[str, list[Any]] = {
    # from the mean towards the maximum: the risk rises along each list
    "cvar": [CVaR(alpha) for alpha in (1.0, 0.8, 0.5, 0.31, 0.1, 0.01)],
    "kl_penalty": [KLPenalty(temperature) for temperature in (1e6, 10.0, 2.0, 0.3, 1e-6)],
    "kl_ball": [KLBall(radius) for radius in (0.0, 1e-9, 0.1, 0.5, 1.2, 1e3)],
    "chi_square_penalty": [ChiSquarePenalty(strength) for strength in (1e6, 10.0, 2.0, 0.3, 1e-6)],
    "chi_square_ball": [ChiSquareBall(radius) for radius in (0.0, 1e-9, 0.1, 0.5, 2.0, 1e3)],
    "cressie_read_3": [CressieReadBall(3.0, radius) for radius in (0.0, 1e-9, 0.1, 0.5, 2.0, 1e6)],
    "cressie_read_1.3": [CressieReadBall(1.3, radius) for radius in (0.0, 1e-9, 0.1, 0.5, 2.0, 1e3)],
    "capped_kl_penalty": [
        CappedKLPenalty(*both) for both in ((1e6, 1.0), (10.0, 0.8), (2.0, 0.5), (0.5, 0.31), (0.3, 0.05), (1e-6, 0.01))
    ],
}
PENALTIES = (KLPenalty, ChiSquarePenalty, CappedKLPenalty)
SETS = [ambiguity_set for family in FAMILIES.values() for ambiguity_set in family[1:-1]]


def solve(losses: Any, ambiguity_set: Any, **options: Any) -> tuple[float, list[float], float, float]:
    """One slice: risk, weights, nu, s as plain numbers."""
    result = worst_case(losses, ambiguity_set, **options)
    return float(result.risk), result.weights.tolist(), float(result.dual[0]), float(result.dual[1])


# Multiples of 1/8, so that ties happen and sums with other multiples are exact; between them any float.
eighths = st.integers(-80, 80).map(lambda whole: whole / 8)
one_loss = eighths | st.floats(-10.0, 10.0, allow_subnormal=False)
some_losses = st.lists(one_loss, min_size=1, max_size=9).map(np.array)
few = settings(max_examples=20)
