"""A faster exponential for tiles on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def exp(x: Tensor, overwrite: bool) -> Tensor:
    """Return ``exp(x)``; overwrite `x` if that is allowed and faster.

    torch gives exp to Intel's vector library, but exp2 to its own, which takes a fifth of the time on an AMD processor.
    Scaling `x` costs half a unit in its last place, as much as the difference that `x` is costs already.
    """
    if x.device.type != "cpu":
        return torch.exp(x)
    return (x.mul_(LOG2_E) if overwrite else x * LOG2_E).exp2_()
