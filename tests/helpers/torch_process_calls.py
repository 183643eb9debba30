"""Single calls of the loss on processes that share a batch, and calls that all of them refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from drrho_torch import ContrastiveLoss, OpenClipLoss, TorchRanks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from drrho_core import InnerEstimator
from helpers import problems
from helpers.ranks import own_rows

WORLD_SIZE, LOCAL = 2, 4


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


def message(call: Callable[[], Any]) -> str:
    """Return the message of the error that a call raises."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def refusals(rank: int) -> dict[str, str]:
    """Return the message of each wrong call."""

    features = torch.eye(LOCAL + 2)[:LOCAL].requires_grad_()
    index = torch.arange(LOCAL) + LOCAL * rank
    loss = ContrastiveLoss(8, temperature=0.5, process_group=dist.group.WORLD)
    before = loss.log_inner_image.clone()
    dtensor = DTensor.from_local(torch.ones(1), init_device_mesh("cpu", (WORLD_SIZE,)), [Shard(0)])
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
        "no pairs": message(lambda: loss(*[features[: LOCAL * (1 - rank)]] * 2, index[: LOCAL * (1 - rank)])),
        "form": message(lambda: ContrastiveLoss(8, temperature=0.5, form="tree")),
        "group": message(lambda: ContrastiveLoss(8, temperature=0.5, process_group="world")),
        "pickle": message(lambda: pickle.dumps(loss)),
        "DTensor": message(lambda: loss(dtensor if rank else features, features, index)),
        "DTensor as temperature": message(lambda: loss(features, features, index, temperature=dtensor)),
    }
    assert torch.equal(loss.log_inner_image, before)
    # The group of a single process does not contain the other one.
    others = [dist.new_group([place]) for place in range(WORLD_SIZE)]
    outside = {"group": others[1 - rank], "mesh": DeviceMesh("cpu", [1 - rank])}
    wrong |= {
        f"outside of the {kind}": message(lambda group=group: ContrastiveLoss(8, temperature=0.5, process_group=group))
        for kind, group in outside.items()
    }
    mine = dist.new_group(list(range(WORLD_SIZE)))
    destroyed = ContrastiveLoss(8, temperature=0.5, process_group=mine)
    dist.destroy_process_group(mine)
    return wrong | {"destroyed": message(lambda: destroyed(features, features, index))}


def other_groups() -> str:
    """Return the message about rows that are split along one axis of a mesh, for batches shared along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    rows, batch = mesh["shard"], mesh["replicate"]
    estimator = InnerEstimator(8, like=torch.zeros(1), ranks=TorchRanks(rows))
    # A loss whose processes share the rows is built without an error.
    ContrastiveLoss(8, temperature=0.5, estimator=estimator, process_group=rows)
    return message(lambda: ContrastiveLoss(8, temperature=0.5, estimator=estimator, process_group=batch))


def compiled_refusals(rank: int) -> dict[str, str]:
    """Return the messages of a compiled loss, which runs the whole step, checks included, as in eager mode."""
    loss = ContrastiveLoss(8, temperature=0.5, process_group=dist.group.WORLD)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    features = torch.eye(LOCAL + 2)[:LOCAL]
    compiled(features, features, torch.arange(LOCAL) + LOCAL * rank)
    before = loss.log_inner_image.clone()
    found = {
        "same id": message(lambda: compiled(features, features, torch.arange(LOCAL) + 3 * rank)),
        "range": message(lambda: compiled(features, features, torch.arange(LOCAL) + LOCAL * rank + 2)),
        "sizes": message(lambda: compiled(*[features[: LOCAL - rank]] * 2, torch.arange(LOCAL - rank) + LOCAL * rank)),
    }
    assert torch.equal(loss.log_inner_image, before)
    return found


def copies(rank: int) -> dict[str, Any]:
    """Return what copies of a loss do: they share the group, and have a state of their own."""
    features = torch.eye(LOCAL + 2)[:LOCAL]
    index = torch.arange(LOCAL) + LOCAL * rank
    results: dict[str, Any] = {}
    for kind in ("replicated", "split"):
        estimator = None
        if kind == "split":
            estimator = InnerEstimator(8, like=features, ranks=TorchRanks(dist.group.WORLD))
        loss = ContrastiveLoss(8, temperature=0.5, gamma=0.5, estimator=estimator, process_group=dist.group.WORLD)
        twin = copy.deepcopy(loss)
        loss(features, features, index)
        unchanged = (twin.log_inner_image if estimator is None else twin.estimator.log_inner_image).max()
        value = twin.to("cpu").double()(features, features, index)
        results[kind] = {
            "group": twin.process_group is loss.process_group,
            "unchanged": unchanged.item(),
            "value": value.item(),
            "moved": copy.deepcopy(loss).to("meta").process_group is loss.process_group,
        }
    return results
