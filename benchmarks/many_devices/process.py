"""One of the processes of `measure.in_processes`: measures the network, then steps with and without messages.

All processes measure at the same time, in rounds: exchanges of a few bytes and of many, the own work of a step without
messages, and the whole step. So the processes compete for the cores in every measurement alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
import torch.distributed as dist
from drrho_torch import TorchRanks
from torch import nn

from benchmarks.many_devices.counted_ranks import CountedRanks, StandIn
from drrho_clip.plan.exchanges import Message
from drrho_clip.plan.traffic import SharedStep, messages, received_bytes
from drrho_core import Ranks, sharded_contrastive_step
from drrho_core.contrastive.ranks import FORMS

PROBE = 1 << 22
"""Bytes of the sum that measures the bandwidth."""


class Sizes(NamedTuple):
    """The sizes of a step: the global batch, the inputs and the hidden units of both encoders, and their features."""

    batch: int = 1024
    inputs: int = 256
    hidden: int = 1024
    features: int = 128


def encoder(sizes: Sizes) -> nn.Module:
    """Return a perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(sizes.inputs, sizes.hidden), nn.ReLU(), nn.Linear(sizes.hidden, sizes.features))


class Trainer:
    """Takes steps on the own part of one batch, as a loop with a loss over ranks and no wrapper does."""

    def __init__(self, sizes: Sizes, num_ranks: int, form: str) -> None:
        torch.manual_seed(0)
        self.form = form
        self.encoders = nn.ModuleList([encoder(sizes), encoder(sizes)])
        self.parameters = list(self.encoders.parameters())
        num_local = sizes.batch // num_ranks
        self.inputs = [torch.randn(num_local, sizes.inputs) for _ in range(2)]
        self.estimates = torch.full((2, sizes.batch), -torch.inf)
        num_parameters = sum(parameter.numel() for parameter in self.parameters)
        self.sizes_of_step = SharedStep(
            num_ranks, num_local, sizes.features, form=form, estimates="rows", num_parameters=num_parameters
        )

    def step(self, ranks: Ranks) -> None:
        """Take one step: features, loss and gradients, the sum of gradients, the update, and the estimates."""
        features = [nn.functional.normalize(f(x)) for f, x in zip(self.encoders, self.inputs, strict=True)]
        own = slice(ranks.rank * len(self.inputs[0]), (ranks.rank + 1) * len(self.inputs[0]))
        result = sharded_contrastive_step(
            *(x.detach() for x in features),
            *self.estimates[:, own].clone(),
            ranks=ranks,
            form=self.form,
            temperature=0.07,
            gamma=0.9,
            xp=xp,
        )
        gradients = torch.autograd.grad(features, self.parameters, [result.image_gradient, result.text_gradient])
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, ranks.all_sum(gradients), strict=True):
                parameter -= 1e-3 * gradient
        rows = ranks.all_gather((result.log_inner_image, result.log_inner_text))
        for estimates, new in zip(self.estimates, rows, strict=True):
            estimates.copy_(new.flatten())


def few_bytes(ranks: Ranks, exchanges: Iterable[Message]) -> None:
    """Make all exchanges of a step, with a number for each rank instead of the arrays of the step."""
    for message in exchanges:
        for _ in range(message.times):
            getattr(ranks, message.operation)((torch.zeros(ranks.size),))


def timed(action: Callable[[], Any]) -> float:
    """Return the seconds of an action that all processes begin together."""
    dist.barrier()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def loopback() -> int:
    """Return how many bytes the loopback interface has received."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def measure(num_ranks: int, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Return the seconds of probes and steps, and the bytes of a step, as this process sees them."""
    ranks = TorchRanks(dist.group.WORLD)
    large = torch.zeros(PROBE // 4)
    stand_in = StandIn(num_ranks, xp)
    trainers = {form: Trainer(sizes, num_ranks, form) for form in FORMS}
    actions: dict[str, Callable[[], Any]] = {
        "large": lambda: ranks.all_sum((large,)),
    }
    for form, trainer in trainers.items():
        actions[f"{form} few bytes"] = partial(few_bytes, ranks, messages(trainer.sizes_of_step))
        actions[f"{form} alone"] = partial(trainer.step, stand_in)
        actions[f"{form} step"] = partial(trainer.step, ranks)
    # The first rounds start threads and fill caches.
    history = [{name: timed(action) for name, action in actions.items()} for _ in range(rounds + 2)][2:]
    found: dict[str, Any] = {"rounds": history, "probe": PROBE}
    for form, trainer in trainers.items():
        messenger = CountedRanks(ranks)
        dist.barrier()
        before = loopback()
        trainer.step(messenger)
        dist.barrier()
        found[form] = {
            "planned": received_bytes(trainer.sizes_of_step),
            "received": messenger.total,
            "exchanges": sum(messenger.calls.values()),
            "loopback": loopback() - before,
        }
    return found


def main() -> None:
    """Join the other processes, measure, and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.folder}/store-{options.size}",
        rank=options.rank,
        world_size=options.size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        found = measure(options.size, Sizes(), options.rounds)
        Path(options.folder, f"{options.size}-{options.rank}.json").write_text(json.dumps(found), encoding="utf-8")
        # Meanwhile the threads of gloo let go of the tensors of the last message; see docs/many-devices.md.
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
