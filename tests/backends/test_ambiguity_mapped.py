"""Ambiguity sets under `vmap`, with and without a compiler, and the wrappers' gradients, for each of the seven sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import drrho_jax  # noqa: E402
import drrho_torch  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from drrho_core import (  # noqa: E402
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    WorstCase,
    worst_case,
)
from drrho_core.ambiguity import slices  # noqa: E402

jax.config.update("jax_enable_x64", True)

SETS = [
    *(CVaR(0.35), KLPenalty(0.7), CappedKLPenalty(0.7, 0.4), KLBall(0.2), ChiSquarePenalty(0.5), ChiSquareBall(0.3)),
    CressieReadBall(3.0, 0.2),
]
every_set = pytest.mark.parametrize("ambiguity_set", SETS, ids=lambda s: type(s).__name__)


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses, reference losses and what counts, (3, 6); a row has ties."""
    rng = np.random.default_rng(8)
    loss, reference_loss = rng.normal(size=(2, 3, 6))
    loss[1], reference_loss[1] = np.round(loss[1]), 0.0
    where = rng.random((3, 6)) < 0.7
    where[:, 2] = True
    return loss, reference_loss, where


def assert_same(got: WorstCase, expected: WorstCase) -> None:
    for actual, wished in zip(
        (got.risk, got.weights, *got.dual), (expected.risk, expected.weights, *expected.dual), strict=True
    ):
        np.testing.assert_allclose(np.asarray(actual), wished, rtol=0, atol=1e-12)


@every_set
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_jax_maps_over_losses_and_masks(ambiguity_set: Any, jit: bool) -> None:
    loss, _, where = problem()
    mapped: Callable[..., WorstCase] = jax.vmap(lambda x, mask: worst_case(x, ambiguity_set, where=mask))
    got = (jax.jit(mapped) if jit else mapped)(jnp.asarray(loss), jnp.asarray(where))
    assert_same(got, worst_case(loss, ambiguity_set, where=where))


@every_set
def test_jax_maps_over_masks_of_losses_that_are_not_mapped(ambiguity_set: Any) -> None:
    loss, _, where = problem()
    got = jax.vmap(lambda mask: worst_case(jnp.asarray(loss[0]), ambiguity_set, where=mask))(jnp.asarray(where))
    assert_same(got, worst_case(np.broadcast_to(loss[0], where.shape), ambiguity_set, where=where))


@every_set
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_jax_maps_over_the_gradient_of_a_risk(ambiguity_set: Any, jit: bool) -> None:
    loss, reference_loss, _ = problem()
    mapped: Callable[..., Any] = jax.vmap(jax.grad(lambda x, r: drrho_jax.drrho_risk(x, r, ambiguity_set)))
    got = (jax.jit(mapped) if jit else mapped)(jnp.asarray(loss), jnp.asarray(reference_loss))
    np.testing.assert_allclose(got, worst_case(loss - reference_loss, ambiguity_set).weights, rtol=0, atol=1e-12)


@every_set
def test_torch_maps_over_losses_and_masks(ambiguity_set: Any) -> None:
    loss, _, where = problem()
    got = torch.vmap(lambda x, mask: worst_case(x, ambiguity_set, where=mask))(torch.tensor(loss), torch.tensor(where))
    assert_same(got, worst_case(loss, ambiguity_set, where=where))


@every_set
def test_losses_in_pieces_are_mapped_over(ambiguity_set: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # If values are visible, many losses are cut into pieces, and more conditions are read.
    monkeypatch.setattr(slices, "piece_length", lambda: 64)
    rng = np.random.default_rng(9)
    loss, where = rng.normal(size=200), rng.random((2, 200)) < 0.7
    expected = worst_case(np.broadcast_to(loss, where.shape), ambiguity_set, where=where)
    for got in (
        torch.vmap(lambda mask: worst_case(torch.tensor(loss), ambiguity_set, where=mask))(torch.tensor(where)),
        jax.vmap(lambda mask: worst_case(jnp.asarray(loss), ambiguity_set, where=mask))(jnp.asarray(where)),
    ):
        assert_same(got, expected)


@every_set
def test_the_gradient_of_a_risk_is_its_weights(ambiguity_set: Any) -> None:
    loss, reference_loss, where = problem()
    expected = worst_case(loss - reference_loss, ambiguity_set, where=where)
    x = torch.tensor(loss, requires_grad=True)
    risk = drrho_torch.drrho_risk(x, torch.tensor(reference_loss), ambiguity_set, where=torch.tensor(where))
    risk.sum().backward()
    np.testing.assert_allclose(risk.detach(), expected.risk, rtol=0, atol=1e-12)
    np.testing.assert_allclose(x.grad, expected.weights, rtol=0, atol=1e-12)
    risk, gradient = jax.value_and_grad(
        lambda x: jnp.sum(drrho_jax.drrho_risk(x, jnp.asarray(reference_loss), ambiguity_set, where=jnp.asarray(where)))
    )(jnp.asarray(loss))
    np.testing.assert_allclose(risk, expected.risk.sum(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient, expected.weights, rtol=0, atol=1e-12)


@every_set
def test_mapped_losses_are_not_read_on_the_host(ambiguity_set: Any) -> None:
    # A check that reads values raises an error; under vmap the same losses must give nan, and only in their own slice.
    loss = np.asarray([[1.0, 2.0, 4.0], [np.nan, 2.0, 4.0]])
    with pytest.raises(ValueError, match=r"^losses must be finite and at most"):
        worst_case(jnp.asarray(loss), ambiguity_set)
    for risk in (
        jax.vmap(lambda x: worst_case(x, ambiguity_set).risk)(jnp.asarray(loss)),
        torch.vmap(lambda x: worst_case(x, ambiguity_set).risk)(torch.tensor(loss)),
    ):
        assert np.isnan(np.asarray(risk)).tolist() == [False, True]


@every_set
def test_jax_maps_over_losses_in_eager_code_of_many_masks(ambiguity_set: Any) -> None:
    # The losses are visible and sorted on the host; the search meets the mapped mask only in its first step.
    rng = np.random.default_rng(10)
    loss, where = rng.normal(size=40), rng.random((3, 40)) < 0.5
    where[:, 0] = True
    got = jax.vmap(lambda mask: worst_case(jnp.asarray(loss), ambiguity_set, where=mask))(jnp.asarray(where))
    assert_same(got, worst_case(np.broadcast_to(loss, where.shape), ambiguity_set, where=where))
