"""A torch loop on W processes; a checkpoint is continued by any number of processes that divides BATCH.

torchrun --nproc-per-node 2 ddp.py pairs.npz checkpoints 16
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from drrho_torch import ContrastiveLoss, TorchRanks
from open_clip_stand_in import CLIP
from torch.nn.parallel import DistributedDataParallel

from drrho_core import InnerEstimator, load_shards, save_shards

BATCH = 64  # the pairs of all processes


def train(columns, folder, num_steps):
    """Train until `num_steps` steps are done, from the last checkpoint of `folder`; return the losses."""
    rank, size, n = dist.get_rank(), dist.get_world_size(), len(columns[0])
    model = DistributedDataParallel(CLIP().to(columns[0].device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    group = dist.group.WORLD
    estimator = InnerEstimator(n, like=columns[0], ranks=TorchRanks(group))  # n / W rows on each process
    options = {"temperature": 0.07, "gamma": 0.9, "radius": 2.0, "estimator": estimator}
    contrastive_loss = ContrastiveLoss(n, **options, process_group=group)
    step, history = load(folder, model.module, optimizer, estimator), []
    while step < num_steps:
        epoch, place = divmod(step, n // BATCH)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch))  # the same on all processes
        rows = order[BATCH * place : BATCH * (place + 1)].chunk(size)[rank].to(columns[0].device)
        images, captions, *reference = (column[rows] for column in columns)
        image_features, text_features, scale = model(images, captions)
        options = {"temperature": 1 / scale, "reference_features": tuple(reference)}
        loss = contrastive_loss(image_features, text_features, rows, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        step += 1
    save(folder, step, model.module, optimizer, estimator)
    return history


def save(folder, step, model, optimizer, estimator):
    """Write a checkpoint; all processes call this function."""
    target = Path(folder) / f"{step:06}"
    save_shards(estimator, target, step=step)  # returns when all processes have written
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, target / "partial")
        os.replace(target / "partial", target / "model.pt")  # a folder with this file is whole


def load(folder, model, optimizer, estimator):
    """Load the last checkpoint, which any number of processes has written; return the number of steps taken."""
    last = max(Path(folder).glob("*/model.pt"), key=lambda path: int(path.parent.name), default=None)
    if last is None:
        return 0
    state = torch.load(last, map_location=estimator.log_inner_image.device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return load_shards(estimator, last.parent)  # each process reads the own rows


def main(path, folder, num_steps):
    """Train on the pairs of a file; return the losses."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    pairs = np.load(path)
    columns = (pairs["images"], pairs["captions"], *np.load(f"{path}.npy"))
    torch.manual_seed(0)
    return train([torch.from_numpy(column).to(device) for column in columns], folder, num_steps)


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    losses = main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    if dist.get_rank() == 0:
        print(losses)
    dist.destroy_process_group()
