"""The kit passes what is right, and says of a planted defect which field it spoils."""

from __future__ import annotations

import inspect
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import drrho_reference
import mpmath
import numpy as np
import pytest
from drrho_reference.conformance import Report, check
from drrho_reference.questions import answered, ordered_problems

import drrho_core
from drrho_core import contrastive_step, weighted_sum, worst_case


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
    assert report.complete
    assert report.not_given == ("drrho_risk_vjp",)  # a function of wrappers, which know an upstream gradient
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
    assert verdicts(report, case="plain") == {name: {"passed"} for name in drrho_core.ContrastiveStep._fields}
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


@pytest.mark.parametrize("side", [0, 1])
def test_each_side_of_a_pair_is_looked_at(side: int) -> None:
    def change(arrays: Any, given: Any) -> Any:
        step = contrastive_step(*arrays, **given)
        if isinstance(step.temperature_gradient, tuple):
            step.temperature_gradient[side][3] += 0.5
        return step

    report = step_with(change)
    assert failed(report) == {"temperature_gradient"}
    wrong = [field.at for case in report.cases for field in case.fields if field.verdict == "failed"]
    assert set(wrong) == {(side, 3)}


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
    assert report.verdict == "incomplete"  # what there is is right
    assert not report.passed
    found = verdicts(report)
    assert found.pop("loss") == {"passed"}
    assert set(map(frozenset, found.values())) == {frozenset({"not given"})}
    assert step_with(lambda arrays, given: {}).verdict == "incomplete"


def test_a_refused_keyword_is_not_supported() -> None:
    def mine(image: Any, text: Any, log_image: Any, log_text: Any, /, *, temperature: float) -> Any:
        return contrastive_step(image, text, log_image, log_text, temperature=temperature)

    mine.__name__ = "contrastive_step"
    report = check(mine)
    assert report.verdict == "incomplete"
    assert not report.passed
    assert verdicts(report, case="plain")["loss"] == {"passed"}
    assert verdicts(report, case="eps")["loss"] == {"not supported"}
    assert report.table().count("not supported: contrastive_step: no option gamma, eps (eps)") == 1
    assert report.to_json()["verdict"] == "incomplete"

    def refuses(arrays: Any, given: Any) -> Any:
        raise NotImplementedError("not yet")

    assert verdicts(step_with(refuses))["loss"] == {"not supported"}
    assert step_with(refuses).verdict == "incomplete"


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
    assert report.verdict == "incomplete"
    assert "contrastive_step" in report.not_given
    assert verdicts(report, case="CVaR: signed")["risk"] == {"passed"}
    assert verdicts(report, case="KLBall: signed")["risk"] == {"not supported"}
    assert "not supported: worst_case: no KLBall (KLBall: positive" in report.table()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("problem", ordered_problems(), ids=lambda problem: f"{problem.function}-{problem.name}")
def test_what_errors_are_measured_against_is_finite(problem: Any, dtype: str) -> None:
    question = answered(problem, dtype)
    assert set(question.scales) >= set(question.expected)
    for name in question.expected:
        for scale in flat(question.scales[name]):
            assert np.all(np.isfinite(scale) & (scale > 0)), name
        if name in (question.bounds or {}):  # large logits: a softmax in float32 may be off by some percent
            assert 0 < question.bound_of(name) < 0.2
        else:
            assert 0 < question.bound_of(name) < 6e-3


def flat(value: Any) -> list[Any]:
    return [part for one in value for part in flat(one)] if isinstance(value, tuple) else [np.asarray(value)]


SETS = ("CVaR", "KLPenalty", "KLBall", "ChiSquarePenalty", "ChiSquareBall", "CressieReadBall", "CappedKLPenalty")


def test_every_set_is_asked_everything() -> None:
    names = {(problem.function, problem.name) for problem in ordered_problems()}
    assert len(names) == len(ordered_problems())
    for one in SETS:
        assert {(f, f"{one}{n}") for f in ("worst_case",) for n in ("", ": mask", ": extreme")} <= names
        assert {("drrho_risk", f"{one}: mask"), ("drrho_risk_vjp", f"{one}: mask")} <= names


def test_a_row_that_fails_is_named_alone() -> None:
    def planted(losses: Any, ambiguity_set: Any, /, **options: Any) -> Any:
        result = worst_case(losses, ambiguity_set, **options)
        if options.get("axis") == 0 or losses[3, 1] != losses[3, 2]:
            return result
        weights = result.weights.copy()
        weights[3] = weights[3][::-1]  # of the row with ties
        return result._replace(weights=weights)

    report = check({"worst_case": planted, "CVaR": drrho_core.CVaR}, dtypes=["float64"])
    wrong = [(case.name, field.name) for case in report.cases for field in case.fields if field.verdict == "failed"]
    assert wrong == [("CVaR: ties", "weights")]
    lines = [line for line in report.table().splitlines() if line.startswith("failed: ")]
    assert len(lines) == 1
    assert lines[0].startswith("failed: worst_case, CVaR: ties, float64: weights: ")
    assert lines[0].endswith("ulps), allowed 1.0e-10 at [2]")
    named = [
        case["name"] for case in report.to_json()["cases"] if "failed" in {one["verdict"] for one in case["fields"]}
    ]
    assert named == ["CVaR: ties"]


def test_a_masked_column_that_fails_is_named_alone() -> None:
    def planted(losses: Any, ambiguity_set: Any, /, **options: Any) -> Any:
        result = worst_case(losses, ambiguity_set, **options)
        if options.get("axis") == 0:
            result.weights[:, 1] *= 0.5
            result.risk[2] += 1.0
        return result

    report = check({"worst_case": planted, "KLBall": drrho_core.KLBall}, dtypes=["float64"])
    wrong = [(case.name, field.name) for case in report.cases for field in case.fields if field.verdict == "failed"]
    assert wrong == [("KLBall: mask, one", "weights"), ("KLBall: mask, all", "risk")]


def test_a_relative_error_stands_beside_its_ulps_and_its_place() -> None:
    def change(arrays: Any, given: Any) -> Any:
        step = contrastive_step(*arrays, **given)
        if "pair_mask" in given:
            step.text_gradient[2, 1] += 1.0
        return step

    report = step_with(change)
    field = next(
        field
        for case in report.cases
        for field in case.fields
        if case.name == "pair_mask" and field.verdict == "failed"
    )
    assert field.at == (2, 1)
    assert field.ulps == pytest.approx(field.relative * 2.0**52)
    line = next(line for line in report.table().splitlines() if line.startswith("failed: contrastive_step, pair_mask"))
    assert line.endswith(f"{field.relative:.1e} ({field.ulps:.2g} ulps), allowed 1.0e-12 at [2, 1]")


def test_an_estimator_that_forgets() -> None:
    class Forgetful(drrho_core.InnerEstimator):
        def grow(self, num_samples: int, /) -> Any:
            return Forgetful(num_samples, like=self.log_inner_image)

    report = check({"InnerEstimator": Forgetful}, dtypes=["float64"])
    assert failed(report) == {"state"}  # the copy is a copy of what is wrong, at the later positions
    assert verdicts(report)["visited"] == {"passed"}

    class Fixed(drrho_core.InnerEstimator):
        grow = property()  # type: ignore[assignment]

    report = check({"InnerEstimator": Fixed})
    assert report.verdict == "incomplete"
    assert "not supported: InnerEstimator: NotImplementedError: no method grow" in report.table()


def test_a_sum_that_mixes_parameters_up() -> None:
    def planted(*terms: Any) -> Any:
        total = weighted_sum(*terms)
        return total._replace(parameter_gradients=total.parameter_gradients[::-1])

    report = check({"weighted_sum": planted}, dtypes=["float64"])
    assert verdicts(report)["loss"] == {"passed"}
    assert verdicts(report)["parameter_gradients[0].temperature_gradient"] == {"not given"}
    assert verdicts(report)["parameter_gradients[1].temperature_gradient"] == {"passed"}
    assert not report.passed


@pytest.mark.parametrize(
    ("function", "change", "wrong"),
    [
        ("excess_variance", lambda x: x._replace(within_anchors=x.between_anchors), {"within_anchors"}),
        ("log_mean_exp_bias", lambda x: x._replace(predicted=x.predicted * 1.01), {"predicted"}),
        ("fit_scaling_law", lambda x: x._replace(exponent=-x.exponent, fitted=~x.fitted), {"exponent", "fitted"}),
        ("effective_sample_size", lambda x: x**0.5, {"value"}),
        ("generalization_bound", lambda x: x + 1e-11, {"value"}),
        ("hinge_margin_loss", lambda x: x._replace(loss=2 * x.loss), {"loss"}),
    ],
)
def test_each_function_is_looked_at(function: str, change: Callable[[Any], Any], wrong: set[str]) -> None:
    def planted(*arrays: Any, **options: Any) -> Any:
        return change(getattr(drrho_core, function)(*arrays, **options))

    assert failed(check({function: planted}, dtypes=["float64"])) == wrong


def clamped(states: np.ndarray) -> np.ndarray:
    return np.where(states == -np.inf, states, np.clip(states, -700, 700))


# Each mistake is invisible at ordinary temperatures: the oracle's own range ends before they show.
EXTREME_MISTAKES: dict[str, tuple[str, Callable[..., Any]]] = {
    "states are clamped": (
        "log_inner 1e4",
        lambda arrays, given: contrastive_step(*arrays[:2], *map(clamped, arrays[2:]), **given),
    ),
    "temperatures are clamped": (
        "temperature 1e-4",
        lambda arrays, given: contrastive_step(*arrays, **given | {"temperature": max(given["temperature"], 1e-3)}),
    ),
}


@pytest.mark.parametrize("mistake", EXTREME_MISTAKES)
def test_extremes_see_what_the_oracle_cannot(mistake: str) -> None:
    case, planted = EXTREME_MISTAKES[mistake]

    def change(arrays: Any, given: Any) -> Any:
        if isinstance(given["temperature"], tuple):
            return contrastive_step(*arrays, **given)
        return planted(arrays, given)

    report = step_with(change)
    assert not report.passed
    assert "failed" in verdicts(report, case=case)["log_inner_image"]
    assert verdicts(report, case="gamma") == {name: {"passed"} for name in drrho_core.ContrastiveStep._fields}


def test_the_oracle_passes_its_own_problems_where_it_reaches() -> None:
    names = ("worst_case", "drrho_risk", "drrho_risk_vjp", "info_nce", "reference_anchor_weight")
    part = {name: getattr(drrho_reference, name) for name in (*names, *SETS)}
    report = check(part, dtypes=["float64"])
    assert report.passed, report.table()
    assert not report.complete
    report = check({"pair_loss": drrho_reference.pair_loss}, dtypes=["float64"])
    beyond = {case.name for case in report.cases if {field.verdict for field in case.fields} == {"error"}}
    assert beyond == {f"inverse temperature 1e{power}" for power in (4, 5, 6, 8, 10)}  # beyond the linear domain
    assert verdicts(report, case="inverse temperature 1e2") == {"value": {"passed"}}


@pytest.mark.parametrize("function", ["contrastive_step", "unimodal_contrastive_step", "info_nce"])
def test_an_implementation_without_weights_per_anchor_is_told_so(function: str) -> None:
    current = inspect.signature(getattr(drrho_reference, function))

    def older(*arrays: Any, **given: Any) -> Any:
        return {}

    parameters = [parameter for name, parameter in current.parameters.items() if name != "anchor_weight"]
    parameters.append(inspect.Parameter("tile_size", inspect.Parameter.KEYWORD_ONLY, default=None))
    older.__signature__ = current.replace(parameters=parameters)  # type: ignore[attr-defined]
    report = check({function: older}, dtypes=["float64"])
    asked = {
        case.name
        for case in report.cases
        if "anchor_weight" in case.name or case.name.startswith(("one_anchor", "sums of weights"))
    }
    assert len(asked) >= 5
    for case in report.cases:
        supported = {field.verdict != "not supported" for field in case.fields}
        assert supported == {case.name not in asked}, case.name
    assert f"not supported: {function}: no option anchor_weight" in report.table()
    assert not report.passed


RECIPE = Path(__file__).parents[2] / "reference_impl" / "recipes" / "extremes.py"


def test_the_stored_numbers_are_those_of_their_recipe() -> None:
    recipe = runpy.run_path(str(RECIPE))
    assert json.loads(recipe["FILE"].read_text(encoding="utf-8")) == json.loads(recipe["build"]())


def test_the_recipe_agrees_with_the_oracle_where_both_reach() -> None:
    recipe = runpy.run_path(str(RECIPE))
    rng = np.random.default_rng(3)
    image, text = recipe["features"](rng)
    states = np.where(rng.uniform(size=(2, 5)) < 0.3, -np.inf, rng.normal(size=(2, 5)))
    options = {"temperature": 0.25, "gamma": 0.375, "eps": 0.125, "radius": 0.5}
    for mine, oracle in (
        ("step", drrho_reference.contrastive_step),
        ("unimodal", drrho_reference.unimodal_contrastive_step),
    ):
        answer = recipe[mine](image, text, states, options)["expected"]
        for name, wanted in oracle(image, text, *states, **options)._asdict().items():
            np.testing.assert_allclose(answer[name], wanted, rtol=1e-13, atol=1e-14)
    losses = rng.normal(size=9)
    for name, (solve, parameters) in recipe["SETS"].items():
        other = dict.fromkeys(parameters, 0.5) if name.endswith("Penalty") else parameters
        with mpmath.workdps(recipe["DIGITS"]):
            exact = {key: mpmath.mpf(value) for key, value in other.items()}
            risk, weights, nu, s = solve([mpmath.mpf(value) for value in losses.tolist()], **exact)
        wanted = drrho_reference.worst_case(losses, getattr(drrho_reference, name)(**other))
        for got, there in ((risk, wanted.risk), (nu, wanted.dual[0]), (s, wanted.dual[1])):
            assert float(got) == pytest.approx(float(there), rel=1e-11, abs=1e-15)
        np.testing.assert_allclose([float(weight) for weight in weights], wanted.weights, atol=1e-12)
