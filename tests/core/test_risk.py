"""Excess losses and the DRRho risk: against the oracle, what a reference model changes, every bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as torch_namespace
import array_api_strict as strict
import drrho_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from drrho_core.ambiguity import CappedKLPenalty, ChiSquareBall, CVaR, KLPenalty, worst_case
from drrho_core.risk import drrho_risk, excess_loss

jax.config.update("jax_enable_x64", True)

SETS = [CVaR(0.4), KLPenalty(0.7), ChiSquareBall(0.4), CappedKLPenalty(0.7, 0.4)]


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    where = rng.random((3, 5)) < 0.7
    where[:, 1] = True
    return rng.exponential(size=(3, 5)), rng.exponential(size=(3, 5)), where


def theirs(ambiguity_set: Any) -> Any:
    return getattr(drrho_reference, type(ambiguity_set).__name__)(*vars(ambiguity_set).values())


def test_excess_loss_is_signed(space: Any) -> None:
    loss, reference, _ = problem()
    for weight in (1.0, 0.0, 1.75, 2):
        got = space.to_numpy(
            space.run(excess_loss, space.asarray(loss), space.asarray(reference), reference_weight=weight)
        )
        expected = space.rounded(loss) - weight * space.rounded(reference)
        np.testing.assert_allclose(got, expected, rtol=0, atol=space.unit)
        assert got.dtype == space.dtype_name
    assert (expected < 0).any()


def test_excess_loss_has_any_shape() -> None:
    assert excess_loss(np.asarray(2.0), np.asarray(0.5)).shape == ()
    assert excess_loss(np.zeros((2, 0, 3)), np.zeros((2, 0, 3))).shape == (2, 0, 3)


@pytest.mark.parametrize("ambiguity_set", SETS, ids=str)
def test_every_library_agrees_with_the_oracle(space: Any, ambiguity_set: Any) -> None:
    loss, reference, where = problem()
    tolerance = 1e-10 if space.dtype_name == "float64" else 1e-5
    got = space.run(
        lambda a, b, c: drrho_risk(a, b, ambiguity_set, reference_weight=0.5, axis=0, where=c),
        *(space.asarray(a) for a in (loss, reference, where)),
    )
    expected = drrho_reference.drrho_risk(
        space.rounded(loss), space.rounded(reference), theirs(ambiguity_set), reference_weight=0.5, axis=0, where=where
    )
    np.testing.assert_allclose(space.to_numpy(got.risk), expected.risk, rtol=0, atol=4 * tolerance)
    np.testing.assert_allclose(space.to_numpy(got.weights), expected.weights, rtol=0, atol=tolerance)
    assert got.risk.dtype == got.weights.dtype == got.dual[0].dtype == got.dual[1].dtype == space.dtype


@pytest.mark.parametrize("ambiguity_set", SETS, ids=str)
def test_it_is_the_worst_case_of_the_excess_loss(eager_space: Any, ambiguity_set: Any) -> None:
    loss, reference = (eager_space.asarray(a) for a in problem()[:2])
    got = drrho_risk(loss, reference, ambiguity_set)
    expected = worst_case(excess_loss(loss, reference), ambiguity_set)
    for a, b in zip((got.risk, got.weights, *got.dual), (expected.risk, expected.weights, *expected.dual), strict=True):
        np.testing.assert_array_equal(eager_space.to_numpy(a), eager_space.to_numpy(b))


@pytest.mark.parametrize("ambiguity_set", SETS, ids=str)
def test_a_constant_in_the_reference_changes_no_weight(eager_space: Any, ambiguity_set: Any) -> None:
    rng = np.random.default_rng(6)
    loss, reference = (rng.integers(0, 64, size=(4, 5)) / 16 for _ in range(2))  # so that shifting rounds nothing
    plain = drrho_risk(eager_space.asarray(loss), eager_space.asarray(reference), ambiguity_set)
    shifted = drrho_risk(eager_space.asarray(loss), eager_space.asarray(reference + 3.0), ambiguity_set)
    np.testing.assert_array_equal(eager_space.to_numpy(shifted.weights), eager_space.to_numpy(plain.weights))
    risk = eager_space.to_numpy(plain.risk)
    np.testing.assert_allclose(eager_space.to_numpy(shifted.risk), risk - 3, rtol=0, atol=10 * eager_space.unit)


def test_a_weight_of_0_is_plain_distributionally_robust_optimisation() -> None:
    loss, reference, _ = problem()
    got, expected = drrho_risk(loss, reference, CVaR(0.3), reference_weight=0), worst_case(loss, CVaR(0.3))
    np.testing.assert_array_equal(got.weights, expected.weights)


def test_samples_that_are_poor_for_both_models_are_left_alone() -> None:
    # A mislabelled sample has the largest loss, but the reference model is no better on it.
    loss, reference = np.asarray([9.0, 1.0, 0.5]), np.asarray([8.9, 0.2, 0.5])
    assert worst_case(loss, CVaR(0.3)).weights.tolist() == [1, 0, 0]
    assert drrho_risk(loss, reference, CVaR(0.3)).weights.tolist() == [0, 1, 0]


def test_what_does_not_count_is_not_read() -> None:
    loss, reference, where = problem()
    expected = drrho_risk(loss, reference, KLPenalty(0.5), where=where)
    loss, reference = loss.copy(), reference.copy()
    loss[~where], reference[~where] = np.inf, np.inf
    got = drrho_risk(loss, reference, KLPenalty(0.5), where=where)
    np.testing.assert_array_equal(got.weights, expected.weights)
    np.testing.assert_array_equal(got.risk, expected.risk)
    assert (got.weights[~where] == 0).all()


def test_nothing_is_written_to() -> None:
    loss, reference, where = problem()
    for array in (loss, reference, where):
        array.flags.writeable = False
    drrho_risk(loss, reference, CVaR(0.5), where=where)
    excess_loss(loss, reference)


def test_the_weight_of_the_reference_may_be_an_array_without_axes(space: Any) -> None:
    loss, reference = (space.asarray(a) for a in problem()[:2])

    def both(a: Any, b: Any, weight: Any) -> Any:
        return excess_loss(a, b, reference_weight=weight), drrho_risk(a, b, CVaR(0.5), reference_weight=weight).risk

    excess, risk = space.run(both, loss, reference, space.asarray(np.asarray(0.25)))
    np.testing.assert_array_equal(
        space.to_numpy(excess), space.to_numpy(space.run(excess_loss, loss, reference, reference_weight=0.25))
    )
    assert excess.dtype == risk.dtype == space.dtype


def test_half_types_are_subtracted_in_float32() -> None:
    # In float16 0.1 times the reference would be rounded before the difference.
    loss, reference = (np.asarray(a, dtype=np.float16) for a in ([10.0, 7.0], [99.0, 61.0]))
    expected = np.asarray([10 - 0.1 * 99, 7 - 0.1 * 61], dtype=np.float16)
    got = excess_loss(loss, reference, reference_weight=0.1)
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, expected)
    risk = drrho_risk(loss, reference, KLPenalty(1.0), reference_weight=0.1).risk
    assert risk.dtype == np.float16
    exact = math.log((math.exp(10 - 0.1 * 99) + math.exp(7 - 0.1 * 61)) / 2)
    np.testing.assert_allclose(float(risk), exact, rtol=2.0**-11)


def test_torch_compiles_it_as_one_graph() -> None:
    loss, reference, where = (torch.asarray(a) for a in problem())

    def both(a: Any, b: Any, c: Any) -> Any:
        risk = drrho_risk(a, b, CVaR(0.5), reference_weight=0.5, where=c, xp=torch_namespace)
        return excess_loss(a, b, xp=torch_namespace), risk.risk

    torch._dynamo.reset()
    got = torch.compile(both, backend="aot_eager", fullgraph=True)(loss, reference, where)
    torch.testing.assert_close(got[0], loss - reference)
    torch.testing.assert_close(got[1], drrho_risk(loss, reference, CVaR(0.5), reference_weight=0.5, where=where).risk)


def test_under_jit_a_bad_loss_is_nan_and_no_other() -> None:
    loss, reference, _ = (jnp.asarray(a) for a in problem())
    bad = loss.at[0, 2].set(jnp.nan), reference.at[1, 0].set(jnp.inf)
    risk = jax.jit(lambda a, b: drrho_risk(a, b, CVaR(0.5)).risk)(*bad)
    assert jnp.isnan(risk).tolist() == [True, True, False]
    assert float(risk[2]) == pytest.approx(float(drrho_risk(loss, reference, CVaR(0.5)).risk[2]))


A = np.asarray([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
NAN = np.where(A == 2, np.nan, A)


@pytest.mark.parametrize("function", [excess_loss, lambda a, b, **o: drrho_risk(a, b, CVaR(0.5), **o)])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0], A), TypeError, "^loss must be an array, got list$"),
        (lambda f: f(A, 1.0), TypeError, "^reference_loss must be an array, got float$"),
        (
            lambda f: f(A, torch.asarray(A)),
            TypeError,
            r"^reference_loss must come from the library of loss \(numpy\), got an array of torch$",
        ),
        (lambda f: f(A > 1, A), TypeError, "^loss must have a real floating dtype, got bool$"),
        (lambda f: f(A, A.astype(int)), TypeError, "^reference_loss must have a real floating dtype, got int64$"),
        (
            lambda f: f(A, A.astype(np.float32)),
            TypeError,
            r"^reference_loss must have the dtype of loss \(float64\), got float32$",
        ),
        (
            lambda f: f(A, A[0]),
            ValueError,
            r"^reference_loss must have shape loss.shape = \(2, 3\), got \(3,\)$",
        ),
        (
            lambda f: f(A, A[:, :1]),
            ValueError,
            r"^reference_loss must have shape loss.shape = \(2, 3\), got \(2, 1\)$",
        ),
        (
            lambda f: f(strict.asarray(A), strict.asarray(A, device=strict.Device("device1"))),
            ValueError,
            "^reference_loss must be on the device of loss .*, got .*device1",
        ),
        (lambda f: f(NAN, A), ValueError, r"^loss must be finite, got nan at position \(0, 1\)$"),
        (lambda f: f(A, NAN), ValueError, r"^reference_loss must be finite, got nan at position \(0, 1\)$"),
        (
            lambda f: f(torch.asarray(A).requires_grad_(), torch.asarray(A)),
            ValueError,
            "^loss must not require gradients",
        ),
        (
            lambda f: f(torch.asarray(A), torch.asarray(A).requires_grad_()),
            ValueError,
            "^reference_loss must not require gradients",
        ),
        (lambda f: f(A, A, reference_weight=-1), ValueError, "^reference_weight must be >= 0, got -1$"),
        (lambda f: f(A, A, reference_weight=math.inf), ValueError, "^reference_weight must be finite, got inf$"),
        (lambda f: f(A, A, reference_weight=True), TypeError, "^reference_weight must be a real number, got True$"),
        (lambda f: f(A, A, reference_weight=A), ValueError, "^reference_weight must be a scalar, got ndarray of shape"),
        (
            lambda f: f(A, A, reference_weight=np.asarray(-0.5)),
            ValueError,
            "^reference_weight must be >= 0, got -0.5$",
        ),
        (
            lambda f: f(torch.asarray(A), torch.asarray(A), reference_weight=torch.tensor(0.5, requires_grad=True)),
            ValueError,
            "^reference_weight must not require gradients",
        ),
        (
            lambda f: f(
                strict.asarray(A),
                strict.asarray(A),
                reference_weight=strict.asarray(0.5, device=strict.Device("device1")),
            ),
            ValueError,
            "^reference_weight must be on the device of loss .*, got .*device1",
        ),
        (
            lambda f: f(jnp.asarray(A), jnp.asarray(A), reference_weight=torch.tensor(0.5)),
            TypeError,
            "^reference_weight must come from the library of loss .*, got an array of torch$",
        ),
    ],
)
def test_bad_input_is_one_clear_error(
    function: Callable[..., Any], call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(function)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: drrho_risk(A, A, 0.5), TypeError, "^ambiguity_set must be an ambiguity set"),
        (
            lambda: drrho_risk(A, A, CVaR(0.5), axis=2),
            ValueError,
            r"^axis must be an axis of loss, which has shape \(2, 3\), got 2$",
        ),
        (
            lambda: drrho_risk(A[:0], A[:0], CVaR(0.5), axis=0),
            ValueError,
            r"^loss must have at least one entry along axis 0, got shape \(0, 3\)$",
        ),
        (lambda: drrho_risk(A, A, CVaR(0.5), where=A), TypeError, "^where must have dtype bool, got float64$"),
        (
            lambda: drrho_risk(A, A, CVaR(0.5), where=np.zeros(3, dtype=bool)),
            ValueError,
            "^where must mark at least one entry of every slice along axis -1, got 2 of 2 slices without any$",
        ),
        (
            lambda: drrho_risk(A * 1e307, -A * 1e307, CVaR(0.5)),
            ValueError,
            r"^loss - reference_weight \* reference_loss must be finite and at most .* in size, got 2e\+307 at",
        ),
    ],
)
def test_bad_input_of_the_risk(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("as_array", [False, True])
def test_a_difference_is_right_where_the_product_is_too_large(eager_space: Any, as_array: bool) -> None:
    largest = float(np.finfo(eager_space.dtype_name).max)
    loss, reference = (
        eager_space.asarray([0.9 * largest, -0.9 * largest, 0.0]),
        eager_space.asarray([0.6 * largest, -0.6 * largest, 0.25 * largest]),
    )
    weight = eager_space.asarray(np.asarray(2.0)) if as_array else 2.0
    got = eager_space.to_numpy(excess_loss(loss, reference, reference_weight=weight))
    np.testing.assert_allclose(got / largest, [-0.3, 0.3, -0.5], rtol=1e-6)
