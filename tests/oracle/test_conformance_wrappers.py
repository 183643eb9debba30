"""The kit checks what a wrapper's autograd makes of an upstream gradient that differs from slice to slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drrho_reference import drrho_risk_vjp
from drrho_reference.conformance import Report, check

import drrho_core

NAMES = ("CVaR", "KLPenalty", "KLBall", "ChiSquarePenalty", "ChiSquareBall", "CressieReadBall", "CappedKLPenalty")
SETS = {name: getattr(drrho_core, name) for name in NAMES if hasattr(drrho_core, name)}


def torch_vjp(loss: Any, reference_loss: Any, ambiguity_set: Any, upstream: Any, /, **options: Any) -> Any:
    torch, drrho_torch = pytest.importorskip("torch"), pytest.importorskip("drrho_torch")
    loss = loss.requires_grad_()
    risk = drrho_torch.drrho_risk(loss, reference_loss, ambiguity_set, **options)
    return torch.autograd.grad(risk, loss, upstream)[0]


def jax_vjp(loss: Any, reference_loss: Any, ambiguity_set: Any, upstream: Any, /, **options: Any) -> Any:
    jax, drrho_jax = pytest.importorskip("jax"), pytest.importorskip("drrho_jax")
    _, pull = jax.vjp(lambda x: drrho_jax.drrho_risk(x, reference_loss, ambiguity_set, **options), loss)
    return pull(upstream)[0]


def assert_all_sets_passed(report: Report) -> None:
    assert {case.name.partition(":")[0] for case in report.cases} == {*NAMES, "weights_per_token"}
    assert report.passed, report.table()


def test_the_torch_wrapper_passes() -> None:
    torch = pytest.importorskip("torch")
    assert_all_sets_passed(check({"drrho_risk_vjp": torch_vjp, **SETS}, xp=torch))


def test_the_jax_wrapper_passes() -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        assert_all_sets_passed(check({"drrho_risk_vjp": jax_vjp, **SETS}, xp=jax.numpy))


def planted(change: Callable[[Any, Any], Any]) -> Report:
    def vjp(loss: Any, reference_loss: Any, ambiguity_set: Any, upstream: Any, /, **options: Any) -> Any:
        axis = options.get("axis", -1)
        ones = np.ones_like(upstream)
        weights = drrho_risk_vjp(loss, reference_loss, ambiguity_set, ones, **options)
        return change(np.expand_dims(upstream, axis), np.moveaxis(weights, axis, axis))

    return check({"drrho_risk_vjp": vjp}, dtypes=["float64"])


@pytest.mark.parametrize(
    "mistake",
    [
        lambda upstream, weights: weights,  # the upstream gradient is forgotten
        lambda upstream, weights: np.sum(upstream) * weights,  # one gradient for all slices
        lambda upstream, weights: np.mean(upstream) * weights,
        lambda upstream, weights: np.abs(upstream) * weights,
    ],
)
def test_an_upstream_gradient_that_is_not_per_slice_fails(mistake: Callable[[Any, Any], Any]) -> None:
    assert planted(lambda upstream, weights: upstream * weights).passed
    report = planted(mistake)
    assert report.verdict == "failed"
    masked = [case for case in report.cases if case.name.startswith("KLPenalty: mask")]
    assert "failed" in {field.verdict for case in masked for field in case.fields}


def test_without_the_function_it_is_not_given_and_does_not_pass() -> None:
    report = check({"drrho_risk": drrho_core.drrho_risk, **SETS}, dtypes=["float64"])
    assert "drrho_risk_vjp" in report.not_given
    assert not any(case.function == "drrho_risk_vjp" for case in report.cases)
    assert "drrho_risk_vjp" in report.table().splitlines()[-1]
    assert not report.complete  # others are missing as well
