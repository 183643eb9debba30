"""A stand-in for open_clip: model, loss, task and pairs for the training loops, small enough for seconds on a CPU.

The names and call signatures are those of open_clip (src/open_clip/loss.py, src/open_clip/task, src/open_clip_train),
so the loops of this folder read like open_clip's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pairs import SIDE, VOCABULARY
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

WIDTH = 32


class CLIP(nn.Module):
    """Two small towers and a learned scale; returns a tuple, or a dict as open_clip does with ``output_dict=True``."""

    def __init__(self, output_dict: bool = False) -> None:
        super().__init__()
        self.output_dict = output_dict
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.text = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        """Return both features, of unit norm, and the scale of the logits."""
        image_features = normalize(self.visual(image), dim=-1)
        text_features = normalize(self.text(self.tokens(text).sum(1)), dim=-1)
        if self.output_dict:
            return {
                "image_features": image_features,
                "text_features": text_features,
                "logit_scale": self.logit_scale.exp(),
            }
        return image_features, text_features, self.logit_scale.exp()


class ClipLoss(nn.Module):
    """CLIP's loss on the batch of one process."""

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool) -> Any:
        """Return the mean cross-entropy of both directions."""
        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits), device=logits.device)
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


class CLIPTask(nn.Module):
    """Model and loss together, the unit that open_clip 4 trains."""

    def __init__(self, model: nn.Module, *, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.trainable_module = model
        self.loss = ClipLoss() if loss is None else loss

    def prepare_batch(self, batch: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
        """Move a batch to the device."""
        return {name: value.to(device) for name, value in batch.items()}

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the losses and the numbers to report."""
        model_out = self.trainable_module(image=batch["image"], text=batch["text"])
        losses = self.loss(**model_out, output_dict=True)
        losses["loss"] = sum(value for name, value in losses.items() if name.endswith("_loss"))
        return losses, {"logit_scale": model_out["logit_scale"].detach()}

    def compute_accum_loss(
        self, inputs: Mapping[str, Tensor], inputs_no_accum: Mapping[str, Tensor], _: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the losses of features that were collected from several batches, and the numbers to report."""
        losses = self.loss(**inputs, **inputs_no_accum, output_dict=True)
        return losses, {"logit_scale": inputs_no_accum["logit_scale"].detach()}


class DataInfo:
    """A loader whose order of samples depends on the epoch."""

    def __init__(self, dataset: Dataset[Any], args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(args.seed)
        self.sampler: Any = RandomSampler(dataset, generator=generator)
        if args.world_size > 1:
            self.sampler = DistributedSampler(dataset, args.world_size, args.rank, seed=args.seed)
        self.dataloader = DataLoader(dataset, args.batch_size, sampler=self.sampler, drop_last=True)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(epoch)


def unwrap_model(model: Any) -> Any:
    """Return the model without its wrapper for several processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def backward(total_loss: Tensor, scaler: Any) -> None:
    """Run the backward pass; with a scaler, of the scaled loss."""
    (total_loss if scaler is None else scaler.scale(total_loss)).backward()  # type: ignore[no-untyped-call]


def finish_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, args: argparse.Namespace) -> None:
    """Clip the gradients, change the parameters, and keep the scale of the logits in its range."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    if args.grad_clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    with torch.no_grad():
        unwrap_model(model).logit_scale.clamp_(0, 4.6052)


def get_autocast(precision: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return a function that makes the context of mixed precision."""
    dtypes = {"amp": torch.float16, "amp_bf16": torch.bfloat16}
    if precision not in dtypes:
        return contextlib.nullcontext
    return lambda: torch.autocast("cpu", dtypes[precision])


def create_parts(args: argparse.Namespace, model: nn.Module) -> tuple[Any, torch.optim.Optimizer, Any, Any]:
    """Return the model in its wrapper for several processes, the optimiser, the scaler and the schedule."""
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[args.opt](model.parameters(), lr=args.lr)
    scaler = torch.amp.GradScaler("cpu") if args.precision == "amp" else None

    def scheduler(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / args.warmup)

    if args.world_size == 1:
        return model, optimizer, scaler, scheduler
    torch.distributed.init_process_group("gloo", args.dist_url, rank=args.rank, world_size=args.world_size)
    return DistributedDataParallel(model), optimizer, scaler, scheduler


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a run; rank and world size are those that torchrun sets."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train-data", default="pairs.npz")
    parser.add_argument("--checkpoint", default="checkpoint.pt")
    parser.add_argument("--resume", action="store_true")
    for name, value in (("--epochs", 8), ("--batch-size", 64), ("--accum-freq", 1), ("--warmup", 4), ("--seed", 0)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--opt", default="adamw", choices=("adamw", "sgd"))
    parser.add_argument("--grad-clip-norm", type=float)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "amp", "amp_bf16"))
    parser.add_argument("--dist-url", default="env://")
    args = parser.parse_args(arguments)
    args.rank, args.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = "cpu"
    return args
