"""Processes of torch.distributed on gloo, started once: each runs all cases and saves the results in a file."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from drrho_torch import ContrastiveLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from helpers import problems
from helpers.ranks import own_rows

LOCAL, STEPS = 4, 3
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": None},
    "everything": {"r": 3, "gamma": "number", "mask": "empty", "radius": 0.3, "eps": 0.01, "reference_weight": 0.7},
}


class Batch(nn.Module):
    """Two linear encoders, so that a wrapper has parameters to average gradients of."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image, self.text = (
            nn.Parameter(torch.randn(4, 5, dtype=torch.float64, generator=generator)) for _ in range(2)
        )

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return (
            nn.functional.normalize(images @ self.image, dim=1),
            nn.functional.normalize(texts @ self.text, dim=1),
        )


def train(
    name: str, rank: int, num_ranks: int, wrap: Callable[[nn.Module], nn.Module], total: int, **options: Any
) -> dict[str, np.ndarray]:
    """Train for a few steps on the own rows of batches that do not depend on the number of ranks."""
    case = CASES[name]
    model = Batch()
    wrapped = wrap(model)
    temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss = ContrastiveLoss(
        3 * total,
        temperature=temperature,
        gamma=0.6,
        **{key: case[key] for key in ("radius", "eps", "reference_weight") if key in case},
        **options,
    ).double()
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.05)
    losses = []
    for step in range(STEPS):
        p = problems.draw(step, b=total, d=4, r=case["r"], mask=case.get("mask"))
        rows = np.random.default_rng(step).permutation(3 * total)[:total]
        inputs = [own_rows(torch.from_numpy(x), rank, num_ranks) for x in (*p.arrays[:2], rows)]
        arguments: dict[str, Any] = {}
        if p.reference_features is not None:
            arguments["reference_features"] = tuple(
                own_rows(torch.from_numpy(x), rank, num_ranks) for x in p.reference_features
            )
        if p.pair_mask is not None:
            arguments["pair_mask"] = own_rows(torch.from_numpy(p.pair_mask), rank, num_ranks)
        optimizer.zero_grad()
        value = loss(*wrapped(*inputs[:2]), inputs[2], **arguments)
        value.backward()
        if wrapped is model:
            # Without a wrapper the loop averages the gradients itself, as wrappers do.
            for parameter in model.parameters():
                if num_ranks > 1:
                    dist.all_reduce(parameter.grad)
                parameter.grad /= num_ranks  # type: ignore[operator]
        optimizer.step()
        losses.append(value.item())
    return {
        "loss": np.asarray(losses),
        "image": model.image.detach().numpy(),
        "text": model.text.detach().numpy(),
        "temperature": temperature.detach().numpy(),
        "log_inner_image": loss.log_inner_image.numpy(),
        "log_inner_text": loss.log_inner_text.numpy(),
    }


def refusals(rank: int) -> dict[str, str]:
    """Return the message of each wrong call."""

    def message(call: Callable[[], Any]) -> str:
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error)
        return "no error"

    features = torch.eye(LOCAL + 2)[:LOCAL].requires_grad_()
    index = torch.arange(LOCAL) + LOCAL * rank
    loss = ContrastiveLoss(8, temperature=0.5, process_group=dist.group.WORLD)
    before = loss.log_inner_image.clone()
    wrong = {
        "no group": message(lambda: ContrastiveLoss(8, temperature=0.5)(features, features, index)),
        "gathered": message(lambda: loss(features, features, index, gathered=True)),
        "same id": message(lambda: loss(features, features, torch.arange(LOCAL) + 3 * rank)),
        "range": message(lambda: loss(features, features, index + 2)),
        "sizes": message(lambda: loss(*[features[: LOCAL - rank]] * 2, index[: LOCAL - rank])),
        "form": message(lambda: ContrastiveLoss(8, temperature=0.5, form="tree")),
        "group": message(lambda: ContrastiveLoss(8, temperature=0.5, process_group="world")),
    }
    assert torch.equal(loss.log_inner_image, before)
    return wrong


def work(rank: int, world_size: int, folder: str) -> None:
    """Run all cases as one process of a group."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        mesh = dist.init_device_mesh("cpu", (world_size,))
        results: dict[str, Any] = {}
        total = world_size * LOCAL
        for name in CASES:
            for form in ("reduce", "ring"):
                shared = {"process_group": dist.group.WORLD, "form": form}
                results[f"{name}/{form}/plain"] = train(name, rank, world_size, lambda m: m, total, **shared)
                shared["process_group"] = mesh
                results[f"{name}/{form}/ddp"] = train(name, rank, world_size, DistributedDataParallel, total, **shared)
        results["refusals"] = refusals(rank)
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
