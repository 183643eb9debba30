"""A training loop in the shape of open_clip 3.3 (src/open_clip_train/train.py and main.py), before the change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip_stand_in as open_clip
import torch
from pairs import write_pairs
from torch.utils.data import Dataset


class PairDataset(Dataset):
    """Images and captions."""

    def __init__(self, path):
        self.columns = dict(np.load(path))

    def __len__(self):
        return len(self.columns["images"])

    def __getitem__(self, idx):
        images, texts = self.columns["images"][idx], self.columns["captions"][idx]
        return images, texts


def postprocess_clip_output(model_out):
    """Name the parts of the model's output."""
    return {"image_features": model_out[0], "text_features": model_out[1], "logit_scale": model_out[2]}


def train_one_epoch(model, data, loss, epoch, optimizer, scaler, scheduler, args):
    """Train for one epoch; return the loss of each step."""
    autocast = open_clip.get_autocast(args.precision)
    model.train()
    data.set_epoch(epoch)
    dataloader = data.dataloader
    num_batches_per_epoch = len(dataloader) // args.accum_freq
    history = []

    if args.accum_freq > 1:
        accum_images, accum_texts, accum_features = [], [], {}

    for i, batch in enumerate(dataloader):
        scheduler(num_batches_per_epoch * epoch + i // args.accum_freq)
        images, texts = batch
        images = images.to(args.device)
        texts = texts.to(args.device)
        optimizer.zero_grad()

        if args.accum_freq == 1:
            with autocast():
                model_out = postprocess_clip_output(model(images, texts))
                losses = loss(**model_out, output_dict=True)
                total_loss = sum(losses.values())
            open_clip.backward(total_loss, scaler)
        else:
            # The features of all batches are collected without gradients.
            with torch.no_grad(), autocast():
                model_out = postprocess_clip_output(model(images, texts))
                model_out.pop("logit_scale")
                for key, value in model_out.items():
                    accum_features.setdefault(key, []).append(value)
            accum_images.append(images)
            accum_texts.append(texts)
            if (i + 1) % args.accum_freq > 0:
                continue

            # Each batch is encoded again, with gradients; the others are its negatives.
            for j in range(args.accum_freq):
                with autocast():
                    model_out = postprocess_clip_output(model(accum_images[j], accum_texts[j]))
                    inputs = {"logit_scale": model_out.pop("logit_scale")}
                    for key, cached in accum_features.items():
                        inputs[key] = torch.cat([*cached[:j], model_out[key], *cached[j + 1 :]])
                    losses = loss(**inputs, output_dict=True)
                    total_loss = sum(losses.values())
                open_clip.backward(total_loss, scaler)
            accum_images, accum_texts, accum_features = [], [], {}

        open_clip.finish_step(model, optimizer, scaler, args)
        history.append(total_loss.item())
    return history


def main(arguments=None):
    """Train and save; return the loss of each step."""
    args = open_clip.parse_args(arguments)
    if not Path(args.train_data).exists():
        write_pairs(args.train_data)
    torch.manual_seed(args.seed)
    model, optimizer, scaler, scheduler = open_clip.create_parts(args, open_clip.CLIP())
    dataset = PairDataset(args.train_data)
    data = open_clip.DataInfo(dataset, args)
    loss = open_clip.ClipLoss()
    start_epoch = 0
    if args.resume:
        checkpoint = torch.load(args.checkpoint)
        start_epoch = checkpoint["epoch"]
        open_clip.unwrap_model(model).load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    history = []
    for epoch in range(start_epoch, args.epochs):
        history += train_one_epoch(model, data, loss, epoch, optimizer, scaler, scheduler, args)
        print(f"epoch {epoch}: loss {history[-1]:.4f}")
        if args.rank == 0:
            checkpoint_dict = {
                "epoch": epoch + 1,
                "state_dict": open_clip.unwrap_model(model).state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(checkpoint_dict, args.checkpoint)
    return history


if __name__ == "__main__":
    main()
