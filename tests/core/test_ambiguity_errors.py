"""The ambiguity sets as objects, and bad input: one clear error for each."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import array_api_strict as strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from drrho_core import (
    AmbiguitySet,
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    worst_case,
)
from helpers.ambiguity import (
    ALL,
)


def test_sets_are_frozen_hashable_values() -> None:
    assert len({CVaR(0.5), CVaR(alpha=0.5), CVaR(np.float64(0.5)), CVaR(0.25)}) == 2
    assert KLBall(0.5) != ChiSquareBall(0.5)
    assert repr(CressieReadBall(3, 1)) == "CressieReadBall(order=3.0, radius=1.0)"
    for ambiguity_set in ALL:
        assert pickle.loads(pickle.dumps(ambiguity_set)) == ambiguity_set
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(ambiguity_set, dataclasses.fields(ambiguity_set)[0].name, 0.5)
    with pytest.raises(TypeError, match="abstract"):
        AmbiguitySet()  # type: ignore[abstract]


@pytest.mark.parametrize("xp", [np, torch, jnp, strict], ids=["numpy", "torch", "jax", "strict"])
def test_a_parameter_may_be_an_array_without_axes(xp: Any) -> None:
    parameter = xp.asarray(0.25)
    assert CVaR(parameter) == CVaR(0.25)
    assert type(CVaR(parameter).alpha) is float


BUILDERS: list[tuple[str, Callable[[Any], AmbiguitySet]]] = [
    ("alpha", CVaR),
    ("temperature", KLPenalty),
    ("temperature", lambda temperature: CappedKLPenalty(temperature, 0.5)),
    ("alpha", lambda alpha: CappedKLPenalty(0.5, alpha)),
    ("radius", KLBall),
    ("strength", ChiSquarePenalty),
    ("radius", ChiSquareBall),
    ("order", lambda order: CressieReadBall(order, 0.5)),
    ("radius", lambda radius: CressieReadBall(2.0, radius)),
]


@pytest.mark.parametrize(("name", "build"), BUILDERS)
def test_parameters_are_checked_when_a_set_is_built(name: str, build: Callable[[Any], AmbiguitySet]) -> None:
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"^{name} must be finite, got {value}$"):
            build(value)
    for value in (True, None, "0.5", 0.5j, [0.5], np.asarray([0.5]), torch.tensor(True)):
        with pytest.raises(TypeError, match=f"^{name} must be a real number, got "):
            build(value)
    with pytest.raises(ValueError, match=f"^{name} must .*, got -1"):
        build(-1)
    with pytest.raises(ValueError, match=f"^{name} must not require gradients"):
        build(torch.tensor(1.5, requires_grad=True))
    with pytest.raises(TypeError, match=f"^{name} must be a constant when code is traced, got "):
        jax.jit(build)(0.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CVaR(0), r"^alpha must be in \(0, 1\], got 0$"),
        (lambda: CVaR(1.0000001), r"^alpha must be in \(0, 1\], got 1.0000001$"),
        (lambda: KLPenalty(0.0), r"^temperature must be > 0, got 0.0$"),
        (lambda: CappedKLPenalty(0.0, 0.5), r"^temperature must be > 0, got 0.0$"),
        (lambda: CappedKLPenalty(0.5, 0), r"^alpha must be in \(0, 1\], got 0$"),
        (lambda: CappedKLPenalty(0.5, 1.0000001), r"^alpha must be in \(0, 1\], got 1.0000001$"),
        (lambda: ChiSquarePenalty(0.0), r"^strength must be > 0, got 0.0$"),
        (lambda: KLBall(-1e-9), r"^radius must be >= 0, got -1e-09$"),
        (lambda: ChiSquareBall(-1e-9), r"^radius must be >= 0, got -1e-09$"),
        (lambda: CressieReadBall(2.0, -1e-9), r"^radius must be >= 0, got -1e-09$"),
        (lambda: CressieReadBall(1.0, 0.1), r"^order must be > 1, got 1.0$"),
    ],
)
def test_the_edges_of_a_domain(build: Callable[[], AmbiguitySet], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_edges_that_belong_to_a_domain() -> None:
    for ambiguity_set in (CVaR(1), CappedKLPenalty(0.5, 1), KLBall(0), ChiSquareBall(0), CressieReadBall(1.5, 0)):
        assert float(worst_case(np.asarray([1.0, 2.0, 6.0]), ambiguity_set).risk) == 3.0


X = np.asarray([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
YES = np.ones((2, 3), dtype=bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: worst_case(X, CVaR), TypeError, r"^ambiguity_set must be an ambiguity set .* CVaR\(0.1\), got <class"),
        (lambda: worst_case(X, 0.1), TypeError, r"^ambiguity_set must be an ambiguity set .* CVaR\(0.1\), got 0.1$"),
        (lambda: worst_case([1.0, 2.0], CVaR(0.5)), TypeError, "^losses must be an array, got list$"),
        (lambda: worst_case(1.0, CVaR(0.5)), TypeError, "^losses must be an array, got float$"),
        (
            lambda: worst_case(np.asarray([1, 2]), CVaR(0.5)),
            TypeError,
            "^losses must have a real floating dtype, got int64$",
        ),
        (lambda: worst_case(X, CVaR(0.5), xp=jnp), TypeError, r"^xp must be the namespace of losses .*, got jax"),
        (lambda: worst_case(X, CVaR(0.5), axis=0.0), TypeError, "^axis must be an integer, got 0.0$"),
        (lambda: worst_case(X, CVaR(0.5), axis=True), TypeError, "^axis must be an integer, got True$"),
        (
            lambda: worst_case(X, CVaR(0.5), axis=2),
            ValueError,
            r"^axis must be an axis of losses, which has shape \(2, 3\), got 2$",
        ),
        (
            lambda: worst_case(X, CVaR(0.5), axis=-3),
            ValueError,
            r"^axis must be an axis of losses, which has shape \(2, 3\), got -3$",
        ),
        (
            lambda: worst_case(np.asarray(1.0), CVaR(0.5)),
            ValueError,
            r"^axis must be an axis of losses, which has shape \(\), got -1$",
        ),
        (
            lambda: worst_case(X[:, :0], CVaR(0.5)),
            ValueError,
            r"^losses must have at least one entry along axis -1, got shape \(2, 0\)$",
        ),
        (lambda: worst_case(X, CVaR(0.5), where=True), TypeError, "^where must be an array, got bool$"),
        (
            lambda: worst_case(X, CVaR(0.5), where=torch.asarray(YES)),
            TypeError,
            r"^where must come from the library of losses \(numpy\), got an array of torch$",
        ),
        (lambda: worst_case(X, CVaR(0.5), where=X), TypeError, "^where must have dtype bool, got float64$"),
        (
            lambda: worst_case(X, CVaR(0.5), where=YES[:, :2]),
            ValueError,
            r"^where must broadcast to the shape of losses \(2, 3\), got \(2, 2\)$",
        ),
        (
            lambda: worst_case(X[0], CVaR(0.5), where=YES),
            ValueError,
            r"^where must broadcast to the shape of losses \(3,\), got \(2, 3\)$",
        ),
        (
            lambda: worst_case(X, CVaR(0.5), where=np.asarray([[True], [False]])),
            ValueError,
            "^where must mark at least one entry of every slice along axis -1, got 1 of 2 slices without any$",
        ),
        (
            lambda: worst_case(X, CVaR(0.5), axis=0, where=np.asarray([True, False, False])),
            ValueError,
            "^where must mark at least one entry of every slice along axis 0, got 2 of 3 slices without any$",
        ),
        (
            lambda: worst_case(np.where(X == 3, np.nan, X), CVaR(0.5)),
            ValueError,
            r"^losses must be finite and at most .* in size, got nan at position \(0, 2\)$",
        ),
        (
            lambda: worst_case(np.where(X == 3, -np.inf, X), CVaR(0.5)),
            ValueError,
            r"^losses must be finite and at most .* in size, got -inf at position \(0, 2\)$",
        ),
        (
            lambda: worst_case((1e37 * X).astype(np.float32), CVaR(0.5)),
            ValueError,
            r"^losses must be finite and at most 1.42e\+37 in size, got 1.99\S*e\+37 at position \(0, 1\)$",
        ),
        (
            lambda: worst_case(torch.asarray(X).requires_grad_(), CVaR(0.5)),
            ValueError,
            "^losses must not require gradients, .* got requires_grad=True$",
        ),
        (
            lambda: worst_case(
                strict.asarray(X), CVaR(0.5), where=strict.asarray(YES, device=strict.Device("device1"))
            ),
            ValueError,
            "^where must be on the device of losses .*, got .*device1",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
