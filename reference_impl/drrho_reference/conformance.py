"""The conformance kit, which tells whether an implementation of these formulas is right.

:func:`check` gives an implementation (a module, a mapping of names to functions, or one function) a few dozen small
problems and compares what comes back with the oracle, field by field. It knows NumPy and the standard library only;
what it checks is an argument.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

import drrho_reference._cases as cases
import drrho_reference._large_logits
import drrho_reference.ambiguity
import drrho_reference.anchor_weight
import drrho_reference.contrastive
import drrho_reference.estimator
import drrho_reference.losses
import drrho_reference.risk
import drrho_reference.selection
import drrho_reference.theory
import drrho_reference.unimodal
from drrho_reference._cases import Arguments, Problem, SetOf
from drrho_reference._checks import FloatArray

PASSED, FAILED, NOT_GIVEN, NOT_SUPPORTED, ERROR = "passed", "failed", "not given", "not supported", "error"
INCOMPLETE = "incomplete"
_MODULES = (
    drrho_reference.ambiguity,
    drrho_reference.risk,
    drrho_reference.contrastive,
    drrho_reference.unimodal,
    drrho_reference.estimator,
    drrho_reference.losses,
    drrho_reference.anchor_weight,
    drrho_reference.selection,
    drrho_reference.theory,
)


@dataclass(frozen=True)
class Field:
    """One field of one answer.

    Attributes
    ----------
    name : str
        The field's name; ``"value"`` or ``"index"`` where the answer is a single array.
    verdict : str
        ``"passed"``, ``"failed"``, ``"not given"``, ``"not supported"`` or ``"error"``.
    relative : float or None
        The largest error, over the size that the field is measured against; None where nothing was compared.
    ulps : float or None
        The same in units of the dtype's machine epsilon.
    bound : float
        What ``relative`` may be.
    note : str
        What went wrong, in words, where numbers do not say it.
    at : tuple of int
        Where in the field the error is largest; of a pair the first number says which side. Empty where nothing was
        compared, or the field is a number.
    """

    name: str
    verdict: str
    relative: float | None
    ulps: float | None
    bound: float
    note: str = ""
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """One problem, or one row of it, in one dtype: function, the case's name and sentence, and its fields."""

    function: str
    name: str
    sentence: str
    dtype: str
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Report:
    """What :func:`check` found.

    Attributes
    ----------
    cases : tuple of Case
        Every problem in every dtype.
    not_given : tuple of str
        Functions that a module or a mapping does not have.
    """

    cases: tuple[Case, ...]
    not_given: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Say how it went: ``"passed"``, ``"failed"`` or ``"incomplete"``.

        ``"passed"`` where every field of every case is right; ``"failed"`` where one is wrong or something was raised;
        ``"incomplete"`` where nothing is wrong, but a field was not given or an option not supported.
        """
        verdicts = {field.verdict for case in self.cases for field in case.fields}
        if verdicts & {FAILED, ERROR}:
            return FAILED
        return PASSED if verdicts == {PASSED} else INCOMPLETE

    @property
    def passed(self) -> bool:
        """True where every field of every case is right; what is not given or not supported has not passed."""
        return self.verdict == PASSED

    @property
    def complete(self) -> bool:
        """True where all cases passed and no function is missing, other than those of wrappers with autograd."""
        return self.passed and set(self.not_given) <= set(cases.WRAPPERS)

    def table(self) -> str:
        """Return plain text: per function and dtype the counts of verdicts and the worst error, then what is wrong."""
        lines = [
            f"{'function':<26} {'dtype':<8} {'passed':>6} {'failed':>6} {'error':>6} {'absent':>6} {'worst error':>11}"
            f" {'ulps':>9} {'bound':>8}  worst at"
        ]
        groups: dict[tuple[str, str], list[tuple[Case, Field]]] = {}
        for case in self.cases:
            groups.setdefault((case.function, case.dtype), []).extend((case, field) for field in case.fields)
        for (function, dtype), members in groups.items():
            verdicts = [field.verdict for _, field in members]
            absent = verdicts.count(NOT_GIVEN) + verdicts.count(NOT_SUPPORTED)
            counts = f"{verdicts.count(PASSED):>6} {verdicts.count(FAILED):>6} {verdicts.count(ERROR):>6} {absent:>6}"
            compared = [
                (field.relative / field.bound, case, field) for case, field in members if field.relative is not None
            ]
            line = f"{function:<26} {dtype:<8} {counts}"
            if compared:
                _, case, worst = max(compared, key=lambda one: one[0])
                line += f" {worst.relative:>11.1e} {worst.ulps:>9.2g} {worst.bound:>8.0e}  {case.name}, {worst.name}"
            lines.append(line)
        lines += [
            f"{field.verdict}: {case.function}, {case.name}, {case.dtype}: {field.name}"
            + (f": {field.note}" if field.note else _how_far(field))
            for case in self.cases
            for field in case.fields
            if field.verdict in (FAILED, ERROR)
        ]
        absences: dict[tuple[str, str, str], list[str]] = {}
        for case in self.cases:
            for field in case.fields:
                if field.verdict in (NOT_GIVEN, NOT_SUPPORTED):
                    what = field.note or field.name  # a refused option is one line, not one for each field
                    places = absences.setdefault((field.verdict, case.function, what), [])
                    places += [] if case.name in places else [case.name]
        for (verdict, function, what), places in absences.items():
            where = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
            lines.append(f"{verdict}: {function}: {what} ({where})")
        if self.not_given:
            lines.append(f"not given: {', '.join(self.not_given)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries and lists for :mod:`json`; an error that is not finite becomes None."""

        def finite(value: Any) -> Any:
            return None if isinstance(value, float) and not np.isfinite(value) else value

        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "not_given": list(self.not_given),
            "cases": [
                {
                    "function": case.function,
                    "name": case.name,
                    "sentence": case.sentence,
                    "dtype": case.dtype,
                    "fields": [{key: finite(value) for key, value in asdict(field).items()} for field in case.fields],
                }
                for case in self.cases
            ],
        }


def _how_far(field: Field) -> str:
    """Tell the error of a failed field: relative, in ulps, and where."""
    where = f" at {list(field.at)}" if field.at else ""
    return f": {field.relative:.1e} ({field.ulps:.2g} ulps), allowed {field.bound:.1e}{where}"


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
        Something with the names and signatures of ``docs/api.md``: a namespace, a mapping of names to functions, or one
        function, which is known by its ``__name__``. It may return some of the fields only, as a tuple with named
        fields, another object with attributes, or a mapping. Ambiguity sets are built from its own classes where it has
        any, else they are the oracle's.
    xp : namespace
        Whose arrays it takes: NumPy, ``torch``, ``jax.numpy``, ``cupy`` or another one like them.
    device : device, optional
        Where the arrays are to be, in the words of ``xp.asarray``.
    dtypes : iterable of str
        ``"float64"`` and ``"float32"``, or one of them.

    Returns
    -------
    Report
        ``passed``, ``verdict``, ``table()``, ``to_json()`` and all the cases.

    Raises
    ------
    TypeError
        If there is no function in the implementation that has a name of the API, or it is of no use at all.
    ValueError
        If a dtype is another one.

    Notes
    -----
    The oracle is given the inputs as they are after rounding to the dtype. Errors are measured against the size of what
    is summed before it cancels: a feature gradient against the largest sum of weights, a loss against max(its size,
    temperature), a state log u against max(1, its size), a risk against the largest loss, weights against the largest
    weight; of (nu, s) the value that they certify is compared. A missing field is "not given", a refused option or a
    ``NotImplementedError`` is "not supported"; neither is a failure, and neither counts as passed. A problem that asks
    for many slices at once is one call and a case for every row. Extremes, which leave float64's range in the linear
    domain, are compared with stored numbers that mpmath has worked out.

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
    names = checked_dtypes(dtypes)
    functions, own_sets = _found(implementation)
    done = tuple(
        case
        for dtype in names
        for problem in ordered_problems()
        if problem.function in functions
        for case in _run(problem, functions[problem.function], own_sets, xp, device, dtype)
    )
    several = len(functions) > 1 or not callable(implementation)
    return Report(done, tuple(name for name in cases.FUNCTIONS if several and name not in functions))


def checked_dtypes(dtypes: Iterable[str]) -> tuple[str, ...]:
    """Return the names of dtypes, at least one, each once."""
    names = tuple(dict.fromkeys(dtypes))
    for name in names:
        if name not in ("float64", "float32"):
            raise ValueError(f"dtypes must hold 'float64' and 'float32' only, got {name!r}")
    if not names:
        raise ValueError("dtypes must hold at least one dtype, got none")
    return names


def ordered_problems() -> list[Problem]:
    """Return all problems, function by function."""
    return sorted(cases.PROBLEMS, key=lambda problem: cases.FUNCTIONS.index(problem.function))


def _found(implementation: Any) -> tuple[dict[str, Callable[..., Any]], dict[str, Any]]:
    """Return its functions and its ambiguity sets by name."""

    def look_up(name: str) -> Any:
        if isinstance(implementation, Mapping):
            return implementation.get(name)
        return getattr(implementation, name, None)

    functions = {name: look_up(name) for name in cases.FUNCTIONS if callable(look_up(name))}
    own_name = getattr(implementation, "__name__", None)
    if not functions and callable(implementation) and own_name in cases.FUNCTIONS:
        functions = {str(own_name): implementation}
    if not functions:
        raise TypeError(
            f"implementation must be a module, a mapping or a function with a name of {', '.join(cases.FUNCTIONS)}, "
            f"got {implementation!r}"
        )
    return functions, {name: look_up(name) for name in cases.SET_NAMES if look_up(name) is not None}


# ---------------------------------------------------------------------------------------------------------------------
# One problem
# ---------------------------------------------------------------------------------------------------------------------


def _run(
    problem: Problem, function: Callable[..., Any], own_sets: Mapping[str, Any], xp: Any, device: Any, dtype: str
) -> list[Case]:
    """Ask the oracle and the implementation, and compare; a problem with named rows becomes a case for each."""
    question = answered(problem, dtype)
    arguments, expected = question.arguments, question.expected

    def everywhere(verdict: str, note: str) -> list[Case]:
        fields = tuple(Field(name, verdict, None, None, question.bound_of(name), note) for name in expected)
        return _cases(problem, dtype, [fields] * max(1, len(problem.rows)))

    asked = {**arguments.options, **arguments.how}
    refused = _refused(function, asked)
    if refused:
        return everywhere(NOT_SUPPORTED, f"no option {', '.join(refused)}")
    for one in arguments.positional:
        if isinstance(one, SetOf) and own_sets and one.name not in own_sets:
            return everywhere(NOT_SUPPORTED, f"no {one.name}")

    def given(value: Any) -> Any:
        if isinstance(value, SetOf):
            return own_sets[value.name](**value.parameters) if own_sets else cases.oracle_set(value)
        if isinstance(value, tuple):
            return _rebuilt(value, map(given, value))
        if isinstance(value, np.ndarray):
            place = {} if device is None else {"device": device}
            if value.dtype.kind in "iu":  # the library's own integers
                return xp.asarray(value.tolist(), **place)
            boolean = xp.bool if hasattr(xp, "bool") else xp.bool_
            kind = boolean if value.dtype == np.bool_ else getattr(xp, dtype)
            return xp.asarray(value.tolist(), dtype=kind, **place)
        return value

    try:
        story = _story(problem)
        call = functools.partial(story, function) if story else function
        answer = call(*map(given, arguments.positional), **{name: given(value) for name, value in asked.items()})
    except NotImplementedError as error:
        return everywhere(NOT_SUPPORTED, _one_line(error))
    except TypeError as error:
        verdict = NOT_SUPPORTED if "unexpected keyword argument" in str(error) else ERROR
        return everywhere(verdict, _one_line(error))
    except Exception as error:  # whatever a user's function raises is a finding, not the end of the report
        return everywhere(ERROR, _one_line(error))

    rows: list[list[Field]] = [[] for _ in range(max(1, len(problem.rows)))]
    for name in expected:
        for row, field in zip(rows, _fields(problem, question, answer, name, dtype), strict=True):
            row.append(field)
    return _cases(problem, dtype, [tuple(row) for row in rows])


def _cases(problem: Problem, dtype: str, rows: Sequence[tuple[Field, ...]]) -> list[Case]:
    """Name the rows of a problem."""
    names = [problem.row_name(row) for row in problem.rows] or [problem.name]
    return [
        Case(problem.function, name, problem.sentence, dtype, fields) for name, fields in zip(names, rows, strict=True)
    ]


def _story(problem: Problem) -> Callable[..., Any] | None:
    """Return what calls the function more than once, if the problem needs that."""
    return problem.story or cases.STORIES.get(problem.function)


def _fields(problem: Problem, question: Question, answer: Any, name: str, dtype: str) -> list[Field]:
    """Compare one field: one verdict, or one for each row of the problem."""
    count, bound = max(1, len(problem.rows)), question.bound_of(name)
    value = _field(answer, name, single=problem.function in cases.SINGLE)
    if value is None:
        return [Field(name, NOT_GIVEN, None, None, bound)] * count
    wanted, scale = question.expected[name], question.scales[name]
    try:
        got = cases.to_numpy(value)
        if name in question.limits and np.shape(got) == np.shape(wanted):
            got = np.maximum(got, wanted)  # less is as good, but nan is not
        if name == "dual":
            got, wanted = _certificate(question.arguments, got, question.expected)
    except Exception as error:  # not an array, say
        return [Field(name, ERROR, None, None, bound, _one_line(error))] * count
    if not problem.rows or np.shape(got) != np.shape(wanted):
        return [_compare(name, got, wanted, scale, bound, dtype)] * count
    axis = 1 if name == "weights" and question.arguments.options.get("axis") == 0 else 0
    found = []
    for row in range(count):
        here, there, size = (
            np.take(one, row, axis=axis) for one in (got, wanted, np.broadcast_to(scale, wanted.shape))
        )
        found.append(_compare(name, here, there, size, bound, dtype))
    return found


def _rebuilt(value: Any, parts: Iterable[Any]) -> Any:
    """Return a tuple of the same kind; one with named fields keeps its class."""
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


@dataclass(frozen=True)
class Question:
    """A problem in one dtype with the right answer: arguments, fields, what errors are measured against, bound.

    ``bounds`` holds the fields that have another bound; fields in ``limits`` may be smaller than expected.
    """

    arguments: Arguments
    expected: Mapping[str, Any]
    scales: Mapping[str, Any]
    bound: float
    bounds: Mapping[str, float] | None = None
    limits: frozenset[str] = frozenset()

    def bound_of(self, name: str) -> float:
        """Return how large the error of a field may be."""
        return (self.bounds or {}).get(name, self.bound)


@functools.cache
def answered(problem: Problem, dtype: str) -> Question:
    """Round the arguments to the dtype and answer: the oracle, or the stored numbers."""
    drawn = problem.arguments()

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return _rebuilt(value, map(rounded, value))
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return value.astype(dtype).astype(np.float64)
        return float(np.dtype(dtype).type(value)) if isinstance(value, float) else value

    arguments = Arguments(
        tuple(map(rounded, drawn.positional)),
        {name: rounded(value) for name, value in drawn.options.items()},
        drawn.how,
    )
    if problem.answer:
        answer = problem.answer(arguments, dtype)
        return Question(
            arguments, answer.expected, answer.scales, max(answer.bounds.values()), answer.bounds, answer.limits
        )
    expected = problem.stored.expected if problem.stored else _of_the_oracle(problem, arguments)
    scales = problem.stored.scales if problem.stored and problem.stored.scales else None
    if scales is None and problem.story:
        scales = {name: float(np.max(np.abs(value))) for name, value in expected.items()}
    elif scales is None:
        scales = cases.SCALES[problem.function](arguments, expected)
    return Question(arguments, expected, scales, cases.bound(problem.function, arguments, dtype))


def oracle_of(problem: Problem) -> Callable[..., Any]:
    """Return the oracle's function."""
    found = next(getattr(module, problem.function) for module in _MODULES if hasattr(module, problem.function))
    story = _story(problem)
    return functools.partial(story, found) if story else found


def _of_the_oracle(problem: Problem, arguments: Arguments) -> dict[str, Any]:
    """Ask the oracle; return its fields."""
    positional = [cases.oracle_set(one) if isinstance(one, SetOf) else one for one in arguments.positional]
    positional = [float(one) if isinstance(one, np.ndarray) and one.ndim == 0 else one for one in positional]
    answer = oracle_of(problem)(*positional, **arguments.options)
    if problem.function in cases.SINGLE:
        kind = np.int64 if cases.SINGLE[problem.function] == "index" else np.float64
        return {cases.SINGLE[problem.function]: np.asarray(answer, dtype=kind)}
    fields = dict(answer) if isinstance(answer, dict) else answer._asdict()
    return {name: fields[name] for name in cases.COMPARED.get(problem.function, fields)}


def _refused(function: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """Return the options that the signature does not have; none where it cannot be read."""
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
    """Return a field of an answer: a key, an attribute, or the answer itself where it is a single array."""
    if isinstance(answer, Mapping):
        return answer.get(name)
    return answer if single else getattr(answer, name, None)


def _certificate(arguments: Arguments, got: Any, expected: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Return the values that (nu, s) certifies and the risks that they should be."""
    if not isinstance(got, tuple) or len(got) != 2:
        raise TypeError("dual must be a pair (nu, s)")
    for part in got:
        if np.shape(part) != np.shape(expected["risk"]):
            raise ValueError(f"dual must have the shape {np.shape(expected['risk'])}, got {np.shape(part)}")
    return cases.dual_value(arguments, got), np.asarray(expected["risk"])


def _compare(name: str, got: Any, wanted: Any, scale: Any, bound: float, dtype: str) -> Field:
    """Return the largest error of a field over its scale."""
    if isinstance(wanted, tuple):
        if not isinstance(got, tuple) or len(got) != len(wanted):
            return Field(name, FAILED, np.inf, np.inf, bound, "a pair of arrays was expected")
        parts = [_compare(name, *three, bound, dtype) for three in zip(got, wanted, scale, strict=True)]
        side = max(range(len(parts)), key=lambda one: (parts[one].verdict == FAILED, parts[one].relative or 0.0))
        return replace(parts[side], at=(side, *parts[side].at))
    if isinstance(got, tuple):
        got = np.asarray(got)
    if np.shape(got) != np.shape(wanted):
        note = f"shape {np.shape(wanted)} was expected, got {np.shape(got)}"
        return Field(name, FAILED, np.inf, np.inf, bound, note)
    here, there, size = np.broadcast_arrays(got, wanted, scale)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        errors = np.abs(here - there) / size
    errors = np.where(here == there, 0.0, errors)  # log u of what was never visited is -inf on both sides
    errors = np.where(np.isnan(errors), np.inf, errors)
    worst = float(np.max(errors, initial=0.0))
    verdict = PASSED if worst <= bound else FAILED
    at = tuple(int(i) for i in np.unravel_index(np.argmax(errors), errors.shape)) if errors.size else ()
    return Field(name, verdict, worst, worst / float(np.finfo(dtype).eps), bound, at=at)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


__all__: Sequence[str] = ["Case", "Field", "Report", "check"]
