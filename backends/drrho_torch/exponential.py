"""A faster exponential on the CPU for tiles, the squares into which the matrix of all pairs of a batch is cut."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def exp(x: Tensor, overwrite: bool) -> Tensor:
    """Return ``exp(x)`` as ``2^(x log2 e)``; if `overwrite` is True, `x` may be overwritten.

    torch computes exp with Intel's vector library, but exp2 with a kernel of its own, which takes a fifth of the time
    on an AMD processor. The product ``x log2 e`` has a rounding error of half a unit in the last place, as large as the
    error of the subtraction that computed `x`.
    """
    # Only the CPU kernels differ in speed.
    if x.device.type != "cpu":
        return torch.exp(x)
    # Allocating memory takes as long as computing the exponential, so `x` is overwritten if that is allowed.
    return (x.mul_(LOG2_E) if overwrite else x * LOG2_E).exp2_()
