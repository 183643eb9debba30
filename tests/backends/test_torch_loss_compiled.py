"""drrho_torch.ContrastiveLoss under torch.compile gives the eager numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from drrho_torch import opaque_step  # noqa: E402
from drrho_torch.step_function import StepSettings  # noqa: E402

from helpers.torch_losses import N, Problem  # noqa: E402


def compiles(test: Any) -> Any:
    """Let two warnings of the compiler about itself and about array_api_compat's cached question about types pass."""
    for message in (
        "<class 'torch.autograd.function.Function'> should not",
        "Dynamo detected a call to a `functools",
        "ContrastiveLoss was called with the rows of the previous call",  # each call changes the settings, not the rows
    ):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return pytest.mark.slow(test)


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@compiles
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "reference, mask, learned temperature"])
def test_compiled_is_eager(extras: bool, fresh_compiler: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    problem = Problem.draw()
    results, graphs = [], 0
    for compiled in (False, True):
        temperature = torch.nn.Parameter(torch.tensor(0.3)) if extras else 0.3
        module = problem.module(temperature=temperature, radius=0.5, eps=0.1)
        if extras:
            temperature.data = temperature.data.float()  # narrower than the features, as in practice
        call = torch.compile(module, fullgraph=True, backend=counter) if compiled else module
        images, texts = problem.images.clone().requires_grad_(), problem.texts.clone().requires_grad_()
        losses: list[Any] = []
        for gamma in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):  # compiled once for all of them
            module.gamma = gamma
            options = {"reference_features": problem.references, "pair_mask": problem.pair_mask} if extras else {}
            losses.append(call(images, texts, problem.index, **options))
            graphs = graphs or counter.frame_count
        sum(losses).backward()
        gradients = [images.grad, texts.grad, *([temperature.grad] if extras else [])]
        assert not extras or temperature.grad.dtype == torch.float32
        results.append([*gradients, *losses, module.log_inner_image, module.log_inner_text])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-13, atol=1e-15)
    assert counter.frame_count == graphs > 0


@compiles
def test_a_temperature_per_anchor_compiles(fresh_compiler: None) -> None:
    problem = Problem.draw()
    tables = torch.tensor(np.random.default_rng(1).uniform(0.2, 0.8, (2, N)))
    results = []
    for compiled in (False, True):
        module = problem.module(radius=0.5)

        def function(images: Any, *tables: Any, module: Any = module) -> Any:
            rows = tuple(table[problem.index] for table in tables)
            return module(images, problem.texts, problem.index, temperature=rows)

        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        images = problem.images.clone().requires_grad_()
        image_table, text_table = (table.clone().requires_grad_() for table in tables)
        for both in ((image_table, text_table), (text_table, text_table)):  # one table for both sides, too
            loss = call(images, *both)
            loss.backward()
        results.append([loss, images.grad, image_table.grad, text_table.grad, module.log_inner_image])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-13, atol=1e-15)


@compiles
def test_one_tensor_in_both_roles_compiled(fresh_compiler: None) -> None:
    problem = Problem.draw()
    gradients = []
    for compiled in (False, True):
        module = problem.module()
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        features = problem.images.clone().requires_grad_()
        call(features, features, problem.index, reference_features=(features, features)).backward()
        gradients.append(features.grad)
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-15)


class Owner:
    """An object whose settings the operator of a step uses; a loss with an estimator or a group is such an object."""

    def settings(self, training: bool, update: bool, gamma: float, pairs: tuple[bool, ...]) -> StepSettings:
        return StepSettings(
            training=training,
            update=update,
            gamma=gamma,
            eps=0.1,
            reference_weight=0.5,
            radius=0.2,
            tile_size=None,
            memory_budget=None,
            table=None,
            repeated=None,
            pairs=pairs,
        )


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("features", DTYPES, ids=str)
@pytest.mark.parametrize("state", DTYPES[:2], ids=str)
@pytest.mark.parametrize("references", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("pair", [False, True], ids=["global temperature", "temperatures per anchor"])
def test_the_compiler_knows_shapes_and_dtypes_of_a_step_that_it_cannot_trace(
    features: Any, state: Any, references: Any, pair: bool
) -> None:
    problem, owner = Problem.draw(), Owner()
    constants = [problem.pair_mask, *([None] * 4)]
    if references is not None:
        constants[1:3] = [x.to(references) for x in problem.references]
    temperatures = [torch.full((5,), 0.4), torch.full((5,), 0.5)] if pair else [torch.tensor(0.4), None]
    arguments = (
        [x.to(state) for x in problem.log_inner],
        problem.images.to(features),
        problem.texts.to(features),
        problem.index,
        constants,
        temperatures,
        torch.tensor(0.6, dtype=torch.float64),
        opaque_step.register(owner.settings),
        True,
        True,
        [references is not None, False, pair],
    )
    torch.library.opcheck(opaque_step.step, arguments, test_utils=("test_schema", "test_faketensor"))
