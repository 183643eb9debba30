"""Checkpoints of torch.distributed.checkpoint that one number of processes writes and other numbers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from drrho_torch import ContrastiveLoss, ShardedState, TorchRanks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from drrho_core import InnerEstimator, PerSampleTemperature

WRITERS = 4
SIZES = (9, 10, 36)
"""Numbers of samples; four processes store 3 + 3 + 3 + 0, 3 + 3 + 3 + 1 and 9 + 9 + 9 + 9 rows."""


def rows(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the estimates of all samples, each of which is another number; sample 1 was never visited."""
    ids = torch.arange(num_samples, dtype=torch.float64)
    image, text = -torch.pi * ids, torch.e * ids - 7
    image[1] = text[1] = -torch.inf
    return image, text


def temperatures() -> dict[str, torch.Tensor]:
    """Return a state of the table of temperatures."""
    names = ("temperature_image", "temperature_text", "momentum_image", "momentum_text")
    steps = torch.linspace(0.1, 0.9, SIZES[1], dtype=torch.float64)
    return {name: steps**power for power, name in enumerate(names, start=1)}


class Everything:
    """A loss and a table of temperatures per size, and a model with an optimizer, which FSDP2 shards."""

    def __init__(self, group: Any) -> None:
        ranks = None if group is None else TorchRanks(group)
        like = torch.zeros(1, dtype=torch.float64)
        self.losses = {
            size: ContrastiveLoss(
                size,
                temperature=nn.Parameter(torch.tensor([0.5], dtype=torch.float64)),
                estimator=InnerEstimator(size, like=like, ranks=ranks),
                process_group=group,
            )
            for size in SIZES
        }
        self.temperatures = PerSampleTemperature(SIZES[1], 0.5, like=like, ranks=ranks)
        self.model = nn.Linear(3, 5, dtype=torch.float64)
        if group is not None:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = torch.optim.Adam(self.model.parameters())
        # The checkpoint needs the moments of the optimizer, which the first step makes.
        self.model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
        self.optimizer.step()

    def fill(self) -> None:
        """Write known numbers into everything."""
        for size, loss in self.losses.items():
            image, text = rows(size)
            loss.load_state_dict(
                {"temperature": torch.tensor([0.25]), "log_inner_image": image, "log_inner_text": text}
            )
        version = self.temperatures.state_dict()["version"]
        self.temperatures.load_state_dict({"version": version, **temperatures()})

    def state(self) -> dict[str, Any]:
        """Return what DCP saves and loads."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "temperatures": ShardedState(self.temperatures),
            **{f"loss {size}": ShardedState(loss) for size, loss in self.losses.items()},
        }

    def values(self) -> dict[str, Any]:
        """Return the own rows and whole parameters, for a comparison."""
        found: dict[str, Any] = {}
        for size, loss in self.losses.items():
            found[f"rows {size}"] = loss.estimator.state_dict()
            found[f"temperature {size}"] = loss.temperature.detach().clone()
        found["temperatures"] = self.temperatures.state_dict()
        moments = self.optimizer.state[self.model.weight]["exp_avg"]
        for name, value in {"weight": self.model.weight.detach(), "moments": moments}.items():
            found[name] = value.full_tensor() if hasattr(value, "full_tensor") else value
        return found


def save(folder: Path) -> dict[str, Any]:
    """Save everything on this process and its peers."""
    everything = Everything(dist.group.WORLD)
    everything.fill()
    dcp.save(everything.state(), checkpoint_id=folder)
    return everything.values()


def load(folder: Path, group: Any) -> dict[str, Any]:
    """Load everything on this process and its peers; the group is None for one process."""
    everything = Everything(group)
    state = everything.state()
    dcp.load(state, checkpoint_id=folder, no_dist=group is None)
    set_state_dict(
        everything.model, everything.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return everything.values()
