"""torch.compile's loop under the solvers of the core: rolled up, for any shape, and beside autograd."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch
from drrho_torch import drrho_risk

from drrho_core import ChiSquareBall, CressieReadBall, worst_case
from drrho_core.ambiguity import search


def losses(*shape: int) -> torch.Tensor:
    return torch.asarray(np.random.default_rng(1).normal(size=shape))


def leaves(worst: Any) -> list[torch.Tensor]:
    return [worst.risk, worst.weights, *worst.dual]


@pytest.mark.slow
def test_steps_are_rolled_up_and_shapes_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    ball, sizes = CressieReadBall(3.0, 0.2), []  # it has both loops: a search over the losses, and Newton's method

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nodes = [node for module in graph.modules() for node in getattr(getattr(module, "graph", None), "nodes", [])]
        loops = [node for node in nodes if "while_loop" in str(node.target)]
        sizes.append((len(nodes), len(loops)))
        return graph.forward

    def compiled() -> Any:
        torch._dynamo.reset()
        return torch.compile(lambda x: worst_case(x, ball, xp=xp), fullgraph=True, backend=backend)

    for steps in (3, search.newton_steps()):
        monkeypatch.setattr(search, "newton_steps", lambda steps=steps: steps)
        function = compiled()
        for shape in ((4, 5), (3, 9)):
            x = losses(*shape)
            for got, wanted in zip(leaves(function(x)), leaves(worst_case(x, ball)), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    # The number of steps is nowhere in the graphs' sizes.
    half = len(sizes) // 2
    assert sizes[:half] == sizes[half:]
    assert all(loops == 2 for _, loops in sizes)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not")  # the compiler about itself
def test_the_risk_of_a_compiled_training_step_has_its_gradient() -> None:
    torch._dynamo.reset()
    reference = losses(6) / 2
    ball = ChiSquareBall(0.3)
    compiled = torch.compile(lambda x: drrho_risk(x, reference, ball) * 2.0, fullgraph=True, backend="aot_eager")
    x = losses(6).requires_grad_()
    compiled(x).backward()
    torch.testing.assert_close(x.grad, 2 * worst_case(x.detach() - reference, ball).weights, rtol=1e-12, atol=0)
