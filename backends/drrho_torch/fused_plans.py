"""Constants of the Triton kernels: sizes of tiles and buffers for each dtype and each generation of GPUs.

A sweep computes z, the b x b matrix of similarities of a batch, tile by tile. The first sweep sums exponentials, the
second sweep computes V, the weights of the pairs, and multiplies V with the features E1 and E2. One program (an
instance of a kernel) computes one tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Blocks(NamedTuple):
    """The size of the tile that one program computes, and the number of threads that work on the tile."""

    rows: int  # rows of the tile
    columns: int  # columns of the tile
    depth: int  # columns of the features that are loaded at a time
    warps: int  # groups of 32 threads
    stages: int  # blocks of features that are loaded ahead


class Plan(NamedTuple):
    """Constants of the sweeps for one dtype on one generation of GPUs."""

    sums: Blocks  # of the first sweep
    weights: Blocks  # has the same depth as `sums`, because both sweeps have to compute the same bits of z
    masked: Blocks  # replaces `sums` and `weights` if there is a pair mask, because a mask needs registers
    panel: int  # rows of z that one launch of the first sweep computes
    rows: int  # largest number of rows of the buffer for V
    columns: int  # largest number of columns of the buffer for V; docs/fused.md explains the choice for Hopper
    buffer: torch.dtype  # dtype of the buffer for V
    descriptors: bool  # True: load and store through the GPU's copy engine
    shared: bool  # True: the second sweep computes one exponential per pair instead of two, if the batch allows it


# Hopper has a copy engine and 227 KiB of shared memory per block. Float32 uses smaller tiles and no tensor cores,
# because these kernels never round to TensorFloat-32.
_WIDE = {
    torch.bfloat16: Plan(
        sums=Blocks(256, 128, 64, 8, 3),
        weights=Blocks(256, 128, 64, 8, 3),
        masked=Blocks(128, 128, 64, 8, 3),
        panel=16384,
        rows=16384,
        columns=5632,
        buffer=torch.bfloat16,
        descriptors=True,
        shared=True,
    ),
    torch.float32: Plan(
        sums=Blocks(64, 64, 32, 4, 2),
        weights=Blocks(64, 64, 32, 4, 2),
        masked=Blocks(64, 64, 32, 4, 2),
        panel=4096,
        rows=4096,
        columns=4096,
        buffer=torch.float32,
        descriptors=False,
        shared=False,
    ),
}
_WIDE[torch.float16] = _WIDE[torch.bfloat16]._replace(buffer=torch.float16)
# Ampere has less shared memory and no copy engine.
_SMALL = Blocks(128, 128, 32, 8, 3)
_NARROW = {
    dtype: plan
    if dtype == torch.float32
    else plan._replace(sums=_SMALL, weights=_SMALL, masked=_SMALL, rows=8192, columns=4096, descriptors=False)
    for dtype, plan in _WIDE.items()
}
PLANS: dict[int, dict[torch.dtype, Plan]] = {8: _NARROW, 9: _WIDE}
"""Plans by major compute capability and dtype; a later generation of GPUs uses the last entry. The plans for Hopper (9)
were measured on an H100: no other plan of `tools/tune_fused.py` was faster by more than 2 %, see
docs/benchmarks/gpu/tune.json. The plans for Ampere (8) compile, but their speed was not measured.
"""

GROUP = 8
"""Number of rows of tiles in a band. Programs visit the tiles band by band, so that the cache still holds most of the
features that the next program loads."""

SMALLEST = 2048
"""Smallest batch for the kernels in the mode ``"auto"``. The plain core computes smaller batches, because launching all
kernels takes milliseconds."""

SPREAD = 120.0
"""The peak of an anchor (an image or a text) is the largest z of a negative pair. If the peaks of a batch,
multiplied by log2(e) / temperature, differ by at most this number, all anchors can share one peak."""


def plan_for(dtype: torch.dtype, device: torch.device) -> Plan:
    """Return the constants for a dtype on a device."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else max(PLANS)
    return PLANS[max(known for known in PLANS if known <= major)][dtype]


def launch_options(blocks: Blocks) -> dict[str, Any]:
    """Return the compiler's options; a product and a sum may be fused, which rounds once instead of twice."""
    return {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
