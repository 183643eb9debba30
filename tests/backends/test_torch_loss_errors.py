"""Bad input of drrho_torch.ContrastiveLoss is one clear error and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from drrho_torch import ContrastiveLoss  # noqa: E402

from helpers.torch_losses import (  # noqa: E402
    INDEX,
    N,
    Problem,
    bits,
    trained,
)


def valid() -> tuple[Problem, dict[str, Any]]:
    problem = Problem.draw(torch.float32)
    return problem, {
        "image_features": problem.images,
        "text_features": problem.texts,
        "sample_index": problem.index,
        "reference_features": problem.references,
        "pair_mask": problem.pair_mask,
    }


BAD_INPUT: dict[str, tuple[Callable[[Problem], dict[str, Any]], type[Exception], str]] = {
    "repeated index": (
        lambda p: {"sample_index": torch.tensor([7, 0, 10, 0, 2])},
        ValueError,
        "sample_index must not repeat an index within a batch, got 0 twice",
    ),
    "index too large": (
        lambda p: {"sample_index": torch.tensor([7, 0, 11, 4, 2])},
        ValueError,
        r"sample_index must hold row ids from 0 to 10 \(see docs/large-data\.md, .*\), got 11 at position 2",
    ),
    "negative index": (
        lambda p: {"sample_index": torch.tensor([7, -1, 10, 4, 2])},
        ValueError,
        r"sample_index must hold row ids from 0 to 10 \(see docs/large-data\.md, .*\), got -1 at position 1",
    ),
    "floating index": (
        lambda p: {"sample_index": p.index.float()},
        TypeError,
        "sample_index must have an integer dtype, got torch.float32",
    ),
    "list as index": (
        lambda p: {"sample_index": INDEX},
        TypeError,
        r"sample_index must be a torch tensor \(torch.as_tensor\), got list",
    ),
    "short index": (
        lambda p: {"sample_index": p.index[:4]},
        ValueError,
        r"sample_index must have shape \(batch_size,\) = \(5,\), got \(4,\)",
    ),
    "square index": (
        lambda p: {"sample_index": p.index[:, None]},
        ValueError,
        r"sample_index must have shape \(batch_size,\), one row id per sample of the batch, got \(5, 1\)",
    ),
    "index elsewhere": (
        lambda p: {"sample_index": p.index.to("meta")},
        ValueError,
        r"sample_index must be on the device of the state \(cpu\), got meta",
    ),
    "features elsewhere": (
        lambda p: {"text_features": p.texts.to("meta")},
        ValueError,
        r"text_features must be on the device of image_features \(cpu\), got meta",
    ),
    "numpy features": (
        lambda p: {"image_features": p.images.numpy()},
        TypeError,
        r"image_features must be a torch tensor \(torch.as_tensor\), got numpy.ndarray",
    ),
    "numpy index": (
        lambda p: {"sample_index": p.index.numpy()},
        TypeError,
        r"sample_index must be a torch tensor \(torch.as_tensor\), got numpy.ndarray",
    ),
    "index without axes": (
        lambda p: {"sample_index": p.index[0]},
        ValueError,
        r"sample_index must have shape \(batch_size,\), one row id per sample of the batch, got \(\)",
    ),
    "numpy temperature": (
        lambda p: {"temperature": np.asarray(0.5)},
        TypeError,
        r"temperature must be a number or a torch tensor \(torch.as_tensor\), got numpy.ndarray",
    ),
    "fewer texts": (
        lambda p: {"text_features": p.texts[:4]},
        ValueError,
        r"text_features must have shape \(batch_size, feature_dim\) = \(5, 4\), got \(4, 4\)",
    ),
    "shapes": (
        lambda p: {"text_features": p.texts[:, :3]},
        ValueError,
        r"text_features must have shape \(batch_size, feature_dim\) = \(5, 4\), got \(5, 3\)",
    ),
    "one axis": (
        lambda p: {"image_features": p.images[:, 0]},
        ValueError,
        r"image_features must have 2 axes \(batch_size, feature_dim\), got shape \(5,\)",
    ),
    "dtypes": (
        lambda p: {"image_features": p.images.half()},
        TypeError,
        r"text_features must have the dtype of image_features \(torch.float16\), got torch.float32",
    ),
    "reference dtype": (
        lambda p: {"reference_features": (p.references[0], p.references[1].double())},
        TypeError,
        r"reference_features\[1\] must have the dtype of ",
    ),
    "nan": (
        lambda p: {"image_features": torch.where(p.images == p.images[2, 1], math.nan, p.images)},
        ValueError,
        r"image_features must be finite, got nan at position \(2, 1\)",
    ),
    "one reference": (
        lambda p: {"reference_features": p.references[0]},
        TypeError,
        r"reference_features must be a pair \(image, text\) of arrays, got Tensor",
    ),
    "mask shape": (
        lambda p: {"pair_mask": p.pair_mask[:4]},
        ValueError,
        r"pair_mask must have shape \(batch_size, batch_size\) = \(5, 5\), got \(4, 5\)",
    ),
    "mask dtype": (lambda p: {"pair_mask": p.pair_mask.float()}, TypeError, "pair_mask must have dtype bool"),
    "temperature": (lambda p: {"temperature": -0.5}, ValueError, r"temperature must be > 0, got -0\.5"),
    "temperature of one side": (
        lambda p: {"temperature": (torch.ones(5), torch.ones(4))},
        ValueError,
        r"temperature\[1\] must have shape \(batch_size,\) = \(5,\), got \(4,\)",
    ),
    "temperatures of a side alone": (
        lambda p: {"temperature": torch.ones(5)},
        ValueError,
        "temperature must be a scalar or a pair of arrays, one value per anchor, got Tensor",
    ),
    "temperature of zero": (
        lambda p: {"temperature": (torch.ones(5), torch.tensor([1.0, 1, 0, 1, 1]))},
        ValueError,
        r"temperature\[1\] must be > 0, got 0\.0 at position 2",
    ),
    "a list of numbers": (
        lambda p: {"temperature": (0.1, torch.ones(5))},
        TypeError,
        r"temperature\[0\] must be an array of shape \(batch_size,\), got 0\.1",
    ),
    "one pair": (
        lambda p: {
            "image_features": p.images[:1],
            "text_features": p.texts[:1],
            "sample_index": p.index[:1],
            "reference_features": None,
            "pair_mask": None,
        },
        ValueError,
        "image_features must hold at least 2 pairs",
    ),
}


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input_is_one_clear_error_and_changes_nothing(case: str) -> None:
    change, error, message = BAD_INPUT[case]
    problem, arguments = valid()
    module = problem.module()
    before = bits(module)
    arguments.update(change(problem))
    with pytest.raises(error, match=f"^{message}"):
        module(**arguments)
    assert bits(module) == before
    module(**valid()[1])
    assert bits(module) != before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 3.0}, TypeError, r"num_samples must be an integer, got 3\.0"),
        ({"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite, got inf"),
        ({"temperature": "warm"}, TypeError, "temperature must be a real number, got 'warm'"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must be a scalar"),
        ({"temperature": torch.tensor(1)}, TypeError, "temperature must have a real floating dtype, got torch.int64"),
        ({"temperature": torch.tensor(-0.5)}, ValueError, r"temperature must be > 0, got -0\.5"),
        ({"temperature": torch.nn.Parameter(torch.tensor(-0.5))}, ValueError, r"temperature must be > 0, got -0\.5"),
        ({"gamma": 0.0}, ValueError, r"gamma must be in \(0, 1\], got 0\.0"),
        ({"gamma": 1.1}, ValueError, r"gamma must be in \(0, 1\], got 1\.1"),
        ({"eps": -1e-9}, ValueError, "eps must be >= 0, got -1e-09"),
        ({"reference_weight": -1.0}, ValueError, r"reference_weight must be >= 0, got -1\.0"),
        ({"radius": math.nan}, ValueError, "radius must be finite, got nan"),
        ({"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
        ({"memory_budget": 1.5}, TypeError, r"memory_budget must be an integer, got 1\.5"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ContrastiveLoss(**{"num_samples": N, "temperature": 0.1, "gamma": 1.0, **options})


def test_a_learned_temperature_that_turned_negative_is_caught() -> None:
    problem, arguments = valid()
    module = problem.module(temperature=torch.nn.Parameter(torch.tensor(0.1)))
    before = bits(module)
    with torch.no_grad():
        module.temperature.fill_(-0.1)
    with pytest.raises(ValueError, match=r"^temperature must be > 0, got -0\.1"):
        module(**arguments)
    assert bits(module) == before


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda side: side[:4], ValueError, r"log_inner_text must have shape \(num_samples,\) = \(11,\), got \(4,\)"),
        (lambda side: side.half(), TypeError, "log_inner_text must be float32 or wider, got torch.float16"),
        (lambda side: [1.0], TypeError, "log_inner_text must be an array, got list"),
    ],
    ids=["size", "half", "no tensor"],
)
def test_a_foreign_checkpoint_changes_nothing(change: Any, error: Any, message: str, assign: bool) -> None:
    problem, module = trained(temperature=torch.nn.Parameter(torch.tensor(0.3)))
    state = {name: value.clone() for name, value in problem.module().state_dict().items()}
    state["temperature"] = torch.tensor(0.9)
    state["log_inner_text"] = change(state["log_inner_text"])
    before = bits(module)
    with pytest.raises(error, match=f"^{message}$"):
        module.load_state_dict(state, assign=assign)
    assert bits(module) == before
    assert float(module.temperature.detach()) == np.float32(0.3)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, arguments = valid()
    module = problem.module()
    before = bits(module)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(
        RuntimeError, match=r"^world size must be 1 .*process_group=torch.distributed.group.WORLD, .* 2$"
    ):
        module(**arguments)
    assert bits(module) == before
    module(**arguments, gathered=True)
    assert bits(module) != before
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    module(**arguments)


def test_a_group_that_was_not_initialised_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, arguments = valid()
    module = problem.module(process_group=torch.distributed.group.WORLD)  # None before init_process_group
    module(**arguments)
    before = bits(module)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun sets both variables
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = (
        r"^world size must be 1 .*after init_process_group with process_group=torch.distributed.group.WORLD, .* 2$"
    )
    with pytest.raises(RuntimeError, match=message):
        module(**arguments)
    assert bits(module) == before
    module(**arguments, gathered=True)


def test_a_second_derivative_is_refused() -> None:
    problem = Problem.draw()
    images = problem.images.clone().requires_grad_()
    loss = problem.module()(images, problem.texts, problem.index)
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^the contrastive loss and .* must be differentiated once only"):
        (loss + gradient.square().sum()).backward()


def test_repr_shows_the_settings() -> None:
    module = ContrastiveLoss(N, temperature=0.1, gamma=0.9, radius=0.5)
    assert repr(module) == (
        "ContrastiveLoss(11, temperature=0.1, gamma=0.9, eps=0.0, reference_weight=1.0, radius=0.5)"
    )
    learned = ContrastiveLoss(N, temperature=torch.nn.Parameter(torch.tensor(0.1)), gamma=0.9)
    assert "temperature=<Parameter>" in repr(learned)
