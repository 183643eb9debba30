"""The end of a process: no thread of gloo outlives the group, because Python would abort if it ended first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

# The program makes all that holds a group: DDP, a loss with a split estimator, and an optimiser, which imports the
# module of torch that would hold the group until the end.
PROGRAM = """
import os
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from drrho_core import InnerEstimator
from drrho_torch import ContrastiveLoss, TorchRanks

def train():
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    images, captions = torch.nn.functional.normalize(model(torch.ones(8, 4))), torch.eye(8, 4)
    group = dist.group.WORLD
    estimator = InnerEstimator(8, like=captions, ranks=TorchRanks(group))
    loss = ContrastiveLoss(8, temperature=0.1, gamma=0.9, estimator=estimator, process_group=group)
    loss(images, captions, torch.arange(8)).backward()
    optimizer.step()

def threads():
    return [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
train()
assert any("runloop" in name for name in threads())
dist.destroy_process_group()
print(sum("runloop" in name for name in threads()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists the threads of a process")
def test_destroying_the_group_ends_the_threads_of_gloo() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
