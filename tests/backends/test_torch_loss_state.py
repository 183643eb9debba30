"""The state of drrho_torch.ContrastiveLoss: checkpoints, conversions, copies, two steps, half types and autocast."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from drrho_torch import ContrastiveLoss  # noqa: E402

from helpers.torch_losses import (  # noqa: E402
    INDEX,
    D,
    N,
    Problem,
    bits,
    trained,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_survives_a_checkpoint_bit_by_bit(dtype: Any) -> None:
    problem, module = trained(dtype, temperature=torch.nn.Parameter(torch.tensor(0.3)))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = ContrastiveLoss(N, temperature=torch.nn.Parameter(torch.tensor(0.9)), gamma=0.7).to(dtype)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert bits(other) == bits(module)
    assert other.log_inner_image.dtype == dtype
    results = [m(problem.images, problem.texts, problem.index) for m in (module, other)]
    assert torch.equal(*results)
    assert bits(other) == bits(module)


def test_calls_without_update_see_the_new_estimates_and_store_nothing() -> None:
    problem, module = trained()
    before = bits(module)
    sides = problem.images, problem.texts, problem.index
    results = [module(*sides, update=False) for _ in range(2)]
    assert bits(module) == before
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], module(*sides))
    assert bits(module) != before


def test_copies_are_independent() -> None:
    problem, module = trained()
    other = copy.deepcopy(module)
    before = bits(other)
    module(problem.images, problem.texts, problem.index)
    assert bits(other) == before != bits(module)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: torch.nn.Sequential(m).half()[0],
        lambda m: m.half().float(),
    ],
    ids=["half", "bfloat16", "to", "to device and dtype", "type", "parent", "there and back"],
)
def test_no_conversion_narrows_the_state(convert: Callable[[Any], Any]) -> None:
    problem, module = trained(temperature=torch.nn.Parameter(torch.tensor(0.3)))
    before = bits(module)
    module = convert(module)
    assert module.log_inner_image.dtype == torch.float32
    assert bits(module) == before
    assert module.temperature.dtype == torch.float32
    assert isinstance(module.temperature, torch.nn.Parameter)
    assert module(problem.images.half(), problem.texts.half(), problem.index).dtype == torch.float32
    assert module.log_inner_image.dtype == torch.float32


def test_double_widens_and_float_returns() -> None:
    _, module = trained()
    before = bits(module)
    assert module.double().log_inner_image.dtype == torch.float64
    assert module.half().log_inner_image.dtype == torch.float64
    assert module.float().log_inner_image.dtype == torch.float32
    assert bits(module) == before


def test_state_moves_with_the_module() -> None:
    _, module = trained()
    moved = module.to("meta", torch.float16)
    assert moved.log_inner_text.device.type == "meta"
    assert moved.log_inner_text.dtype == torch.float32


@pytest.mark.parametrize("how", ["no_grad", "inference_mode"])
def test_state_changes_in_training_only(how: str) -> None:
    problem, module = trained()
    before = bits(module)
    trains = copy.deepcopy(module)
    expected = trains(problem.images, problem.texts, problem.index)
    assert bits(trains) != before
    with getattr(torch, how)():
        value = module(problem.images, problem.texts, problem.index)
    assert torch.equal(value, expected)
    assert bits(module) == before


def test_two_steps_remember() -> None:
    # u = 0.7 g + 0.3 g' after g' on the first visit
    problem = Problem.draw()
    module = ContrastiveLoss(N, temperature=0.3, gamma=0.7).double()
    other = Problem.draw(seed=1)
    module(other.images, other.texts, problem.index)
    first = module.log_inner_image[problem.index].exp()
    module(problem.images, problem.texts, problem.index)
    fresh = ContrastiveLoss(N, temperature=0.3, gamma=1.0).double()
    fresh(problem.images, problem.texts, problem.index)
    expected = 0.3 * first + 0.7 * fresh.log_inner_image[problem.index].exp()
    torch.testing.assert_close(module.log_inner_image[problem.index].exp(), expected, rtol=1e-13, atol=0)
    untouched = [i for i in range(N) if i not in INDEX]
    assert torch.all(module.log_inner_image[untouched] == -math.inf)


def test_gamma_may_be_set_between_steps() -> None:
    problem = Problem.draw()
    module, other = problem.module(gamma=1.0), problem.module(gamma=0.25)
    module.gamma = 0.25
    assert module.gamma == 0.25
    results = [m(problem.images, problem.texts, problem.index) for m in (module, other)]
    assert torch.equal(*results)
    assert bits(module) == bits(other)
    for bad in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"^gamma must be "):
            module.gamma = bad
    with pytest.raises(TypeError, match=r"^gamma must be a real number, got 'half'$"):
        module.gamma = "half"
    assert module.gamma == 0.25


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_every_integer_type_is_an_index(dtype: Any) -> None:
    problem = Problem.draw()
    modules = [problem.module() for _ in range(2)]
    values = [
        module(problem.images, problem.texts, index)
        for module, index in zip(modules, (problem.index, problem.index.to(dtype)), strict=True)
    ]
    assert torch.equal(*values)
    assert bits(modules[0]) == bits(modules[1])


# ------------------------------------------------------------------------------------------------- half and autocast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features(dtype: Any) -> None:
    problem = Problem.draw(torch.float32)
    half = [x.to(dtype).requires_grad_() for x in (problem.images, problem.texts)]
    wide = [x.detach().float().requires_grad_() for x in half]
    references = [x.to(dtype) for x in problem.references]
    modules = [problem.module() for _ in range(2)]
    loss = modules[0](*half, problem.index, reference_features=tuple(references))
    expected = modules[1](*wide, problem.index, reference_features=tuple(x.float() for x in references))
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert bits(modules[0]) == bits(modules[1])
    for x, y in zip(half, wide, strict=True):
        assert x.grad.dtype == dtype
        assert torch.equal(x.grad, y.grad.to(dtype))


def test_the_loss_scale_comes_before_rounding() -> None:
    # Well separated pairs: gradients of 1e-9 vanish in half, 65536 times as large they do not.
    images = torch.eye(4, dtype=torch.float16).requires_grad_()
    texts = torch.eye(4, dtype=torch.float16)
    module = ContrastiveLoss(4, temperature=0.1, gamma=1.0, eps=1e4)
    (2.0**16 * module(images, texts, torch.arange(4))).backward()
    wide = images.detach().float().requires_grad_()
    (2.0**16 * module(wide, texts.float(), torch.arange(4))).backward()
    assert 0 < float(wide.grad.abs().max()) / 2.0**16 < 2.0**-25  # half's smallest number, halved
    assert torch.equal(images.grad, wide.grad.half())
    assert float(images.grad.abs().max()) > 0


def test_autocast_does_not_reach_the_loss() -> None:
    problem = Problem.draw(torch.float32)
    modules = [problem.module() for _ in range(2)]
    gradients, values = [], []
    for module, enabled in zip(modules, (False, True), strict=True):
        images = problem.images.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = module(images, problem.texts, problem.index, reference_features=problem.references)
        loss.backward()
        gradients.append(images.grad)
        values.append(loss)
    assert values[1].dtype == torch.float32
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert bits(modules[0]) == bits(modules[1])


def test_a_training_step_under_autocast() -> None:
    problem = Problem.draw(torch.float32)
    tower = torch.nn.Linear(D, D)
    module = problem.module()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = tower(problem.images), tower(problem.texts)
        assert features[0].dtype == torch.bfloat16
        loss = module(*features, problem.index)
    loss.backward()
    assert loss.dtype == module.log_inner_image.dtype == torch.float32
    assert float(tower.weight.grad.abs().max()) > 0
