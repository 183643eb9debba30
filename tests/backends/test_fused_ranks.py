"""The Triton kernels compute the blocks of a batch that ranks share: on a GPU, or interpreted (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import drrho_torch  # noqa: F401  (registers the kernels)
import numpy as np
import pytest
import torch

from drrho_core import ThreadRanks, contrastive_step, extend, fused_kernels, info_nce, sharded_contrastive_step
from helpers import problems
from helpers.ranks import joined, on_ranks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    find_spec("triton") is None or not (torch.cuda.is_available() or INTERPRETED),
    reason="Triton is not installed, or has no GPU and no TRITON_INTERPRET=1",
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
UNITS = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Errors of gradients, relative to the largest entry: V is rounded to the half types."""


class OneAtATime:
    """Kernels that one thread at a time may use, because Triton's interpreter has global state."""

    def __init__(self, kernels: Any) -> None:
        self._kernels, self._lock, self.blocks = kernels, threading.Lock(), 0

    def declines(self, *arguments: Any) -> Any:
        return self._kernels.declines(*arguments)

    def block_sums(self, *arguments: Any) -> Any:
        batch = arguments[0]
        # The compiler refuses products of two dtypes, which the interpreter computes.
        features = (batch.image_features, batch.text_features, *(batch.reference_features or ()))
        assert len({x.dtype for x in features}) == 1
        with self._lock:
            self.blocks += 1
            return self._kernels.block_sums(*arguments)

    def pull_block(self, *arguments: Any) -> Any:
        with self._lock:
            return self._kernels.pull_block(*arguments)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[OneAtATime]:
    """Register kernels with tiles so small that a block has several; two ranks load features without descriptors."""
    from drrho_torch import fused, fused_plans

    plan = fused_plans.PLANS[9][torch.bfloat16]
    if INTERPRETED:
        wide, tall = fused.Blocks(16, 32, 16, 1, 1), fused.Blocks(32, 16, 16, 1, 1)
        plan = plan._replace(sums=tall, weights=wide, masked=wide, panel=32, rows=48, columns=32)
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    descriptors = parameters.get("num_ranks") != 2
    plans = {
        dtype: plan._replace(descriptors=descriptors, buffer=dtype, shared=dtype != torch.float32)
        for dtype in DTYPES.values()
    }

    class Chosen(fused.TritonSweeps):
        def _run(self, batch: Any, paired: bool = True) -> Any:
            self._plan = plans[batch.image_features.dtype]
            return super()._run(batch, paired)

    locked, before = OneAtATime(Chosen()), extend.registered("torch")
    extend.register("torch", **before._replace(sweeps=lambda: locked)._asdict())
    with np.errstate(all="ignore"):
        yield locked
    extend.register("torch", **before._asdict())


CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": None},
    "everything": {"r": 3, "gamma": "number", "mask": "empty", "radius": 0.3, "eps": 0.01, "reference_weight": 0.7},
    "temperatures per anchor": {"r": 3, "per_anchor_temperature": True},
    "cold": {"r": 3, "temperature": (0.002, 0.01), "per_anchor_temperature": True},
}


@runs
@pytest.mark.parametrize(("num_ranks", "form"), [(1, "ring"), (2, "reduce"), (3, "reduce"), (3, "ring")])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_over_ranks_give_the_step_of_the_whole_batch(
    kernels: OneAtATime, case: str, name: str, num_ranks: int, form: str
) -> None:
    p = problems.draw(3, b=34 * num_ranks, d=20, **CASES[case])

    def tensor(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(tensor, x))
        x = torch.as_tensor(x, device=DEVICE)
        return x.to(DTYPES[name] if x.ndim == 2 and x.is_floating_point() else x.dtype)

    arrays = tuple(tensor(x) if x.ndim == 2 else tensor(x).float() for x in p.arrays)
    options = {key: tensor(x) if isinstance(x, (tuple, np.ndarray)) else x for key, x in p.options.items()}
    with fused_kernels("always"):
        every = on_ranks(sharded_contrastive_step, num_ranks, arrays, options, form=form)
    assert kernels.blocks == num_ranks**2
    found = joined(every, torch)

    def exact(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(exact, x))
        return x.double().cpu().numpy() if isinstance(x, torch.Tensor) and x.is_floating_point() else np.asarray(x)

    values = {key: exact(x) if isinstance(x, (tuple, torch.Tensor)) else x for key, x in options.items()}
    names = ("image_features", "text_features", "log_inner_image", "log_inner_text")
    rounded = replace(p, **dict(zip(names, map(exact, arrays), strict=True)), **values)
    expected = contrastive_step(*rounded.arrays, **rounded.options)
    sizes = problems.sizes(rounded, expected)
    # Z is a sum in float32, of size 2 at most, so D has an error of a few units of float32 divided by t.
    coldest = 4 * 2.0**-23 / np.min(np.asarray(rounded.temperature))
    bounds = {
        "loss": 1e-5 * sizes.loss,
        "surrogate": 1e-5 * sizes.surrogate,
        "image_gradient": UNITS[name] * sizes.feature_gradient,
        "text_gradient": UNITS[name] * sizes.feature_gradient,
        "temperature_gradient": 1e-5 * np.asarray(sizes.temperature_gradient),
        "log_inner_image": coldest + 1e-5 * np.maximum(1.0, np.abs(expected.log_inner_image)),
        "log_inner_text": coldest + 1e-5 * np.maximum(1.0, np.abs(expected.log_inner_text)),
    }
    for field, bound in bounds.items():
        here, there = np.asarray(exact(getattr(found, field))), np.asarray(getattr(expected, field))
        never = there == -np.inf
        np.testing.assert_array_equal(here == -np.inf, never)
        assert np.all(np.abs(here - there)[~never] <= np.broadcast_to(bound, here.shape)[~never]), field


@runs
@pytest.mark.parametrize("form", ["reduce", "ring"])
def test_kernels_over_ranks_take_reference_features_of_another_dtype(kernels: OneAtATime, form: str) -> None:
    p = problems.draw(6, b=48, d=20, r=3, per_anchor_temperature=True)
    arrays = tuple(torch.as_tensor(x, device=DEVICE).float() for x in p.arrays)
    arrays = (arrays[0].half(), arrays[1].half(), *arrays[2:])
    pairs = {name: tuple(torch.as_tensor(x, device=DEVICE).float() for x in value) for name, value in p.options.items()
             if isinstance(value, tuple)}  # fmt: skip
    options = p.options | pairs
    with fused_kernels("always"):
        shared = joined(on_ranks(sharded_contrastive_step, 2, arrays, options, form=form), torch)
    assert kernels.blocks == 4
    with fused_kernels("never"):
        whole = contrastive_step(*arrays, **options)
    for field, expected in whole._asdict().items():
        torch.testing.assert_close(getattr(shared, field), expected, rtol=2e-3, atol=1e-6, msg=field)


@runs
@pytest.mark.parametrize("form", ["reduce", "ring"])
def test_kernels_over_ranks_give_info_nce_of_the_whole_batch(kernels: OneAtATime, form: str) -> None:
    p = problems.draw(4, b=48, d=20)
    images, texts = (torch.as_tensor(x, device=DEVICE).float() for x in p.arrays[:2])

    def work(ranks: Any) -> Any:
        own = slice(24 * ranks.rank, 24 * ranks.rank + 24)
        with fused_kernels("always"):
            return info_nce(images[own], texts[own], temperature=0.3, ranks=ranks, form=form).loss

    with fused_kernels("never"):
        whole = info_nce(images, texts, temperature=0.3).loss
    for loss in ThreadRanks.run(2, work):
        torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    assert kernels.blocks == 4


@runs
def test_ranks_with_other_kernels_are_refused(kernels: OneAtATime) -> None:
    p = problems.draw(5, b=8)
    images, texts, *states = (torch.as_tensor(x, device=DEVICE).float() for x in p.arrays)

    def work(ranks: Any) -> str:
        own = slice(4 * ranks.rank, 4 * ranks.rank + 4)
        with fused_kernels("always" if ranks.rank else "never"), pytest.raises(ValueError) as caught:
            sharded_contrastive_step(*(x[own] for x in (images, texts, *states)), temperature=0.3, ranks=ranks)
        return str(caught.value)

    (message,) = set(ThreadRanks.run(2, work))
    assert message == (
        "fused_kernels must be the same on all ranks, got none on rank 0 and OneAtATime in the mode always on rank 1"
    )
    assert kernels.blocks == 0
