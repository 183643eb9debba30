"""SigLIP, distillation and hinge against loops in long numbers, torch's autograd, and numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import drrho_core as dc
from helpers.loss_family import CASES, check, draw, exact, given, thin


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_loops(space: Any, name: str) -> None:
    thin(space)
    case = CASES[name]
    arrays, scalars = given(space, case, as_arrays=False)
    result = space.run(case.function, *arrays, **scalars)
    assert result.image_gradient.dtype == result.text_gradient.dtype == arrays[0].dtype
    check(result, exact(name, space.dtype_name), case.steepness * space.unit, space.to_numpy)


@pytest.mark.parametrize("name", ["sigmoid", "distillation", "hinge"])
def test_scalars_may_be_arrays(eager_space: Any, name: str) -> None:
    case = CASES[name]
    arrays, scalars = given(eager_space, case, as_arrays=True)
    result = case.function(*arrays, **scalars)
    check(result, exact(name, eager_space.dtype_name), eager_space.unit, eager_space.to_numpy)


def torch_values(arrays: list[Any], scalars: dict[str, Any], name: str) -> Any:
    """The three losses as torch's own functions say them."""
    import torch
    from torch.nn import functional

    images, texts = arrays[:2]
    S = images @ texts.T
    eye = torch.eye(len(S), dtype=torch.bool)
    if name == "sigmoid":
        logits = scalars["scale"] * S + scalars["bias"]
        y = 2.0 * eye - 1.0
        return -functional.logsigmoid(y * logits).sum() / len(S)
    if name == "distillation":
        logits, targets = S / scalars["temperature"], arrays[2] @ arrays[3].T / scalars["reference_temperature"]
        both = ((logits, targets), (logits.T, targets.T))
        return sum(functional.cross_entropy(mine, its.softmax(1)) for mine, its in both) / 2
    positive = S.diagonal()
    hinges = [
        functional.relu(S - place + scalars["margin"])[~eye] ** 2 for place in (positive[:, None], positive[None, :])
    ]
    return (hinges[0].mean() + hinges[1].mean()) / 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["sigmoid", "distillation", "hinge"])
def test_gradients_are_autograds(name: str, seed: int) -> None:
    import torch

    case = CASES[name]
    arrays = [torch.asarray(x) for x in draw(seed, b=7)[: case.arrays]]
    leaves = [x.clone().requires_grad_(True) for x in arrays]
    scalars = {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in case.scalars.items()}
    value = torch_values(leaves, scalars, name)
    value.backward()
    expected = {"loss": value.detach(), "image_gradient": leaves[0].grad, "text_gradient": leaves[1].grad}
    expected |= {f"{key}_gradient": scalar.grad for key, scalar in scalars.items()}
    check(case.function(*arrays, **case.scalars), expected, 1e-13, lambda x: x.numpy())


def test_the_losses_of_the_docstrings_by_hand() -> None:
    # S = [[1, 0.5], [0.2, 0.8]]
    images, texts = np.eye(2), np.array([[1.0, 0.2], [0.5, 0.8]])
    loss = dc.sigmoid_loss(images, texts, scale=10.0, bias=-4.0).loss
    wrong = [-6.0, 1.0, -2.0, -4.0]
    assert loss == pytest.approx(sum(math.log1p(math.exp(x)) for x in wrong) / 2, rel=1e-14)
    hinge = dc.hinge_margin_loss(images, texts, margin=0.4)
    # image anchors: 0.5 - 1, 0.2 - 0.8; text anchors: 0.2 - 1, 0.5 - 0.8 -> only the last comes within 0.4
    assert hinge.loss == pytest.approx(0.1**2 / 4, rel=1e-13)
    # d loss / d S = 2 * 0.1 / 4 * (1 at (0, 1), -1 at (1, 1))
    np.testing.assert_allclose(hinge.image_gradient, 0.05 * np.array([texts[1], -texts[1]]), rtol=1e-12)
    np.testing.assert_allclose(hinge.text_gradient, 0.05 * np.array([[0, 0], [1.0, -1.0]]), rtol=1e-12)


def test_distilling_a_certain_reference_is_info_nce() -> None:
    images, texts = draw(b=6)[:2]
    certain = np.eye(6)
    got = dc.distillation_loss(images, texts, certain, certain, temperature=0.1, reference_temperature=1e-3)
    wanted = dc.info_nce(images, texts, temperature=0.1)
    check(got, wanted._asdict(), 1e-14)


def test_distilling_oneself_has_no_gradient_but_a_loss() -> None:
    images, texts = draw(b=6)[:2]
    got = dc.distillation_loss(images, texts, images, texts, temperature=0.1, reference_temperature=0.1)
    assert got.loss > 0.3  # the entropy
    assert np.all(got.image_gradient == 0)
    assert np.all(got.text_gradient == 0)
    assert got.temperature_gradient == 0


def test_a_well_separated_batch_costs_a_hinge_nothing() -> None:
    got = dc.hinge_margin_loss(np.eye(3), np.eye(3), margin=0.9)
    assert got.loss == 0
    assert not np.any(got.image_gradient)
    assert dc.hinge_margin_loss(np.eye(3), np.eye(3), margin=0.0).loss == 0
