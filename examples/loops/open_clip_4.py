"""A training loop in the shape of open_clip 4 (src/open_clip_train/train.py and main.py), with DRRho's loss in it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import open_clip_stand_in as open_clip
import torch
from drrho_torch import ContrastiveLoss, OpenClipLoss
from pairs import write_pairs
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset


class PairDataset(Dataset):
    """Images and captions."""

    def __init__(self, path):
        self.columns = dict(np.load(path))

    def __len__(self):
        return len(self.columns["images"])

    def __getitem__(self, idx):
        return {
            "image": self.columns["images"][idx],
            "text": self.columns["captions"][idx],
            "sample_index": idx,
        }


def train_step(task, batch, accum_state, optimizer, scaler, autocast, args):
    """Take a step, or collect a batch of a step with accumulated gradients; return the losses or None."""
    optimizer.zero_grad()
    if args.accum_freq == 1:
        with autocast():
            losses, report = task(batch)
        open_clip.backward(losses["loss"], scaler)
        open_clip.finish_step(task.trainable_module, optimizer, scaler, args)
        return losses, report

    # The features of all batches are collected without gradients.
    accum_batches, accum_features = accum_state
    with torch.no_grad(), autocast():
        model_out = task.trainable_module(**batch)
        model_out.pop("logit_scale")
        for key, value in model_out.items():
            accum_features.setdefault(key, []).append(value)
    accum_batches.append(batch)
    if len(accum_batches) < args.accum_freq:
        return None

    # Each batch is encoded again, with gradients; the others are its negatives.
    for j, batch_j in enumerate(accum_batches):
        synchronise = j == args.accum_freq - 1 or not isinstance(task.trainable_module, DistributedDataParallel)
        with nullcontext() if synchronise else task.trainable_module.no_sync():
            with autocast():
                model_out = task.trainable_module(**batch_j)
                inputs_no_accum = {"logit_scale": model_out.pop("logit_scale")}
                inputs = {}
                for key, cached in accum_features.items():
                    inputs[key] = torch.cat([*cached[:j], model_out[key], *cached[j + 1 :]])
                losses, report = task.compute_accum_loss(inputs, inputs_no_accum, accum_batches)
                losses["loss"] = sum(value for name, value in losses.items() if name.endswith("_loss"))
            open_clip.backward(losses["loss"], scaler)
    accum_batches.clear()
    accum_features.clear()
    open_clip.finish_step(task.trainable_module, optimizer, scaler, args)
    return losses, report


def train_one_epoch(task, data, epoch, optimizer, scaler, scheduler, args):
    """Train for one epoch; return the loss of each step."""
    autocast = open_clip.get_autocast(args.precision)
    task.train()
    data.set_epoch(epoch)
    task.loss.set_epoch(epoch)
    dataloader = data.dataloader
    num_batches_per_epoch = len(dataloader) // args.accum_freq
    accum_state = [], {}
    history = []
    for i, batch in enumerate(dataloader):
        scheduler(num_batches_per_epoch * epoch + i // args.accum_freq)
        batch = task.prepare_batch(batch, args.device)
        task.loss.announce(batch.pop("sample_index"))
        result = train_step(task, batch, accum_state, optimizer, scaler, autocast, args)
        if result is not None:
            losses, _ = result
            history.append(losses["loss"].item())
    return history


def main(arguments=None):
    """Train and save; return the loss of each step."""
    args = open_clip.parse_args(arguments)
    if not Path(args.train_data).exists():
        write_pairs(args.train_data)
    torch.manual_seed(args.seed)
    model, optimizer, scaler, scheduler = open_clip.create_parts(args, open_clip.CLIP(output_dict=True))
    dataset = PairDataset(args.train_data)
    data = open_clip.DataInfo(dataset, args)
    contrastive_loss = ContrastiveLoss(len(dataset), temperature=0.07, radius=2.0)
    loss = OpenClipLoss(contrastive_loss, reference=tuple(np.load(args.train_data + ".npy")), num_epochs=args.epochs)
    task = open_clip.CLIPTask(model, loss=loss)
    start_epoch = 0
    if args.resume:
        checkpoint = torch.load(args.checkpoint)
        start_epoch = checkpoint["epoch"]
        open_clip.unwrap_model(model).load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        loss.load_state_dict(checkpoint["loss"])
    history = []
    for epoch in range(start_epoch, args.epochs):
        history += train_one_epoch(task, data, epoch, optimizer, scaler, scheduler, args)
        print(f"epoch {epoch}: loss {history[-1]:.4f}")
        if args.rank == 0:
            checkpoint_dict = {
                "epoch": epoch + 1,
                "state_dict": open_clip.unwrap_model(model).state_dict(),
                "optimizer": optimizer.state_dict(),
                "loss": loss.state_dict(),
            }
            torch.save(checkpoint_dict, args.checkpoint)
    return history


if __name__ == "__main__":
    main()
