"""drrho_torch.drrho_risk: gradients, masks, autocast and errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from drrho_torch import drrho_risk  # noqa: E402

from drrho_core import ChiSquareBall, CVaR, KLBall, KLPenalty  # noqa: E402

SETS = [CVaR(0.35), KLPenalty(0.7), KLBall(0.2), ChiSquareBall(0.3)]


@pytest.mark.parametrize("ambiguity_set", SETS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("axis", [0, -1])
def test_risk_gradcheck(ambiguity_set: Any, axis: int) -> None:
    generator = np.random.default_rng(0)
    loss = torch.tensor(generator.normal(1.0, 2.0, (3, 7)), requires_grad=True)
    reference_loss = torch.tensor(generator.normal(0.0, 1.0, (3, 7)))

    def function(x: Any) -> Any:
        return drrho_risk(x, reference_loss, ambiguity_set, reference_weight=0.8, axis=axis)

    assert function(loss).shape == ((7,) if axis == 0 else (3,))
    assert torch.autograd.gradcheck(function, loss, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_risk_of_the_worst_half() -> None:
    # excess 0.1, 1.5, 0.5: the worst sample and half of the next, of the weight 1 / 1.5 each
    loss = torch.tensor([3.0, 2.0, 1.0], requires_grad=True)
    reference_loss = torch.tensor([2.9, 0.5, 0.5], requires_grad=True)
    risk = drrho_risk(loss, reference_loss, CVaR(0.5))
    assert float(risk.detach()) == pytest.approx((1.5 + 0.5 * 0.5) / 1.5, rel=1e-6)
    (2.0 * risk).backward()
    torch.testing.assert_close(loss.grad, torch.tensor([0.0, 4 / 3, 2 / 3]))
    assert reference_loss.grad is None


def test_risk_never_reads_what_does_not_count() -> None:
    loss = torch.tensor([[3.0, math.nan, 1.0], [1.0, 2.0, math.inf]], requires_grad=True)
    where = torch.tensor([[True, False, True], [True, True, False]])
    risk = drrho_risk(loss, torch.zeros(2, 3), CVaR(0.5), where=where)
    risk.sum().backward()
    assert risk.tolist() == [3.0, 2.0]
    assert loss.grad.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_risk_under_autocast_is_the_risk() -> None:
    generator = np.random.default_rng(1)
    loss = torch.tensor(generator.normal(size=9), dtype=torch.bfloat16)
    zeros = torch.zeros(9, dtype=torch.bfloat16)
    expected = drrho_risk(loss, zeros, ChiSquareBall(0.2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(drrho_risk(loss, zeros, ChiSquareBall(0.2)), expected)


def test_risk_errors() -> None:
    loss = torch.ones(3, requires_grad=True)
    with pytest.raises(TypeError, match=r"^loss must be a torch tensor \(torch.as_tensor\), got list$"):
        drrho_risk([1.0], torch.ones(1), CVaR(0.5))
    with pytest.raises(ValueError, match=r"^reference_loss must have "):
        drrho_risk(loss, torch.ones(4), CVaR(0.5))
    gradient = torch.autograd.grad(drrho_risk(loss, torch.zeros(3), KLPenalty(1.0)), loss, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"^the contrastive loss and .* must be differentiated once only"):
        (gradient.square().sum() + loss.sum()).backward()
