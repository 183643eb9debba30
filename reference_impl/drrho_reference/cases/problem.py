"""The form of a problem: a function of the API, its arguments, and the source of the right answer.

A draw is a function of a random generator that returns positional arguments and options in float64. The name of the
draw is the name of the case. Its docstring, a single sentence, is the description of the case in the report and in the
test vectors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# The argument is an np.random.Generator. The type is Any here, because naming the class would import numpy.random.
Draw = Callable[[Any], tuple[Any, ...]]


@dataclass(frozen=True)
class SetOf:
    """The name and parameters of an ambiguity set; the oracle and an implementation have different classes for it."""

    name: str
    parameters: Mapping[str, float]

    def build(self, namespace: Any) -> Any:
        """Build the set from a namespace that has the class."""
        return getattr(namespace, self.name)(**self.parameters)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call; ``how`` holds options that affect speed and memory only, which the oracle lacks."""

    positional: tuple[Any, ...]
    options: Mapping[str, Any]
    how: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Stored:
    """An answer from ``extremes.json``: the fields and, if the file has them, the sizes that errors are divided by."""

    expected: Mapping[str, Any]
    scales: Mapping[str, Any] | None


class Answer(NamedTuple):
    """An answer that is computed without the oracle: the fields, the sizes that errors are divided by, and the bounds.

    A value of a field in ``limits`` may be smaller than the expected value, but not larger.
    """

    expected: Mapping[str, Any]
    scales: Mapping[str, Any]
    bounds: Mapping[str, float]
    limits: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Problem:
    """A named problem of one function. If the problem has many slices, ``rows`` holds a name for each slice.

    ``answer`` takes the arguments, which are already rounded to a dtype, and the name of this dtype, and returns the
    right answer. If ``answer`` is None, the right answer is ``stored``; if ``stored`` is None too, the oracle computes
    the right answer. If the problem needs more than one call, ``story`` takes the API's function and the arguments and
    makes these calls.
    """

    function: str
    name: str
    sentence: str
    draw: Draw
    rows: tuple[str, ...] = ()
    stored: Stored | None = None
    answer: Callable[[Arguments, str], Answer] | None = None
    story: Callable[..., Any] | None = None

    def row_name(self, row: str) -> str:
        """Return the name of the case of one row."""
        return f"{self.name}{', ' if ': ' in self.name else ': '}{row}"

    def arguments(self) -> Arguments:
        """Draw the arguments. The seed depends on the names only, so a problem does not depend on other problems."""
        # crc32, unlike hash(), gives the same seed in every process.
        drawn = self.draw(np.random.default_rng(zlib.crc32(f"{self.function} {self.name}".encode())))
        # A draw returns (positional,), (positional, options) or (positional, options, how); missing parts are empty.
        positional, options, how = (*drawn, {}, {})[:3]
        return Arguments(positional, options, how)


def entering(problems: list[Problem]) -> Callable[..., Callable[[Draw], Draw]]:
    """Return a decorator that adds a draw to a list of problems, once for each function that the decorator names.

    A leading or trailing underscore of the draw's name is not part of the case's name.
    """

    # The decorator returns the draw unchanged, so that a draw can be added for several functions.
    def problem(*functions: str) -> Callable[[Draw], Draw]:
        def enter(draw: Draw) -> Draw:
            sentence = (draw.__doc__ or "").strip()
            for function in functions:
                problems.append(Problem(function, draw.__name__.strip("_"), sentence, draw))
            return draw

        return enter

    return problem
