"""drrho_jax.drrho_risk: gradients, vmap, forward mode, masks and errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from drrho_jax import drrho_risk  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import drrho_core  # noqa: E402
from drrho_core import (  # noqa: E402
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
)

pytestmark = pytest.mark.usefixtures("wide_types")


SETS = [
    CVaR(0.35), KLPenalty(0.7), KLBall(0.2), ChiSquarePenalty(0.5), ChiSquareBall(0.3), CressieReadBall(1.5, 0.2)
]  # fmt: skip


@pytest.mark.parametrize(("ambiguity_set", "axis"), [(CVaR(0.35), 0), *((each, -1) for each in SETS)])
def test_risk_check_grads(ambiguity_set: Any, axis: int) -> None:
    generator = np.random.default_rng(0)
    loss = jnp.asarray(generator.normal(1.0, 2.0, (3, 7)))
    reference_loss = jnp.asarray(generator.normal(0.0, 1.0, (3, 7)))

    @jax.jit
    def function(x: Any) -> Any:
        return drrho_risk(x, reference_loss, ambiguity_set, reference_weight=0.8, axis=axis)

    assert function(loss).shape == ((7,) if axis == 0 else (3,))
    check_grads(function, (loss,), order=1, modes=["fwd", "rev"], atol=1e-8, rtol=1e-7, eps=1e-5)


# A sorted and a searched solver; test_ambiguity_mapped.py maps over the losses of all sets.
@pytest.mark.parametrize("ambiguity_set", [CVaR(0.35), KLBall(0.2)], ids=repr)
def test_risk_under_vmap_without_jit(ambiguity_set: Any) -> None:
    loss, reference_loss = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 7)))
    function = lambda x, y: drrho_risk(x, y, ambiguity_set)  # noqa: E731
    mapped, gradients = jax.vmap(jax.value_and_grad(function))(loss, reference_loss)
    together, pull = jax.vjp(function, loss, reference_loss)
    np.testing.assert_allclose(mapped, together, rtol=1e-13)
    np.testing.assert_allclose(gradients, pull(jnp.ones(3))[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_forward_mode_of_the_risk_is_the_inner_product_with_the_weights(axis: int | None) -> None:
    generator = np.random.default_rng(0)
    shape = (
        (6,) if axis is None else (4, 1, 6) if axis == 0 else (1, 6, 4)
    )  # axes of length 1 that are not the samples'
    loss, reference_loss, tangent = jnp.asarray(generator.normal(size=(3, *shape)))
    where = -1 if axis is None else axis
    function = lambda x: drrho_risk(x, reference_loss, CVaR(0.4), axis=where)  # noqa: E731
    weights = drrho_core.drrho_risk(loss, reference_loss, CVaR(0.4), axis=where).weights
    derivative = jax.jvp(function, (loss,), (tangent,))[1]
    np.testing.assert_allclose(derivative, jnp.sum(weights * tangent, axis=where), rtol=1e-13)
    forward, reverse = (jax.jit(jacobian(function))(loss) for jacobian in (jax.jacfwd, jax.jacrev))
    np.testing.assert_allclose(forward, reverse, rtol=1e-13, atol=1e-16)


def test_risk_of_the_worst_half() -> None:
    # excess 0.1, 1.5, 0.5: the worst sample and half of the next, of the weight 1 / 1.5 each
    loss, reference_loss = jnp.asarray([3.0, 2.0, 1.0]), jnp.asarray([2.9, 0.5, 0.5])
    risk, gradients = jax.value_and_grad(lambda *x: 2.0 * drrho_risk(*x, CVaR(0.5)), argnums=(0, 1))(
        loss, reference_loss
    )
    assert float(risk) == pytest.approx(2 * (1.5 + 0.5 * 0.5) / 1.5, rel=1e-12)
    np.testing.assert_allclose(gradients[0], [0.0, 4 / 3, 2 / 3], rtol=1e-12)
    assert not np.any(np.asarray(gradients[1]))


def test_risk_never_reads_what_does_not_count() -> None:
    loss = jnp.asarray([[3.0, jnp.nan, 1.0], [1.0, 2.0, jnp.inf]])
    where = jnp.asarray([[True, False, True], [True, True, False]])
    risk = lambda x: drrho_risk(x, jnp.zeros((2, 3)), CVaR(0.5), where=where)  # noqa: E731
    assert risk(loss).tolist() == [3.0, 2.0]
    assert jax.jit(jax.grad(lambda x: jnp.sum(risk(x))))(loss).tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_risk_errors() -> None:
    with pytest.raises(TypeError, match=r"^loss must be an array, got list$"):
        drrho_risk([1.0], jnp.ones(1), CVaR(0.5))
    with pytest.raises(ValueError, match=r"^reference_loss must have "):
        drrho_risk(jnp.ones(3), jnp.ones(4), CVaR(0.5))


def test_risk_is_compiled_with_a_rolled_up_loop() -> None:
    loss = np.random.default_rng(0).normal(size=(2, 9))
    risk = jax.jit(lambda x: drrho_risk(x, jnp.zeros_like(x), KLBall(0.2)))
    assert "stablehlo.while" in risk.lower(jnp.asarray(loss)).as_text()
    expected = drrho_core.drrho_risk(loss, np.zeros_like(loss), KLBall(0.2)).risk
    np.testing.assert_allclose(risk(jnp.asarray(loss)), expected, rtol=1e-13)
