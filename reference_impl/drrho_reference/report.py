"""The report of the conformance kit.

The kit gives problems to an implementation and compares the answers with the right answers. An answer consists of named
fields. A report consists of cases, and each case has one result (a :class:`Field`) per field of the answer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from drrho_reference.cases.scales import WRAPPERS

PASSED, FAILED, NOT_GIVEN, NOT_SUPPORTED, ERROR = "passed", "failed", "not given", "not supported", "error"
INCOMPLETE = "incomplete"


@dataclass(frozen=True)
class Field:
    """The result of one field of one answer.

    Attributes
    ----------
    name : str
        The field's name; ``"value"`` or ``"index"`` if the answer is a single array.
    verdict : str
        ``"passed"``, ``"failed"``, ``"not given"``, ``"not supported"`` or ``"error"``.
    relative : float or None
        The largest error, divided by the size of the terms from which the field is computed (``cases/scales.py``). None
        if the field was not compared.
    ulps : float or None
        ``relative`` in units of the dtype's machine epsilon.
    bound : float
        The largest ``relative`` that passes.
    note : str
        The reason of the verdict in words; empty if ``relative`` and ``bound`` are the reason.
    at : tuple of int
        The position of the largest error in the field. If the field is a pair of arrays, the first number says which
        array of the pair, 0 or 1. The tuple is empty if the field was not compared, or if the field is a number.
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
    """The result of one problem in one dtype or, if the problem has many slices, the result of one slice.

    ``function`` is the name of the function that was called, ``name`` is the name of the case, and ``sentence`` is a
    description of the case in a single sentence.
    """

    function: str
    name: str
    sentence: str
    dtype: str
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Report:
    """The result of :func:`drrho_reference.conformance.check`.

    Attributes
    ----------
    cases : tuple of Case
        The results of all problems in all dtypes that were tested.
    not_given : tuple of str
        The functions of the API that the implementation lacks. The tuple is empty if the implementation is a single
        function.
    """

    cases: tuple[Case, ...]
    not_given: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Return ``"passed"``, ``"failed"`` or ``"incomplete"``.

        ``"passed"``: every field of every case is right. ``"failed"``: a field is wrong, or an exception was raised.
        ``"incomplete"``: no field is wrong, but a field was not given, or an option is not supported.
        """
        # One wrong field makes the report "failed", one missing field makes it "incomplete".
        verdicts = {field.verdict for case in self.cases for field in case.fields}
        if verdicts & {FAILED, ERROR}:
            return FAILED
        return PASSED if verdicts == {PASSED} else INCOMPLETE

    @property
    def passed(self) -> bool:
        """True if every field of every case passed; a field that is not given or not supported has not passed."""
        return self.verdict == PASSED

    @property
    def complete(self) -> bool:
        """True if all cases passed and the implementation has all functions of the API.

        The functions in ``WRAPPERS``, which only wrappers for libraries with autograd need, may be missing.
        """
        return self.passed and set(self.not_given) <= set(WRAPPERS)

    def table(self) -> str:
        """Return the report as plain text: one line per function and dtype, then one line per failed field.

        The line of a function and dtype holds the number of fields with each verdict and the worst error. The last
        lines name missing fields, options and functions.
        """
        # One line per function and dtype.
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
                _, case, worst = max(compared, key=lambda entry: entry[0])
                line += f" {worst.relative:>11.1e} {worst.ulps:>9.2g} {worst.bound:>8.0e}  {case.name}, {worst.name}"
            lines.append(line)
        # One line per failed field.
        lines += [
            f"{field.verdict}: {case.function}, {case.name}, {case.dtype}: {field.name}"
            + (f": {field.note}" if field.note else _how_far(field))
            for case in self.cases
            for field in case.fields
            if field.verdict in (FAILED, ERROR)
        ]
        # One line per option or field that is missing, with the first three cases that need it.
        absences: dict[tuple[str, str, str], list[str]] = {}
        for case in self.cases:
            for field in case.fields:
                if field.verdict in (NOT_GIVEN, NOT_SUPPORTED):
                    # An option that was refused gives one line, not one line for each field.
                    missing = field.note or field.name
                    places = absences.setdefault((field.verdict, case.function, missing), [])
                    places += [] if case.name in places else [case.name]
        for (verdict, function, missing), places in absences.items():
            where = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
            lines.append(f"{verdict}: {function}: {missing} ({where})")
        if self.not_given:
            lines.append(f"not given: {', '.join(self.not_given)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the report as dictionaries and lists for :mod:`json`; an error that is not finite becomes None."""

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
    """Return the error of a failed field in words: the relative error, the error in ulps, and the position."""
    where = f" at {list(field.at)}" if field.at else ""
    return f": {field.relative:.1e} ({field.ulps:.2g} ulps), allowed {field.bound:.1e}{where}"
