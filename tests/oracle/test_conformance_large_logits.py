"""The kit's problems with large logits: a sound float32 step passes them, and each known fault fails."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import drrho_reference
import mpmath as mp
import numpy as np
import pytest
from drrho_reference import conformance
from drrho_reference.cases.problem import Arguments, Problem
from drrho_reference.conformance import Report, check
from drrho_reference.questions import answered, ordered_problems

LARGE = [problem for problem in ordered_problems() if problem.answer is not None and problem.story is None]
SUMS = [problem for problem in ordered_problems() if problem.story is not None]
IDS = [f"{problem.function}-{problem.name}" for problem in LARGE]


def product(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return rows @ columns.T with sums in a fixed order, so that no processor rounds them in a way of its own."""
    total = np.zeros((len(rows), len(columns)), rows.dtype)
    for x, y in zip(rows.T, columns.T, strict=True):
        total = total + x[:, None] * y
    return total


def step_in_its_own_dtype(weigh: Callable[..., np.ndarray]) -> Any:
    """A contrastive step in the dtype of its inputs; `weigh` makes the weights of all anchors of one side."""

    def contrastive_step(
        image: Any,
        text: Any,
        log_inner_image: Any,
        log_inner_text: Any,
        /,
        *,
        temperature: Any,
        gamma: float = 1.0,
        reference_features: Any = None,
        reference_weight: float = 1.0,
        anchor_weight: Any = None,
        tile_size: Any = None,
    ) -> dict[str, Any]:
        dtype, b = image.dtype.type, len(image)
        Z = product(image, text)
        if reference_features is not None:
            Z = Z - dtype(reference_weight) * product(*reference_features)
        temperatures, factors = (
            [
                np.broadcast_to(np.asarray(side, dtype=dtype), b)
                for side in (one if isinstance(one, tuple) else (one,) * 2)
            ]
            for one in (temperature, 1.0 if anchor_weight is None else anchor_weight)
        )
        slopes, states, loss, surrogate, temperature_slopes = np.zeros((b, b), dtype), [], dtype(0), dtype(0), []
        for side, (table, old) in enumerate([(Z, log_inner_image), (Z.T, log_inner_text)]):
            t, factor = temperatures[side], factors[side]
            scores = np.where(np.eye(b, dtype=bool), -np.inf, table)
            peak = scores.max(axis=1)
            d = (scores - peak[:, None]) / t[:, None]
            base = (peak - np.diagonal(table)) / t
            log_g = base + np.log(np.exp(d).sum(axis=1) / dtype(b - 1))
            log_u = log_g
            if gamma < 1.0:
                log_u = np.logaddexp(dtype(np.log1p(-gamma)) + old, dtype(np.log(gamma)) + log_g)
            w = weigh(scores, np.diagonal(table), t, log_g, log_u, dtype(gamma)).astype(dtype)
            totals = w.sum(axis=1)
            pulls = (w * np.where(np.isfinite(d), d, 0)).sum(axis=1) + base * totals
            states.append(log_u)
            loss = loss + (factor * t * log_u).sum()
            surrogate = surrogate + (factor * t * (log_u + totals)).sum()
            temperature_slopes.append(factor * (log_u - pulls) / dtype(2 * b))
            rows = factor[:, None] * (w - np.diag(totals))
            slopes = slopes + (rows if side == 0 else rows.T)
        return {
            "loss": loss / dtype(2 * b),
            "surrogate": surrogate / dtype(2 * b),
            "image_gradient": slopes @ text / dtype(2 * b),
            "text_gradient": slopes.T @ image / dtype(2 * b),
            "temperature_gradient": (
                tuple(temperature_slopes) if isinstance(temperature, tuple) else sum(map(np.sum, temperature_slopes))
            ),
            "log_inner_image": states[0],
            "log_inner_text": states[1],
        }

    return contrastive_step


def normalised(scores: Any, positive: Any, t: Any, log_g: Any, log_u: Any, gamma: Any) -> np.ndarray:
    """The softmax times g / u, which is at most 1 / gamma."""
    exponentials = np.exp((scores - scores.max(axis=1, keepdims=True)) / t[:, None])
    totals = np.minimum(np.exp(log_g - log_u), 1 / gamma)
    return exponentials / exponentials.sum(axis=1, keepdims=True) * totals[:, None]


def thresholded(scores: Any, positive: Any, t: Any, log_g: Any, log_u: Any, gamma: Any) -> np.ndarray:
    """exp(D - log u) with a threshold of the size 1/t, which is rounded before the exponential."""
    threshold = log_u + np.log(scores.dtype.type(len(scores) - 1))
    with np.errstate(over="ignore"):
        return np.exp((scores - positive[:, None]) / t[:, None] - threshold[:, None])


def large_cases(report: Report) -> list[conformance.Case]:
    names = {problem.name for problem in [*LARGE, *SUMS]}
    # The step above has neither eps nor a mask nor gammas per anchor; other cases are not supported.
    return [case for case in report.cases if case.name in names and "floor" not in case.name]


def verdicts(cases: list[conformance.Case], dtype: str, start: str) -> dict[str, set[str]]:
    """The verdicts of each case whose name starts so."""
    return {
        case.name: {field.verdict for field in case.fields}
        for case in cases
        if case.dtype == dtype and case.name.startswith(start)
    }


def test_a_step_with_normalised_weights_passes() -> None:
    report = check({"contrastive_step": step_in_its_own_dtype(normalised)})
    large = large_cases(report)
    assert len(large) == 2 * (12 + 8)
    assert {field.verdict for case in large for field in case.fields} == {"passed"}, report.table()


def test_a_rounded_threshold_fails_in_gradients_and_in_sums_of_weights() -> None:
    with np.errstate(all="ignore"):
        cases = large_cases(check({"contrastive_step": step_in_its_own_dtype(thresholded)}))
    gradients = verdicts(cases, "float32", "inverse temperature")
    assert "failed" not in gradients["inverse temperature 1e0"]
    for name in ("1e4", "1e5", "1e6", "1e5 and anchor_weight", "1e5 in tiles"):
        assert "failed" in gradients[f"inverse temperature {name}"], name
    for name in ("unnormalised", "reference_weight 64", "temperatures from 1e-6"):
        assert "failed" in verdicts(cases, "float32", name)[name]
    for name in ("inverse temperature 1e2", "inverse temperature 1e5", "reference_weight 64", "temperatures from 1e-6"):
        (case,) = [case for case in cases if (case.name, case.dtype) == (name, "float32")]
        assert "failed" in {field.verdict for field in case.fields if field.name == "image_gradient"}, name
    sums = verdicts(cases, "float32", "sums of weights")
    # At 1e4 the last bit of a product decides whether a sum is too large.
    for name in ("inverse temperature 1e6, gamma 1.0", "unnormalised"):
        assert "failed" in sums[f"sums of weights: {name}"], name
    assert "failed" not in sums["sums of weights: inverse temperature 1e2, gamma 0.25"]
    sums = verdicts(cases, "float64", "sums of weights")
    assert "failed" in sums["sums of weights: inverse temperature 1e10, gamma 0.25"]


def altered(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> list[conformance.Case]:
    sound = step_in_its_own_dtype(normalised)

    def contrastive_step(*arrays: Any, **given: Any) -> Any:
        answer = sound(*arrays, **given)
        change(answer, given)
        return answer

    with np.errstate(all="ignore"):
        return large_cases(check({"contrastive_step": contrastive_step}))


def one_sum_in_ten_thousand(answer: dict[str, Any], given: dict[str, Any]) -> None:
    """Weights that are too large by 1e-4, for one of the anchors only."""
    weight = given.get("anchor_weight")
    if weight is not None and weight[1][3] == 1.0:
        answer["image_gradient"] = answer["image_gradient"] * (1 + 1e-4)


def test_the_sum_of_a_single_anchor_is_read() -> None:
    cases = altered(one_sum_in_ten_thousand)
    for case in cases:
        # At 1e10 float32 loses log gamma beside log g, so there the sum is 1 instead of 4.
        if case.name.startswith("sums of weights: inverse temperature") and "1e10, gamma 0.25" not in case.name:
            wrong = {field.name: field.at for field in case.fields if field.verdict == "failed"}
            assert wrong == {"weight_sum_text": (3,)}, case.name


def surrogate_of_all(answer: dict[str, Any], given: dict[str, Any]) -> None:
    """A surrogate that has two sums of weights."""
    answer["surrogate"] = 2 * answer["surrogate"] - answer["loss"]


def test_the_surrogate_shows_the_sum_where_it_can() -> None:
    cases = altered(surrogate_of_all)
    for dtype in ("float32", "float64"):
        name = "sums of weights: inverse temperature 1e2, gamma 0.25"
        (case,) = [case for case in cases if case.name == name and case.dtype == dtype]
        wrong = {field.name for field in case.fields if field.verdict == "failed"}
        assert wrong == {"surrogate_sum_image", "surrogate_sum_text"}


def smaller(answer: dict[str, Any], given: dict[str, Any]) -> None:
    answer["text_gradient"], answer["image_gradient"] = answer["text_gradient"] * 0.5, answer["image_gradient"] * 0.5
    answer["surrogate"] = (answer["surrogate"] + answer["loss"]) / 2


def test_a_sum_below_its_limit_is_no_fault_of_the_sum() -> None:
    cases = altered(smaller)
    for found in verdicts(cases, "float32", "sums of weights: inverse").values():
        assert found == {"passed"}
    for found in verdicts(cases, "float32", "inverse temperature").values():
        assert "failed" in found


def not_a_number(answer: dict[str, Any], given: dict[str, Any]) -> None:
    for name in ("image_gradient", "text_gradient"):
        answer[name] = np.where(np.arange(len(answer[name]))[:, None] == 2, np.nan, answer[name])


def test_nan_is_never_within_a_limit() -> None:
    for case in altered(not_a_number):
        failed = {field.name for field in case.fields if field.verdict == "failed"}
        assert failed & {"image_gradient", "weight_sum_image"}, case.name


@pytest.mark.parametrize("problem", LARGE, ids=IDS)
def test_similarities_are_exact_in_float64(problem: Problem) -> None:
    arguments = answered(problem, "float32").arguments
    first, second = arguments.positional[:2]
    options = arguments.options

    def products(left: Any, right: Any) -> list[list[Fraction]]:
        return [[sum(Fraction(a) * Fraction(c) for a, c in zip(x, y, strict=True)) for y in right] for x in left]  # type: ignore[misc]

    rows = slice(0, 24, 5)
    Z = products(first[rows].tolist(), second[rows].tolist())
    table = first[rows] @ second[rows].T
    if "reference_features" in options:
        weight = options["reference_weight"]
        R = products(*(side[rows].tolist() for side in options["reference_features"]))
        Z = [[z - Fraction(weight) * r for z, r in zip(*both, strict=True)] for both in zip(Z, R, strict=True)]
        table = table - weight * (options["reference_features"][0][rows] @ options["reference_features"][1][rows].T)
    assert [[Fraction(value) for value in row] for row in table.tolist()] == Z


ORDINARY = [problem for problem in LARGE if problem.name in ("inverse temperature 1e0", "inverse temperature 1e2")]


@pytest.mark.parametrize("problem", ORDINARY, ids=lambda problem: f"{problem.function}-{problem.name}")
def test_exact_answers_are_those_of_the_oracle_where_both_reach(problem: Problem) -> None:
    question = answered(problem, "float64")
    function = getattr(drrho_reference, problem.function)
    answer = function(*question.arguments.positional, **question.arguments.options)
    fields = {"value": answer} if problem.function == "pair_loss" else answer._asdict()
    assert set(question.expected) == set(fields)
    for name, value in fields.items():
        error = np.abs(np.asarray(value) - question.expected[name]) / question.scales[name]
        assert np.max(error) <= 1e-12, name


@pytest.mark.parametrize("function", ["contrastive_step", "unimodal_contrastive_step", "info_nce"])
def test_weighted_answers_are_those_of_the_oracle(function: str) -> None:
    (problem,) = [one for one in LARGE if one.function == function and one.name.endswith("anchor_weight")]
    question = answered(problem, "float64")
    assert problem.answer is not None
    warm = Arguments(question.arguments.positional, question.arguments.options | {"temperature": 0.02}, {})
    exact, answer = (
        problem.answer(warm, "float64"),
        getattr(drrho_reference, function)(*warm.positional, **warm.options),
    )
    for name, value in answer._asdict().items():
        error = np.abs(np.asarray(value) - exact.expected[name]) / exact.scales[name]
        assert np.max(error) <= 1e-12, name


def test_an_answer_at_1e10_agrees_with_mpmath() -> None:
    (problem,) = [one for one in LARGE if (one.function, one.name) == ("contrastive_step", "inverse temperature 1e10")]
    question = answered(problem, "float64")
    image, text = question.arguments.positional[:2]
    with mp.workdps(60):
        Z = mp.matrix(image.tolist()) * mp.matrix(text.tolist()).T
        t, b = mp.mpf(question.arguments.options["temperature"]), len(image)
        for i in (0, 7, 23):
            D = {j: (Z[i, j] - Z[i, i]) / t for j in range(b) if j != i}
            log_g = mp.log(mp.fsum(mp.exp(value) for value in D.values()) / (b - 1))
            assert float(log_g) == pytest.approx(float(question.expected["log_inner_image"][i]), rel=1e-15)


def test_the_bar_is_that_of_the_dtype() -> None:
    for problem in LARGE:
        if problem.function != "pair_loss":
            bounds = [answered(problem, dtype).bounds for dtype in ("float32", "float64")]
            for name in [name for name in bounds[0] or {} if name.endswith("_gradient") and "temperature" not in name]:
                single, double = ((one or {})[name] for one in bounds)
                assert 1e-6 <= single <= 0.1
                assert 1e-12 <= double <= 1e-5
