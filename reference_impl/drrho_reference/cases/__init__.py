"""The problems of the conformance kit, one file per subject.

- ``problem.py``: the form of a problem; ``draws.py``: inputs that several subjects share.
- ``ambiguity_sets.py``, ``contrastive.py`` (the step on images and texts, and the step on two views of one modality),
  ``estimator.py``, ``losses.py``, ``selection.py``, ``theory.py``: problems that the oracle, the slow NumPy
  implementation, answers.
- ``extremes.py``: problems whose exponentials leave the range of float64. The oracle cannot answer these problems, so
  their answers are stored numbers.
- ``large_logits.py`` and ``weight_sums.py``: problems with temperatures down to 1e-10; ``softmax.py`` computes the
  answers.
- ``scales.py``: the sizes that errors are divided by, and the largest quotients that pass.
- ``calls.py``: the calls of each function that is tested by several calls, and the fields that are compared.

``questions.py`` rounds a problem to a dtype and computes the right answer; ``conformance.py`` gives the problems to an
implementation.
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
