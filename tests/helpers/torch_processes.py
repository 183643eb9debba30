"""Processes of torch.distributed on gloo, started once: each runs all cases and saves the results in a file."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from drrho_torch import ContrastiveLoss, OpenClipLoss, TorchRanks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drrho_core import InnerEstimator
from helpers import problems
from helpers.ranks import own_rows

WORLD_SIZE, LOCAL, STEPS = 2, 4, 3
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
    name: str,
    rank: int,
    num_ranks: int,
    wrap: Callable[[nn.Module], nn.Module],
    total: int,
    *,
    split: bool = False,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Train for a few steps on the own rows of batches that do not depend on the number of ranks."""
    case = CASES[name]
    model = Batch()
    wrapped = wrap(model)
    temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    if split:
        # Each process keeps a part of the estimates.
        ranks = TorchRanks(options["process_group"])
        options["estimator"] = InnerEstimator(3 * total, like=torch.zeros(1, dtype=torch.float64), ranks=ranks)
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
                # Gradients that are summed need the scale 1.
                parameter.grad /= loss.gradient_scale  # type: ignore[operator]
        optimizer.step()
        losses.append(value.item())
    estimates = [loss.log_inner_image, loss.log_inner_text]
    if split:
        # A new loss takes the rows of this process from a checkpoint.
        again = InnerEstimator(3 * total, like=torch.zeros(1, dtype=torch.float64), ranks=ranks)
        ContrastiveLoss(3 * total, temperature=0.3, estimator=again, process_group=ranks.group).load_state_dict(
            {key: value for key, value in loss.state_dict().items() if key != "temperature"}
        )
        estimates = [x.flatten() for x in ranks.all_gather((again.log_inner_image, again.log_inner_text))]
    return {
        "loss": np.asarray(losses),
        "image": model.image.detach().numpy(),
        "text": model.text.detach().numpy(),
        "temperature": temperature.detach().numpy(),
        "log_inner_image": estimates[0].numpy(),
        "log_inner_text": estimates[1].numpy(),
    }


def calls(rank: int, num_ranks: int, process_group: Any = None) -> dict[str, np.ndarray]:
    """Return losses and gradients of single calls with the own rows of one batch; gradients are not averaged."""
    total = WORLD_SIZE * LOCAL
    p = problems.draw(0, b=total, d=4)
    rows = own_rows(torch.arange(total), rank, num_ranks)
    results: dict[str, np.ndarray] = {}
    for name, dtype in (("eval", torch.float64), ("no update", torch.float64), ("bfloat16", torch.bfloat16)):
        features = [own_rows(torch.from_numpy(x).to(dtype), rank, num_ranks).requires_grad_() for x in p.arrays[:2]]
        pair = [own_rows(torch.linspace(a, 0.7, total), rank, num_ranks).requires_grad_() for a in (0.3, 0.5)]
        loss = ContrastiveLoss(total, temperature=0.5, gamma=0.6, process_group=process_group, gradient_scale=1.0)
        loss.train(name != "eval")
        options: dict[str, Any] = {} if name == "eval" else {"temperature": tuple(pair)}
        value = loss(*features, rows, update=name != "no update", **options)
        value.backward()
        results[f"{name} loss"] = value.detach().numpy()
        results[f"{name} estimates"] = loss.log_inner_image.numpy()
        for place, x in enumerate([*features, *([] if name == "eval" else pair)]):
            results[f"{name} gradient {place}"] = x.grad.double().numpy()  # type: ignore[union-attr]
    return results


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
        "estimator": message(
            lambda: ContrastiveLoss(
                8,
                temperature=0.5,
                estimator=InnerEstimator(8, like=features.detach(), ranks=TorchRanks(dist.group.WORLD)),
            )
        ),
        "no tensor": message(lambda: loss(features.tolist() if rank else features, features, index)),
        "pairs": message(lambda: loss(features, features, index, temperature=(0.5,) if rank else 0.5)),
        "samples": message(
            lambda: ContrastiveLoss(8 + rank, temperature=0.5, process_group=dist.group.WORLD)(
                features, features, index
            )
        ),
        "training": message(lambda: loss.train(rank == 0)(features, features, index)),
        "update": message(lambda: loss.train()(features, features, index, update=rank == 0)),
        "open_clip": message(lambda: OpenClipLoss(loss)),
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
        shared = {"process_group": dist.group.WORLD, "gradient_scale": 1.0}
        results["everything/scale 1/plain"] = train("everything", rank, world_size, lambda m: m, total, **shared)
        shared = {"process_group": dist.group.WORLD, "split": True}
        results["everything/split/ddp"] = train(
            "everything", rank, world_size, DistributedDataParallel, total, **shared
        )
        results["calls"] = calls(rank, world_size, dist.group.WORLD)
        results["refusals"] = refusals(rank)
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
