"""Torch programs that `contrastive_step` is compared with: autograd through dense b x b matrices.

Do not train with them.
"""

from __future__ import annotations

import math

import torch
from drrho_torch import onednn_products as faster_products
from torch import Tensor

__all__ = ["cross_entropy", "dense_step", "faster_products", "held_bytes", "peak_bytes", "released_form", "synchronize"]

TEMPERATURE, GAMMA = 0.05, 0.9


def dense_step(
    images: Tensor, texts: Tensor, reference_images: Tensor, reference_texts: Tensor, log_inner: Tensor
) -> tuple[Tensor, ...]:
    """Take the step of `drrho_core.contrastive_step` directly from its formula; return the same values.

    Matrices are b x b; autograd gives the gradients of the features and of the temperature.
    """
    images, texts = images.detach().requires_grad_(), texts.detach().requires_grad_()
    temperature = torch.tensor(TEMPERATURE, device=images.device, requires_grad=True)
    excess = images @ texts.T - reference_images @ reference_texts.T
    positive = excess.diagonal()
    is_positive = torch.eye(len(images), dtype=torch.bool, device=images.device)
    loss, surrogate, states = torch.zeros(()), torch.zeros(()), []
    # Both directions: rows are image anchors, columns are text anchors; each subtracts the anchor's positive pair.
    for pairs, axis in ((excess - positive[:, None], 1), (excess - positive[None, :], 0)):
        logits = (pairs / temperature).masked_fill(is_positive, -torch.inf)
        log_own = torch.logsumexp(logits, dim=axis) - math.log(len(images) - 1)
        # u is the stored estimate of an anchor, g that of this batch: u' = (1 - gamma) u + gamma g, or g if u = 0.
        averaged = torch.logaddexp(log_inner + math.log1p(-GAMMA), log_own.detach() + math.log(GAMMA))
        log_new = torch.where(torch.isinf(log_inner), log_own.detach(), averaged)
        loss = loss + (temperature * log_new).mean() / 2
        # The derivative of this term is the derivative of the objective, if u' is a constant.
        surrogate = surrogate + (temperature.detach() * torch.exp(log_own - log_new)).mean() / 2
        states.append(log_new)
    gradients = torch.autograd.grad(loss + surrogate, (images, texts, temperature))
    return (*gradients, loss.detach(), (loss + surrogate).detach(), *states)


def released_form(
    images: Tensor, texts: Tensor, reference_images: Tensor, reference_texts: Tensor, log_inner: Tensor
) -> tuple[Tensor, ...]:
    """Take a step in the form of DRRho-CLIP's released program (commit 33d7364c); the code is ours.

    Each direction computes its own similarity matrices, so there are eight matrix products: four forward, and four in
    autograd's backward pass. Multiplication with a mask removes the diagonal. The loss is the sum of the excess
    similarities times weights that are constants for autograd. The temperature has no gradient.
    """
    images, texts = images.detach().requires_grad_(), texts.detach().requires_grad_()
    off_diagonal = 1.0 - torch.eye(len(images), device=images.device)
    loss, states = torch.zeros((), device=images.device), []
    for anchors, others, reference_anchors, reference_others in (
        (images, texts, reference_images, reference_texts),
        (texts, images, reference_texts, reference_images),
    ):
        similarity = anchors @ others.T
        excess = (similarity - similarity.diagonal()[:, None]) / TEMPERATURE
        similarity = reference_anchors @ reference_others.T
        excess = excess - (similarity - similarity.diagonal()[:, None]) / TEMPERATURE
        # The weights w_ij = exp(excess_ij) / u'_i, with the anchor's new estimate u'_i, are constants for autograd.
        with torch.no_grad():
            log_own = torch.logsumexp(excess + torch.log(off_diagonal), dim=1) - math.log(len(images))
            averaged = torch.logaddexp(log_inner + math.log1p(-GAMMA), log_own + math.log(GAMMA))
            log_new = torch.where(torch.isinf(log_inner), log_own, averaged)
            weights = torch.exp(excess - log_new[:, None])
        loss = loss + (excess * weights * off_diagonal).sum(dim=1).mean() / (len(images) - 1)
        states.append(log_new)
    return (*torch.autograd.grad(loss, (images, texts)), loss.detach(), *states)


def cross_entropy(images: Tensor, texts: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of CLIP's loss, cross-entropy of the logits over rows and over columns, by autograd."""
    images, texts = images.detach().requires_grad_(), texts.detach().requires_grad_()
    logits_per_image = images @ texts.T / TEMPERATURE
    logits_per_text = texts @ images.T / TEMPERATURE
    labels = torch.arange(len(images), device=images.device)
    each = torch.nn.functional.cross_entropy
    loss = (each(logits_per_image, labels) + each(logits_per_text, labels)) / 2
    return torch.autograd.grad(loss, (images, texts))


def synchronize(result: tuple[Tensor, ...]) -> None:
    """Wait until a result has been computed."""
    if result[0].is_cuda:
        torch.cuda.synchronize()


def peak_bytes() -> int | None:
    """Return the peak of the accelerator's memory in bytes since the last call; None on the host."""
    if not torch.cuda.is_available():
        return None
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak


def held_bytes() -> int:
    """Return the bytes that are in use on the accelerator now."""
    return int(torch.cuda.memory_allocated())
