"""The kit passes what is right, and says of a planted defect which field it spoils."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from drrho_reference.conformance import Report, check

import drrho_core
from drrho_core import contrastive_step, worst_case


def verdicts(report: Report, *, case: str | None = None) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for one in report.cases:
        if case in (None, one.name):
            for field in one.fields:
                found.setdefault(field.name, set()).add(field.verdict)
    return found


def failed(report: Report) -> set[str]:
    return {field.name for one in report.cases for field in one.fields if field.verdict == "failed"}


def test_the_core_passes_with_every_field() -> None:
    report = check(drrho_core)
    assert report.passed, report.table()
    assert report.not_given == ()
    assert {field.verdict for case in report.cases for field in case.fields} == {"passed"}
    assert {case.dtype for case in report.cases} == {"float64", "float32"}
    assert all(case.sentence.endswith(".") for case in report.cases)
    keys = [(case.function, case.name, case.dtype) for case in report.cases]
    assert len(set(keys)) == len(keys)


def step_with(change: Callable[..., Any], **options: Any) -> Report:
    def planted(*arrays: Any, **given: Any) -> Any:
        return change(arrays, given)

    return check({"contrastive_step": planted}, dtypes=["float64"], **options)


def test_gamma_for_one_minus_gamma() -> None:
    def change(arrays: Any, given: Any) -> Any:
        if isinstance(given.get("gamma"), float):
            given["gamma"] = 1.0 - given["gamma"]
        return contrastive_step(*arrays, **given)

    report = step_with(change)
    assert not report.passed
    assert failed(report) >= {"log_inner_image", "log_inner_text", "loss"}
    assert verdicts(report, case="plain") == {name: {"passed"} for name in verdicts(report)}
    assert "failed: contrastive_step, gamma, float64: log_inner_image" in report.table()


def test_a_mean_over_n_instead_of_n_minus_one() -> None:
    def change(arrays: Any, given: Any) -> Any:
        step = contrastive_step(*arrays, **given)
        shift = np.log(len(arrays[0]) / (len(arrays[0]) - 1))
        return step._replace(log_inner_image=step.log_inner_image - shift)

    assert failed(step_with(change)) == {"log_inner_image"}


def test_a_temperature_gradient_off_by_a_half() -> None:
    def change(arrays: Any, given: Any) -> Any:
        step = contrastive_step(*arrays, **given)
        slope = step.temperature_gradient
        half = tuple(side / 2 for side in slope) if isinstance(slope, tuple) else slope / 2
        return step._replace(temperature_gradient=half)

    report = step_with(change)
    assert failed(report) == {"temperature_gradient"}
    assert verdicts(report)["temperature_gradient"] == {"failed"}


def test_eps_stored_in_the_state() -> None:
    def change(arrays: Any, given: Any) -> Any:
        step = contrastive_step(*arrays, **given)
        return step._replace(log_inner_text=np.logaddexp(step.log_inner_text, np.log(given.get("eps", 0.0) or 1e-300)))

    report = step_with(change)
    assert failed(report) == {"log_inner_text"}
    assert verdicts(report, case="eps")["log_inner_text"] == {"failed"}
    assert verdicts(report, case="gamma")["log_inner_text"] == {"passed"}


def test_nan_and_wrong_shapes_fail() -> None:
    def change(arrays: Any, given: Any) -> Any:
        step = contrastive_step(*arrays, **given)
        return step._replace(loss=step.loss * np.nan, image_gradient=step.image_gradient[:-1])

    report = step_with(change)
    assert failed(report) == {"loss", "image_gradient"}
    json.dumps(report.to_json(), allow_nan=False)


def test_a_missing_field_is_not_given_and_does_not_pass() -> None:
    report = step_with(lambda arrays, given: {"loss": contrastive_step(*arrays, **given).loss})
    assert report.passed  # what there is is right
    found = verdicts(report)
    assert found.pop("loss") == {"passed"}
    assert set(map(frozenset, found.values())) == {frozenset({"not given"})}
    assert not step_with(lambda arrays, given: {}).passed


def test_a_refused_keyword_is_not_supported() -> None:
    def mine(image: Any, text: Any, log_image: Any, log_text: Any, /, *, temperature: float) -> Any:
        return contrastive_step(image, text, log_image, log_text, temperature=temperature)

    mine.__name__ = "contrastive_step"
    report = check(mine)
    assert report.passed
    assert verdicts(report, case="plain")["loss"] == {"passed"}
    assert verdicts(report, case="eps")["loss"] == {"not supported"}
    assert report.table().count("not supported: contrastive_step: no option gamma, eps (eps)") == 1

    def refuses(arrays: Any, given: Any) -> Any:
        raise NotImplementedError("not yet")

    assert verdicts(step_with(refuses))["loss"] == {"not supported"}
    assert not step_with(refuses).passed


def test_an_exception_is_an_error() -> None:
    def change(arrays: Any, given: Any) -> Any:
        raise ZeroDivisionError("of all things")

    report = step_with(change)
    assert not report.passed
    assert verdicts(report)["loss"] == {"error"}
    assert "ZeroDivisionError: of all things" in report.table()

    def only_with_eps(arrays: Any, given: Any) -> Any:
        return change(arrays, given) if "eps" in given else contrastive_step(*arrays, **given)

    report = step_with(only_with_eps)
    assert verdicts(report)["loss"] == {"passed", "error"}
    assert not report.passed


def test_a_namespace_may_lack_functions_and_sets() -> None:
    part = SimpleNamespace(worst_case=worst_case, CVaR=drrho_core.CVaR)
    report = check(part, dtypes=["float32"])
    assert report.passed
    assert "contrastive_step" in report.not_given
    assert verdicts(report, case="CVaR: rows")["risk"] == {"passed"}
    assert verdicts(report, case="KLBall: rows")["risk"] == {"not supported"}


@pytest.mark.parametrize("field", ["risk", "weights", "dual"])
def test_each_field_of_a_risk_is_looked_at(field: str) -> None:
    def planted(losses: Any, ambiguity_set: Any, /, **options: Any) -> Any:
        result = worst_case(losses, ambiguity_set, **options)
        value = getattr(result, field)
        moved = (value[0] * 1.01, value[1]) if field == "dual" else value * (1 + 1e-8)
        return result._replace(**{field: moved})

    sets = {name: getattr(drrho_core, name) for name in ("CVaR", "KLPenalty", "KLBall", "ChiSquareBall")}
    assert failed(check({"worst_case": planted, **sets}, dtypes=["float64"])) == {field}


def test_what_cannot_be_checked_is_one_clear_error() -> None:
    with pytest.raises(TypeError, match="implementation must be a module, a mapping or a function with a name of"):
        check(lambda x: x)
    with pytest.raises(ValueError, match="dtypes must hold 'float64' and 'float32' only, got 'float16'"):
        check(drrho_core, dtypes=["float16"])
    with pytest.raises(ValueError, match="dtypes must hold at least one dtype, got none"):
        check(drrho_core, dtypes=[])
