"""Problems with their right answers: the arguments rounded to a dtype, and the numbers that an answer should have.

``conformance.py`` gives these problems to an implementation; ``vectors.py`` writes them to files for other languages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import drrho_reference.ambiguity
import drrho_reference.anchor_posterior
import drrho_reference.anchor_weight
import drrho_reference.contrastive
import drrho_reference.estimator
import drrho_reference.losses
import drrho_reference.risk
import drrho_reference.scaling_law
import drrho_reference.selection
import drrho_reference.theory
import drrho_reference.unimodal
import drrho_reference.weighted_sum
from drrho_reference.cases import PROBLEMS
from drrho_reference.cases.calls import COMPARED, STORIES, oracle_set
from drrho_reference.cases.problem import Arguments, Problem, SetOf
from drrho_reference.cases.scales import FUNCTIONS, SCALES, SINGLE, bound

# The modules of the oracle in which a problem's function is looked up.
_MODULES = (
    drrho_reference.ambiguity,
    drrho_reference.risk,
    drrho_reference.contrastive,
    drrho_reference.unimodal,
    drrho_reference.estimator,
    drrho_reference.losses,
    drrho_reference.anchor_posterior,
    drrho_reference.anchor_weight,
    drrho_reference.selection,
    drrho_reference.theory,
    drrho_reference.scaling_law,
    drrho_reference.weighted_sum,
)


def checked_dtypes(dtypes: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the dtypes without repeats, after checking them; there must be at least one."""
    names = tuple(dict.fromkeys(dtypes))
    for name in names:
        if name not in ("float64", "float32"):
            raise ValueError(f"dtypes must hold 'float64' and 'float32' only, got {name!r}")
    if not names:
        raise ValueError("dtypes must hold at least one dtype, got none")
    return names


def ordered_problems() -> list[Problem]:
    """Return all problems, function by function."""
    return sorted(PROBLEMS, key=lambda problem: FUNCTIONS.index(problem.function))


def story_of(problem: Problem) -> Callable[..., Any] | None:
    """Return the story of a problem: a function that calls the problem's function more than once, or None.

    None means that one call of the problem's function is enough.
    """
    return problem.story or STORIES.get(problem.function)


def rebuilt(value: Any, parts: Iterable[Any]) -> Any:
    """Return a tuple of these parts; if ``value`` has named fields, the tuple has the class of ``value``."""
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


@dataclass(frozen=True)
class Question:
    """A problem in one dtype with the right answer.

    ``expected`` holds the fields of the answer, ``scales`` the sizes that errors are divided by, and ``bound`` the
    largest quotient that is allowed. If ``bounds`` holds a bound for a field, this bound is used instead of ``bound``.
    Fields in ``limits`` may be smaller than expected.
    """

    arguments: Arguments
    expected: Mapping[str, Any]
    scales: Mapping[str, Any]
    bound: float
    bounds: Mapping[str, float] | None = None
    limits: frozenset[str] = frozenset()

    def bound_of(self, name: str) -> float:
        """Return the largest error of a field, divided by the field's scale, that is allowed."""
        return (self.bounds or {}).get(name, self.bound)


@functools.cache
def answered(problem: Problem, dtype: str) -> Question:
    """Round the arguments of a problem to the dtype, and add the right answer."""
    # The oracle gets the rounded inputs, so that the rounding does not count as an error of the implementation.
    drawn = problem.arguments()

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return rebuilt(value, map(rounded, value))
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return value.astype(dtype).astype(np.float64)
        return float(np.dtype(dtype).type(value)) if isinstance(value, float) else value

    # Arguments are rounded to the dtype once, here; everything below is float64.
    arguments = Arguments(
        tuple(map(rounded, drawn.positional)),
        {name: rounded(value) for name, value in drawn.options.items()},
        drawn.how,
    )
    # A problem with large logits has a function that returns the right answer and the bounds.
    if problem.answer:
        answer = problem.answer(arguments, dtype)
        return Question(
            arguments, answer.expected, answer.scales, max(answer.bounds.values()), answer.bounds, answer.limits
        )
    # All other answers are stored numbers or the oracle's. Errors are divided by the size of the terms of a sum, not by
    # the sum itself, because the terms may cancel.
    expected = problem.stored.expected if problem.stored else _of_the_oracle(problem, arguments)
    scales = problem.stored.scales if problem.stored and problem.stored.scales else None
    if scales is None and problem.story:
        scales = {name: float(np.max(np.abs(value))) for name, value in expected.items()}
    elif scales is None:
        scales = SCALES[problem.function](arguments, expected)
    return Question(arguments, expected, scales, bound(problem.function, arguments, dtype))


def oracle_of(problem: Problem) -> Callable[..., Any]:
    """Return the oracle's function for a problem, or the story that calls this function more than once."""
    function = next(getattr(module, problem.function) for module in _MODULES if hasattr(module, problem.function))
    story = story_of(problem)
    return functools.partial(story, function) if story else function


def _of_the_oracle(problem: Problem, arguments: Arguments) -> dict[str, Any]:
    """Return the fields of the oracle's answer to a problem."""
    positional = [oracle_set(value) if isinstance(value, SetOf) else value for value in arguments.positional]
    positional = [float(value) if isinstance(value, np.ndarray) and value.ndim == 0 else value for value in positional]
    answer = oracle_of(problem)(*positional, **arguments.options)
    if problem.function in SINGLE:
        kind = np.int64 if SINGLE[problem.function] == "index" else np.float64
        return {SINGLE[problem.function]: np.asarray(answer, dtype=kind)}
    fields = dict(answer) if isinstance(answer, dict) else answer._asdict()
    return {name: fields[name] for name in COMPARED.get(problem.function, fields)}
