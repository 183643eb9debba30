"""An asymmetric batch for the tests of drrho_torch.ContrastiveLoss, and the formulas, written for torch's autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from helpers.features import unit_rows

torch = pytest.importorskip("torch")

from drrho_torch import ContrastiveLoss  # noqa: E402

B, D, R, N = 5, 4, 3, 11
INDEX = [7, 0, 10, 4, 2]
UNIT = {torch.float64: 1e-12, torch.float32: 5e-6}


@dataclass
class Problem:
    """One asymmetric batch; two of its five samples were never visited."""

    images: Any
    texts: Any
    references: tuple[Any, Any]
    log_inner: tuple[Any, Any]  # (n,) each
    pair_mask: Any
    index: Any

    @classmethod
    def draw(cls, dtype: Any = torch.float64, seed: int = 0) -> Problem:
        generator = np.random.default_rng(seed)
        tensor = lambda values: torch.tensor(values, dtype=dtype)  # noqa: E731
        images, texts = unit_rows(generator, 2, B, D)
        references = unit_rows(generator, 2, B, R)
        states = generator.normal(-1.0, 1.5, (2, N))
        states[:, [0, 2, 5]] = -np.inf
        pair_mask = generator.random((B, B)) > 0.3
        pair_mask[3, :] = False  # an image without negatives
        return cls(
            tensor(images),
            tensor(texts),
            (tensor(references[0]), tensor(references[1])),
            (torch.tensor(states[0], dtype=dtype), torch.tensor(states[1], dtype=dtype)),
            torch.tensor(pair_mask),
            torch.tensor(INDEX),
        )

    def module(self, **options: Any) -> ContrastiveLoss:
        """Return the module with the state of this problem."""
        loss = ContrastiveLoss(N, **{"temperature": 0.3, "gamma": 0.7, **options})
        loss = loss.to(self.log_inner[0].dtype)
        loss.log_inner_image.copy_(self.log_inner[0])
        loss.log_inner_text.copy_(self.log_inner[1])
        return loss


@dataclass
class Written:
    """The formulas in the linear domain, evaluated once; torch's autograd differentiates ``surrogate``."""

    surrogate: Any
    log_inner: list[Any]
    value: float
    scale: float  # max |c_i| / 2b, the size of the terms of a feature gradient


def written_out(
    images: Any,
    texts: Any,
    temperature: Any,
    log_inner: tuple[Any, Any],
    *,
    gamma: float,
    eps: float = 0.0,
    radius: float = 0.0,
    references: tuple[Any, Any] | None = None,
    weight: float = 1.0,
    pair_mask: Any = None,
) -> Written:
    # Z = S - lambda R, and the mask of negatives, never the diagonal.
    b = images.shape[0]
    z = images @ texts.T
    if references is not None:
        z = z - weight * references[0] @ references[1].T
    negatives = ~torch.eye(b, dtype=torch.bool)
    if pair_mask is not None:
        negatives = negatives & pair_mask
    loss = surrogate = torch.zeros((), dtype=images.dtype)
    new, positive_weight = [], torch.zeros(b, dtype=images.dtype)
    for logits, of_these, log_u in ((z, negatives, log_inner[0]), (z.T, negatives.T, log_inner[1])):
        # One direction: exponents D, the mean g over the negatives, and the moving average u.
        count = of_these.sum(1)
        d = (logits - logits.diagonal()[:, None]) / temperature
        g = (d.exp() * of_these).sum(1) / count.clamp(min=1)
        active = count > 0
        old = log_u.exp()
        u = torch.where(old == 0, g, (1 - gamma) * old + gamma * g)
        new.append(torch.where(active, u.log(), log_u).detach())
        # u is a constant of the gradient, and so is the temperature in the term with g.
        frozen = u.detach()
        temperature_alone = temperature.detach() if isinstance(temperature, torch.Tensor) else temperature
        value = torch.where(active, (eps + frozen).log() + radius, 0.0)
        fresh = torch.where(active, g / (eps + frozen), 0.0)
        loss = loss + (temperature * value).sum() / (2 * b)
        surrogate = surrogate + (temperature * value + temperature_alone * fresh).sum() / (2 * b)
        # c_i, the sum of the weights of both anchors i, is the size of the terms of a feature gradient.
        w = d.exp() * of_these / ((eps + frozen) * count.clamp(min=1))[:, None]
        positive_weight = positive_weight + torch.nan_to_num(w).sum(1).detach()
    return Written(surrogate, new, float(loss.detach()), float(positive_weight.abs().max()) / (2 * b))


def bits(module: ContrastiveLoss) -> list[bytes]:
    return [side.numpy().tobytes() for side in (module.log_inner_image, module.log_inner_text)]


def trained(dtype: Any = torch.float32, **options: Any) -> tuple[Problem, ContrastiveLoss]:
    """Return a problem and a module after one step, whose state would change if it were rounded to float16."""
    problem = Problem.draw(dtype)
    module = problem.module(**options)
    module(problem.images, problem.texts, problem.index)
    assert not torch.equal(module.log_inner_image.half().to(dtype), module.log_inner_image)
    return problem, module
