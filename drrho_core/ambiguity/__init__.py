"""Ambiguity sets and the worst case over them.

Reading order: `sets` (the formulas), `worst_case` (the public entry), then the solvers: `sorted` (closed forms over
sorted losses) and `searched` (a scale found by Newton's method). They share `balls` (the two ends of a ball),
`search` (the two searches), `exponential` (weights in proportion to exponentials), `slices` (the arrays) and
`rounding` (arithmetic that keeps its digits). `checks` holds the checks of losses.
"""

from drrho_core.ambiguity.sets import (
    AmbiguitySet,
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
)
from drrho_core.ambiguity.worst_case import WorstCase, worst_case

__all__ = [
    "AmbiguitySet",
    "CVaR",
    "CappedKLPenalty",
    "ChiSquareBall",
    "ChiSquarePenalty",
    "CressieReadBall",
    "KLBall",
    "KLPenalty",
    "WorstCase",
    "worst_case",
]
