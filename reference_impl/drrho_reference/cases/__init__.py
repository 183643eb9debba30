"""The problems of the conformance kit, one file per subject.

- ``problem.py``: the form of a problem; ``draws.py``: inputs that several subjects share.
- ``ambiguity_sets.py``, ``contrastive.py`` (both steps), ``estimator.py``, ``losses.py``, ``selection.py``,
  ``theory.py``: problems that the oracle answers.
- ``extremes.py``: problems beyond the range of the oracle's linear domain, answered by stored numbers.
- ``large_logits.py`` and ``weight_sums.py``: temperatures down to 1e-10, answered by ``softmax.py``.
- ``scales.py``: the sizes that errors are divided by, and the bounds.
- ``calls.py``: functions that need more than one call, and fields that are compared.

``questions.py`` rounds a problem to a dtype and finds the right answer; ``conformance.py`` asks an implementation.
"""

from __future__ import annotations

from drrho_reference.cases import (
    ambiguity_sets,
    contrastive,
    estimator,
    extremes,
    large_logits,
    losses,
    selection,
    theory,
    weight_sums,
)
from drrho_reference.cases.problem import Problem

# The order of the problems of one function is the order of its cases in the report and in the test vectors.
PROBLEMS: tuple[Problem, ...] = (
    *ambiguity_sets.PROBLEMS,
    *contrastive.PROBLEMS,
    *estimator.PROBLEMS,
    *losses.PROBLEMS,
    *selection.PROBLEMS,
    *theory.PROBLEMS,
    *extremes.PROBLEMS,
    *large_logits.PROBLEMS,
    *weight_sums.PROBLEMS,
)

__all__ = ["PROBLEMS"]
