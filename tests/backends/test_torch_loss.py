"""drrho_torch.ContrastiveLoss against autograd of the formulas: gradients, references and temperatures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from drrho_torch import ContrastiveLoss  # noqa: E402

from drrho_core import contrastive_step  # noqa: E402
from helpers.torch_losses import (  # noqa: E402
    UNIT,
    B,
    N,
    Problem,
    written_out,
)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "memoryless": {"gamma": 1.0},
    "cold": {"temperature": 0.02},
    "eps": {"eps": 0.25},
    "radius": {"radius": 0.8},
    "reference": {"reference": True},
    "reference weight": {"reference": True, "reference_weight": 1.5},
    "pair mask": {"mask": True, "radius": 0.3},
    "everything": {"reference": True, "reference_weight": 0.4, "eps": 0.1, "radius": 0.2, "mask": True, "gamma": 0.2},
    "tiles": {"tile_size": 2, "reference": True},
    "no budget": {"memory_budget": 0},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", list(CASES))
def test_gradient_is_autograd_of_the_surrogate(case: str, dtype: Any) -> None:
    options = dict(CASES[case])
    problem = Problem.draw(dtype)
    references = problem.references if options.pop("reference", False) else None
    pair_mask = problem.pair_mask if options.pop("mask", False) else None
    temperature = torch.nn.Parameter(torch.tensor(options.pop("temperature", 0.3), dtype=dtype))
    module = problem.module(temperature=temperature, **options)
    images, texts = problem.images.clone().requires_grad_(), problem.texts.clone().requires_grad_()
    loss = module(images, texts, problem.index, reference_features=references, pair_mask=pair_mask)
    (3.0 * loss).backward()

    wide = [x.detach().double().requires_grad_() for x in (problem.images, problem.texts, temperature)]
    expected = written_out(
        *wide,
        tuple(state[problem.index].double() for state in problem.log_inner),
        gamma=options.get("gamma", 0.7),
        eps=options.get("eps", 0.0),
        radius=options.get("radius", 0.0),
        references=None if references is None else tuple(x.double() for x in references),
        weight=options.get("reference_weight", 1.0),
        pair_mask=pair_mask,
    )
    gradients = torch.autograd.grad(expected.surrogate, wide)
    tau = float(temperature.detach())
    unit = max(1.0, 0.1 / tau) * UNIT[dtype]
    assert loss.dtype == dtype
    assert loss.shape == ()
    assert abs(float(loss.detach()) - expected.value) <= unit * max(abs(expected.value), tau)
    for x, gradient in ((images, gradients[0]), (texts, gradients[1])):
        assert x.grad.dtype == dtype
        assert float((x.grad.double() - 3.0 * gradient).abs().max()) <= 3.0 * unit * expected.scale
    # The terms of its sum are of the size of |log u| + sum w |D|, where each D is at most 4 / temperature.
    size = 3.0 * max(1.0, abs(expected.value) / tau, 4 / tau * 2 * expected.scale)
    assert abs(float(temperature.grad) - 3.0 * float(gradients[2])) <= unit * size
    for name, rows, old in zip(("image", "text"), expected.log_inner, problem.log_inner, strict=True):
        state = getattr(module, f"log_inner_{name}")
        whole = old.double()
        whole[problem.index] = rows
        seen = whole > -math.inf
        assert torch.equal(state > -math.inf, seen)
        error = (state.double() - whole)[seen].abs() / whole[seen].abs().clamp(min=1.0)
        assert float(error.max()) <= unit


@pytest.mark.parametrize("visited", [False, True], ids=["first visit", "revisit"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "reference, mask, eps, radius"])
def test_gradcheck_without_memory(visited: bool, extras: bool) -> None:
    problem = Problem.draw()
    module = problem.module(
        temperature=torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
        gamma=1.0,
        **({"eps": 0.1, "radius": 0.3, "reference_weight": 0.7} if extras else {}),
    )
    index = problem.index if visited else torch.tensor([0, 2, 5])
    rows = slice(0, len(index))
    module.eval()  # gradcheck calls it often

    def function(images: Any, texts: Any, temperature: Any) -> Any:
        module.temperature = temperature
        return module(
            images,
            texts,
            index,
            reference_features=tuple(x[rows] for x in problem.references) if extras else None,
            pair_mask=problem.pair_mask[rows, rows] if extras else None,
        )

    inputs = [x[rows].clone().requires_grad_() for x in (problem.images, problem.texts)]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (*inputs, temperature), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "reference, mask, eps, radius"])
def test_gradcheck_of_a_temperature_per_anchor(extras: bool) -> None:
    problem = Problem.draw()
    options = {"eps": 0.1, "radius": 0.3, "reference_weight": 0.7} if extras else {}
    module = problem.module(temperature=0.9, gamma=1.0, **options).eval()

    def function(images: Any, texts: Any, image_table: Any, text_table: Any) -> Any:
        return module(
            images,
            texts,
            problem.index,
            reference_features=problem.references if extras else None,
            pair_mask=problem.pair_mask if extras else None,
            temperature=(image_table[problem.index], text_table[problem.index]),
        )

    tables = torch.tensor(np.random.default_rng(1).uniform(0.2, 0.8, (2, N)))
    inputs = [x.clone().requires_grad_() for x in (problem.images, problem.texts, *tables)]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_the_whole_data_set_without_memory_is_the_objective() -> None:
    problem = Problem.draw()
    weight, radius = 0.8, 0.4
    module = ContrastiveLoss(
        B, temperature=torch.nn.Parameter(torch.tensor(0.2).double()), gamma=1.0, radius=radius, reference_weight=weight
    ).double()
    leaves = [x.clone().requires_grad_() for x in (problem.images, problem.texts)]
    loss = module(*leaves, torch.arange(B), reference_features=problem.references)
    loss.backward()

    images, texts, t = (x.detach().clone().requires_grad_() for x in (*leaves, module.temperature))
    z = images @ texts.T - weight * problem.references[0] @ problem.references[1].T
    objective = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        others = [j for j in range(B) if j != i]
        f = t * torch.log(sum(torch.exp((z[i, j] - z[i, i]) / t) for j in others) / (B - 1))
        g = t * torch.log(sum(torch.exp((z[j, i] - z[i, i]) / t) for j in others) / (B - 1))
        objective = objective + (f + g + radius * (t + t)) / (2 * B)
    expected = torch.autograd.grad(objective, (images, texts, t))
    assert abs(float((loss - objective).detach())) <= 1e-12 * max(abs(float(objective.detach())), 0.2)
    scale = 2 / (2 * B)  # the weights of an anchor sum to one
    for leaf, gradient in zip(leaves, expected[:2], strict=True):
        assert float((leaf.grad - gradient).abs().max()) <= 1e-12 * scale
    assert float(module.temperature.grad) == pytest.approx(float(expected[2]), rel=1e-12)


@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_infonce_with_its_eps(tau: float) -> None:
    problem = Problem.draw()
    temperature = torch.nn.Parameter(torch.tensor(tau, dtype=torch.float64))
    module = problem.module(temperature=temperature, gamma=1.0, eps=1 / (B - 1))
    leaves = [x.clone().requires_grad_() for x in (problem.images, problem.texts)]
    loss = module(*leaves, problem.index)
    loss.backward()

    images, texts, t = (x.detach().clone().requires_grad_() for x in (*leaves, temperature))
    logits, labels = images @ texts.T / t, torch.arange(B)
    cross_entropy = torch.nn.functional.cross_entropy
    infonce = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    expected_loss = t * (infonce - math.log(B - 1))
    expected = torch.autograd.grad(expected_loss, (images, texts, t))
    unit = 1e-12 * max(1.0, 0.1 / tau)
    assert abs(float((loss - expected_loss).detach())) <= unit * max(abs(float(expected_loss.detach())), tau)
    for leaf, gradient in zip(leaves, expected[:2], strict=True):
        assert float((leaf.grad - gradient).abs().max()) <= unit * 2 / (2 * B)
    assert abs(float(temperature.grad - expected[2])) <= unit * 2 / tau


def test_the_incoming_gradient_multiplies() -> None:
    problem = Problem.draw()
    gradients = []
    for factor in (1.0, -2.5):
        images = problem.images.clone().requires_grad_()
        (factor * problem.module()(images, problem.texts, problem.index)).backward()
        gradients.append(images.grad)
    torch.testing.assert_close(gradients[1], -2.5 * gradients[0], rtol=1e-14, atol=0)


def test_one_tensor_in_both_roles() -> None:
    problem = Problem.draw()
    apart = [problem.images.clone().requires_grad_() for _ in range(2)]
    problem.module()(*apart, problem.index).backward()
    together = problem.images.clone().requires_grad_()
    problem.module()(together, together, problem.index).backward()
    torch.testing.assert_close(together.grad, apart[0].grad + apart[1].grad, rtol=1e-14, atol=1e-16)


def test_references_are_constants() -> None:
    problem = Problem.draw()
    references = tuple(x.clone().requires_grad_() for x in problem.references)
    images = problem.images.clone().requires_grad_()
    problem.module()(images, problem.texts, problem.index, reference_features=references).backward()
    assert images.grad is not None
    assert references[0].grad is None


# -------------------------------------------------------------------------------------------------------- temperature


def test_a_number_is_constant_and_in_no_state() -> None:
    module = ContrastiveLoss(N, temperature=0.1, gamma=1.0)
    assert list(module.parameters()) == []
    assert list(module.state_dict()) == ["log_inner_image", "log_inner_text"]


def test_a_parameter_is_registered_and_learned() -> None:
    temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    problem = Problem.draw()
    module = problem.module(temperature=temperature)
    assert dict(module.named_parameters())["temperature"] is temperature
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(problem.images, problem.texts, problem.index).backward()
    optimizer.step()
    assert float(temperature.detach()) != 0.3
    assert float(module.state_dict()["temperature"]) == float(temperature.detach())


def test_a_tensor_is_a_buffer_and_gets_its_gradient() -> None:
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    problem = Problem.draw()
    module = problem.module(temperature=temperature)
    assert list(module.parameters()) == []
    assert "temperature" in module.state_dict()
    module(problem.images, problem.texts, problem.index).backward()
    assert temperature.grad is not None
    assert temperature.grad.dtype == torch.float64


def test_a_call_may_bring_its_own_temperature() -> None:
    """A number, a tensor or a pair, in place of the module's: the same loss as of a module that was built with it."""
    problem = Problem.draw()
    own = torch.nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
    for given, same in ((0.3, 0.3), (torch.tensor(0.3), 0.3), ([torch.full((B,), 0.3)] * 2, 0.3), (None, 0.9)):
        results = []
        for module, options in (
            (problem.module(temperature=own, radius=0.5), {"temperature": given}),
            (problem.module(temperature=same, radius=0.5), {}),
        ):
            images = problem.images.clone().requires_grad_()
            loss = module(images, problem.texts, problem.index, **options)
            loss.backward()
            results.append([loss.detach(), images.grad, module.log_inner_image, module.log_inner_text])
        for one, other in zip(*results, strict=True):
            # The tensors are float32: 0.3 is another number there.
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert (own.grad is not None) == (given is None)  # the module's own was used where nothing was given


def test_temperatures_of_their_own_get_the_closed_form() -> None:
    """What arrives at the tables of all samples is `contrastive_step`'s gradient, in the batch's rows only."""
    problem = Problem.draw()
    tables = torch.tensor(np.random.default_rng(1).uniform(0.2, 0.8, (2, N)), requires_grad=True)
    module = problem.module(radius=0.4, temperature=0.9)
    rows = tables[:, problem.index]
    (3.0 * module(problem.images, problem.texts, problem.index, temperature=(rows[0], rows[1]))).backward()
    step = contrastive_step(
        problem.images,
        problem.texts,
        *(state[problem.index] for state in problem.log_inner),
        temperature=tuple(rows.detach()),
        gamma=0.7,
        radius=0.4,
    )
    expected = torch.zeros_like(tables)
    expected[:, problem.index] = 3.0 * torch.stack(list(step.temperature_gradient))
    torch.testing.assert_close(tables.grad, expected, rtol=1e-14, atol=0)
    assert torch.count_nonzero(expected) == 2 * B


def test_one_table_for_both_sides() -> None:
    problem = Problem.draw()
    module = problem.module(radius=0.4)
    table = torch.full((B,), 0.3, dtype=torch.float64, requires_grad=True)
    module(problem.images, problem.texts, problem.index, temperature=(table, table)).backward()
    sides = [torch.full((B,), 0.3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    problem.module(radius=0.4)(problem.images, problem.texts, problem.index, temperature=sides).backward()
    torch.testing.assert_close(table.grad, sides[0].grad + sides[1].grad, rtol=1e-14, atol=0)
