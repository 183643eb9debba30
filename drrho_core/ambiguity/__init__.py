"""Ambiguity sets, and the worst case of a weighted mean of losses over such a set.

An ambiguity set holds the weights that an adversary may put on the losses. The worst case is the largest weighted mean
of the losses over the weights in the set.

Reading order: `sets` holds the formulas and `worst_case` the public function. Then come the solvers. `sorted` holds the
solvers with a closed form over sorted losses. `searched` holds the solvers for weights that depend on one unknown
number, which Newton's method finds. The solvers share `balls` (the limits of a ball, at which the worst case is the
mean or the maximum), `search` (a binary search and Newton's method), `exponential` (weights proportional to
exponentials), `slices` (the arrays that a solver works on) and `rounding` (arithmetic without loss of digits). `checks`
checks the losses that a user passes.
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
