"""The conformance kit: it compares an implementation of drrho_core's formulas with the oracle.

The oracle is the slow NumPy implementation in this package.

:func:`check` takes an implementation (a module, a mapping of names to functions, or a single function), calls its
functions on small problems, and compares the answers with the oracle's, field by field. The kit imports NumPy and the
standard library only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from drrho_reference._checks import FloatArray
from drrho_reference.cases.calls import oracle_set, to_numpy
from drrho_reference.cases.draws import SET_NAMES
from drrho_reference.cases.problem import Arguments, Problem, SetOf
from drrho_reference.cases.scales import FUNCTIONS, SINGLE, dual_value
from drrho_reference.questions import Question, answered, checked_dtypes, ordered_problems, rebuilt, story_of
from drrho_reference.report import ERROR, FAILED, NOT_GIVEN, NOT_SUPPORTED, PASSED, Case, Field, Report


def check(
    implementation: Any,
    *,
    xp: Any = np,
    device: Any = None,
    dtypes: Iterable[str] = ("float64", "float32"),
) -> Report:
    """Compare an implementation with the oracle.

    Parameters
    ----------
    implementation : module, mapping or function
        A module or another namespace, a mapping of names to functions, or a single function, which is identified by its
        ``__name__``. Names and signatures are those of ``docs/api.md``. A function may return only some of the fields,
        as a tuple with named fields, another object with attributes, or a mapping. Ambiguity sets are objects of the
        implementation's own classes if it has such classes, and of the oracle's classes otherwise.
    xp : namespace
        Namespace of the arrays that the implementation takes: NumPy, ``torch``, ``jax.numpy``, ``cupy`` or a similar
        library.
    device : device, optional
        Device of the arrays, as ``xp.asarray`` takes it.
    dtypes : iterable of str
        ``"float64"``, ``"float32"``, or both of these.

    Returns
    -------
    Report
        All cases with their errors. ``passed`` and ``verdict`` sum up the cases; ``table()`` and ``to_json()`` return
        the report as text and as plain dictionaries.

    Raises
    ------
    TypeError
        If the implementation has no function with a name of the API.
    ValueError
        If a dtype is neither ``"float64"`` nor ``"float32"``.

    Notes
    -----
    The oracle gets the inputs after rounding to the dtype. An error is divided by the size of the terms of a sum and
    not by the sum, because the terms may cancel. This size is the largest sum of weights for a feature gradient,
    max(|loss|, temperature) for a loss, max(1, |log u|) for a state log u, the largest loss for a risk, and the
    largest weight for weights. Several dual pairs (nu, s) may be right, so the values of the dual problem at the pairs
    are compared and not the pairs. A missing field is "not given"; an option that is refused, or a
    ``NotImplementedError``, is "not supported". These two verdicts are no failures, but such a field has not passed. A
    problem with many slices is one call, and every slice is a case. If exponentials of a problem leave the range of
    float64, the answer is compared with stored numbers that mpmath computed.

    Examples
    --------
    >>> import numpy as np
    >>> def excess_loss(loss, reference_loss, /, *, reference_weight=1.0):
    ...     return loss - reference_loss
    >>> report = check(excess_loss, dtypes=["float64"])
    >>> report.passed, [field.verdict for case in report.cases for field in case.fields]
    (False, ['failed'])
    >>> def fixed(loss, reference_loss, /, *, reference_weight=1.0):
    ...     return loss - reference_weight * reference_loss
    >>> check({"excess_loss": fixed}).passed
    True
    """
    # Every problem in every dtype, if the implementation has the function of the problem.
    names = checked_dtypes(dtypes)
    functions, own_sets = _members(implementation)
    done = tuple(
        case
        for dtype in names
        for problem in ordered_problems()
        if problem.function in functions
        for case in _run(problem, functions[problem.function], own_sets, xp, device, dtype)
    )
    several = len(functions) > 1 or not callable(implementation)
    return Report(done, tuple(name for name in FUNCTIONS if several and name not in functions))


def _members(implementation: Any) -> tuple[dict[str, Callable[..., Any]], dict[str, Any]]:
    """Return the implementation's functions and its classes of ambiguity sets, two mappings whose keys are names."""

    def look_up(name: str) -> Any:
        if isinstance(implementation, Mapping):
            return implementation.get(name)
        return getattr(implementation, name, None)

    # A namespace or a mapping is searched for all names; a single function has its name in __name__.
    functions = {name: look_up(name) for name in FUNCTIONS if callable(look_up(name))}
    own_name = getattr(implementation, "__name__", None)
    if not functions and callable(implementation) and own_name in FUNCTIONS:
        functions = {str(own_name): implementation}
    if not functions:
        raise TypeError(
            f"implementation must be a module, a mapping or a function with a name of {', '.join(FUNCTIONS)}, "
            f"got {implementation!r}"
        )
    return functions, {name: look_up(name) for name in SET_NAMES if look_up(name) is not None}


# ---------------------------------------------------------------------------------------------------------------------
# One problem
# ---------------------------------------------------------------------------------------------------------------------


def _run(
    problem: Problem, function: Callable[..., Any], own_sets: Mapping[str, Any], xp: Any, device: Any, dtype: str
) -> list[Case]:
    """Give a problem to the implementation and compare the answer; return one case, or one case per named row."""
    question = answered(problem, dtype)
    arguments, expected = question.arguments, question.expected

    def everywhere(verdict: str, note: str) -> list[Case]:
        fields = tuple(Field(name, verdict, None, None, question.bound_of(name), note) for name in expected)
        return _cases(problem, dtype, [fields] * max(1, len(problem.rows)))

    # If the implementation lacks an option or a set, the verdict is "not supported", which is no failure.
    asked = {**arguments.options, **arguments.how}
    refused = _refused(function, asked)
    if refused:
        return everywhere(NOT_SUPPORTED, f"no option {', '.join(refused)}")
    for value in arguments.positional:
        if isinstance(value, SetOf) and own_sets and value.name not in own_sets:
            return everywhere(NOT_SUPPORTED, f"no {value.name}")

    # Arrays are made by the implementation's own library, in the dtype of the problem and on the device.
    def given(value: Any) -> Any:
        if isinstance(value, SetOf):
            return own_sets[value.name](**value.parameters) if own_sets else oracle_set(value)
        if isinstance(value, tuple):
            return rebuilt(value, map(given, value))
        if isinstance(value, np.ndarray):
            place = {} if device is None else {"device": device}
            if value.dtype.kind in "iu":  # a list has no dtype, so the library chooses its default integers
                return xp.asarray(value.tolist(), **place)
            boolean = xp.bool if hasattr(xp, "bool") else xp.bool_
            kind = boolean if value.dtype == np.bool_ else getattr(xp, dtype)
            return xp.asarray(value.tolist(), dtype=kind, **place)
        return value

    try:
        # A story calls the function several times; without a story there is one call.
        story = story_of(problem)
        call = functools.partial(story, function) if story else function
        answer = call(*map(given, arguments.positional), **{name: given(value) for name, value in asked.items()})
    except NotImplementedError as error:
        return everywhere(NOT_SUPPORTED, _one_line(error))
    except TypeError as error:
        verdict = NOT_SUPPORTED if "unexpected keyword argument" in str(error) else ERROR
        return everywhere(verdict, _one_line(error))
    except Exception as error:  # any exception of a user's function is reported, and the check continues
        return everywhere(ERROR, _one_line(error))

    rows: list[list[Field]] = [[] for _ in range(max(1, len(problem.rows)))]
    for name in expected:
        for row, field in zip(rows, _fields(problem, question, answer, name, dtype), strict=True):
            row.append(field)
    return _cases(problem, dtype, [tuple(row) for row in rows])


def _cases(problem: Problem, dtype: str, rows: Sequence[tuple[Field, ...]]) -> list[Case]:
    """Return one case per row of a problem."""
    names = [problem.row_name(row) for row in problem.rows] or [problem.name]
    return [
        Case(problem.function, name, problem.sentence, dtype, fields) for name, fields in zip(names, rows, strict=True)
    ]


def _fields(problem: Problem, question: Question, answer: Any, name: str, dtype: str) -> list[Field]:
    """Compare one field; return one result, or one result per named row of the problem."""
    count, bound = max(1, len(problem.rows)), question.bound_of(name)
    value = _field(answer, name, single=problem.function in SINGLE)
    if value is None:
        return [Field(name, NOT_GIVEN, None, None, bound)] * count
    expected, scale = question.expected[name], question.scales[name]
    try:
        got = to_numpy(value)
        if name in question.limits and np.shape(got) == np.shape(expected):
            got = np.maximum(got, expected)  # values below a limit are right; nan stays nan and fails
        if name == "dual":
            got, expected = _certificate(question.arguments, got, question.expected)
    except Exception as error:  # for example if the field is no array
        return [Field(name, ERROR, None, None, bound, _one_line(error))] * count
    if not problem.rows or np.shape(got) != np.shape(expected):
        return [_compare(name, got, expected, scale, bound, dtype)] * count
    axis = 1 if name == "weights" and question.arguments.options.get("axis") == 0 else 0
    # Each row is compared alone, so that the report names the rows that fail.
    fields = []
    for row in range(count):
        here, there, size = (
            np.take(array, row, axis=axis) for array in (got, expected, np.broadcast_to(scale, expected.shape))
        )
        fields.append(_compare(name, here, there, size, bound, dtype))
    return fields


def _refused(function: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """Return the options that are not in the function's signature; an empty list if the signature cannot be read."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [
        name for name in options if name not in parameters or parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY
    ]


def _field(answer: Any, name: str, *, single: bool) -> Any:
    """Return a field of an answer: the value of a key, an attribute, or the answer itself if it is a single array."""
    if isinstance(answer, Mapping):
        return answer.get(name)
    return answer if single else getattr(answer, name, None)


def _certificate(arguments: Arguments, got: Any, expected: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Return the values of the dual problem at the pairs (nu, s), and the risks, which these values should equal."""
    if not isinstance(got, tuple) or len(got) != 2:
        raise TypeError("dual must be a pair (nu, s)")
    for part in got:
        if np.shape(part) != np.shape(expected["risk"]):
            raise ValueError(f"dual must have the shape {np.shape(expected['risk'])}, got {np.shape(part)}")
    return dual_value(arguments, got), np.asarray(expected["risk"])


def _compare(name: str, got: Any, expected: Any, scale: Any, bound: float, dtype: str) -> Field:
    """Compare a field with the expected values; the result holds the largest error divided by the scale."""
    # If the field is a pair of arrays, each side is compared alone, and the worse side is reported.
    if isinstance(expected, tuple):
        if not isinstance(got, tuple) or len(got) != len(expected):
            return Field(name, FAILED, np.inf, np.inf, bound, "a pair of arrays was expected")
        parts = [_compare(name, *three, bound, dtype) for three in zip(got, expected, scale, strict=True)]
        side = max(range(len(parts)), key=lambda k: (parts[k].verdict == FAILED, parts[k].relative or 0.0))
        return replace(parts[side], at=(side, *parts[side].at))
    if isinstance(got, tuple):
        got = np.asarray(got)
    if np.shape(got) != np.shape(expected):
        note = f"shape {np.shape(expected)} was expected, got {np.shape(got)}"
        return Field(name, FAILED, np.inf, np.inf, bound, note)
    here, there, size = np.broadcast_arrays(got, expected, scale)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        errors = np.abs(here - there) / size
    # Equal entries have the error 0, also if both are -inf (samples that were never visited). An error of nan fails.
    errors = np.where(here == there, 0.0, errors)
    errors = np.where(np.isnan(errors), np.inf, errors)
    worst = float(np.max(errors, initial=0.0))
    verdict = PASSED if worst <= bound else FAILED
    at = tuple(int(i) for i in np.unravel_index(np.argmax(errors), errors.shape)) if errors.size else ()
    return Field(name, verdict, worst, worst / float(np.finfo(dtype).eps), bound, at=at)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


__all__: Sequence[str] = ["Case", "Field", "Report", "check"]
