"""The two sweeps of the contrastive objective as Triton kernels (docs/fused.md).

Shapes, stated once: b pairs, features (b, d), reference features (b, r), half types or float32. All sums are float32.

    z_ij = sum_k E1_ik E2_jk - lambda sum_k R1_ik R2_jk            row i = image, column j = text

`_sums_kernel` makes one tile of z per program. For each row and each column of the tile it writes the peak of z, the
total of ``exp((z - peak) / t)`` and the moment, the total of ``exp((z - peak) / t) (z - peak)``. `_merge_kernel` adds
them up per anchor. `_weights_kernel` makes the tile again and writes V = w + w' of a rectangle of pairs into a buffer,
and the library's own product multiplies the buffer with the features. A matrix of b x b never exists.

Both sweeps compute the same bits of z and the same exponentials, so the weights of an anchor add up to what they
should, however large 1/t is. No program adds to the results of another program, so the same inputs give the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from drrho_core.extend import Batch, FirstSweep, SecondSweep

NEVER = tl.constexpr(-3e38)
"""Stands for z of a pair that is no negative: below every logit, but finite, so that no difference becomes nan."""

# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _add_product(
    z: tl.tensor,  # (ROWS, COLUMNS) float32
    left: tl.tensor,  # (b, WIDTH), as a pointer or as a tensor descriptor
    right: tl.tensor,  # (b, WIDTH)
    top: tl.tensor,  # first row of the tile
    first: tl.tensor,  # first column of the tile
    b: tl.tensor,
    WIDTH: tl.constexpr,  # of the features, a multiple of DEPTH
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies the bits of bfloat16 as integers
) -> tl.tensor:
    """Return ``z + left right^T`` for one tile."""
    for start in range(0, WIDTH, DEPTH):
        if DESCRIPTORS:  # the copy engine fetches the blocks, and gives 0 for rows past the end
            a = left.load([top, start])
            c = right.load([first, start])
        else:  # rows past the end repeat the last row, so that loads need no mask
            rows = tl.minimum(top + tl.arange(0, ROWS), b - 1)
            columns = tl.minimum(first + tl.arange(0, COLUMNS), b - 1)
            k = start + tl.arange(0, DEPTH)
            a = tl.load(left + rows[:, None] * WIDTH + k[None, :])
            c = tl.load(right + columns[:, None] * WIDTH + k[None, :])
        if WIDEN:
            a = a.to(tl.float32)
            c = c.to(tl.float32)
        z = tl.dot(a, c.T, z, input_precision=PRECISION)
    return z


@triton.jit
def _tile(
    e1: tl.tensor,
    e2: tl.tensor,
    r1: tl.tensor,
    r2: tl.tensor,
    reference_weight: tl.tensor,  # (1,)
    top: tl.tensor,
    first: tl.tensor,
    b: tl.tensor,
    D: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Return a tile of z. Both sweeps call this function, so that they see the same bits."""
    z = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if HAS_REFERENCE:  # first, because then one accumulator is enough
        z = _add_product(z, r1, r2, top, first, b, R, ROWS, COLUMNS, DEPTH, DESCRIPTORS, PRECISION, WIDEN)
        z = z * -tl.load(reference_weight)
    return _add_product(z, e1, e2, top, first, b, D, ROWS, COLUMNS, DEPTH, DESCRIPTORS, PRECISION, WIDEN)


@triton.jit
def _negatives(
    mask: tl.tensor,  # (b, b)
    rows: tl.tensor,
    columns: tl.tensor,
    b: tl.tensor,
    HAS_MASK: tl.constexpr,
) -> tl.tensor:
    """Return which pairs of a tile are negatives."""
    counts = (rows < b)[:, None] & (columns < b)[None, :] & (rows[:, None] != columns[None, :])
    if HAS_MASK:  # b * b may pass 2^31
        places = tl.minimum(rows, b - 1).to(tl.int64)[:, None] * b + tl.minimum(columns, b - 1)[None, :]
        counts = counts & (tl.load(mask + places) != 0)
    return counts


@triton.jit
def _sums_kernel(
    e1: tl.tensor,  # (b, d)
    e2: tl.tensor,  # (b, d)
    r1: tl.tensor,  # (b, r)
    r2: tl.tensor,  # (b, r)
    reference_weight: tl.tensor,  # (1,)
    mask: tl.tensor,  # (b, b)
    scale_image: tl.tensor,  # (b,)                       log2(e) / t
    scale_text: tl.tensor,  # (b,)
    positive: tl.tensor,  # (b,)                          out: the diagonal of z
    image_parts: tl.tensor,  # (3, column tiles, panel)   out: peak, total, moment of each row of each tile
    text_parts: tl.tensor,  # (3, row tiles, b)           out: the same of each column
    first_row: tl.tensor,
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    panel: tl.tensor,
    image_plane: tl.tensor,  # numbers from one of the three to the next
    text_plane: tl.tensor,
    b: tl.tensor,
    D: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Sum the exponentials of one tile along its rows and along its columns."""
    program = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(
        program // column_tiles, program % column_tiles, row_tiles, column_tiles, GROUP
    )
    top = first_row + row_tile * ROWS
    first = column_tile * COLUMNS
    z = _tile(
        e1, e2, r1, r2, reference_weight, top, first, b, D, R,
        ROWS, COLUMNS, DEPTH, HAS_REFERENCE, DESCRIPTORS, PRECISION, WIDEN,
    )  # fmt: skip
    local_rows = row_tile * ROWS + tl.arange(0, ROWS)
    rows = first_row + local_rows
    columns = first + tl.arange(0, COLUMNS)

    # Few tiles meet the diagonal or the end of the batch; only those pay for a mask.
    on_diagonal = (top < first + COLUMNS) & (first < top + ROWS)
    if on_diagonal:
        here = tl.sum(tl.where(rows[:, None] == columns[None, :], z, 0.0), axis=1)
        tl.store(positive + rows, here, mask=(rows >= first) & (rows < first + COLUMNS) & (rows < b))
    if HAS_MASK:  # noqa: SIM114 (Triton decides this when it compiles)
        z = tl.where(_negatives(mask, rows, columns, b, HAS_MASK), z, NEVER)
    elif on_diagonal | (top + ROWS > b) | (first + COLUMNS > b):
        z = tl.where(_negatives(mask, rows, columns, b, HAS_MASK), z, NEVER)

    # The peak is subtracted before the scale: a difference of close numbers is exact, a product with 1/t is not.
    row_scale = tl.load(scale_image + rows, mask=rows < b, other=0.0)
    row_peak = tl.max(z, axis=1)
    x = z - row_peak[:, None]
    e = tl.exp2(x * row_scale[:, None])
    at = image_parts + column_tile * panel + local_rows
    tl.store(at, row_peak)
    tl.store(at + image_plane, tl.sum(e, axis=1))
    tl.store(at + 2 * image_plane, tl.sum(e * x, axis=1))

    column_scale = tl.load(scale_text + columns, mask=columns < b, other=0.0)
    column_peak = tl.max(z, axis=0)
    x = z - column_peak[None, :]
    e = tl.exp2(x * column_scale[None, :])
    at = text_parts + row_tile * b + columns
    tl.store(at, column_peak, mask=columns < b)
    tl.store(at + text_plane, tl.sum(e, axis=0), mask=columns < b)
    tl.store(at + 2 * text_plane, tl.sum(e * x, axis=0), mask=columns < b)


@triton.jit
def _merge_kernel(
    parts: tl.tensor,  # (3, number of parts, row stride)   peaks, totals and moments of tiles
    state: tl.tensor,  # (3, b)                             in and out: the same of anchors, over the tiles so far
    scale: tl.tensor,  # (b,)
    number: tl.tensor,  # of parts
    stride: tl.tensor,
    plane: tl.tensor,
    first: tl.tensor,  # anchor of the first part
    count: tl.tensor,  # of anchors
    b: tl.tensor,
    PARTS: tl.constexpr,
    ANCHORS: tl.constexpr,
) -> None:
    """Merge the parts of some anchors in the order of the tiles, as a softmax over a stream does."""
    local = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    inside = local < count
    anchors = first + local
    c = tl.load(scale + anchors, mask=inside, other=0.0)
    peak = tl.load(state + anchors, mask=inside, other=NEVER)
    total = tl.load(state + b + anchors, mask=inside, other=0.0)
    moment = tl.load(state + 2 * b + anchors, mask=inside, other=0.0)
    start = 0
    while start < number:  # the interpreter takes no bound of a `for` that is known at run time only
        k = start + tl.arange(0, PARTS)
        there = (k < number)[:, None] & inside[None, :]
        at = parts + k[:, None] * stride + local[None, :]
        part_peak = tl.load(at, mask=there, other=NEVER)
        part_total = tl.load(at + plane, mask=there, other=0.0)
        part_moment = tl.load(at + 2 * plane, mask=there, other=0.0)
        new = tl.maximum(peak, tl.max(part_peak, axis=0))
        # Relative to the new peak: e^(z - new) = e^(z - old) f, and sum e (z - new) = f (moment + total (old - new)).
        # A peak of NEVER has f = 0; bounded, its distance makes no infinity that 0 would turn into nan.
        down = peak - new
        f = tl.exp2(down * c)
        moment = f * (moment + total * tl.maximum(down, -1e30))
        total = f * total
        part_down = part_peak - new[None, :]
        f = tl.exp2(part_down * c[None, :])
        moment += tl.sum(f * (part_moment + part_total * tl.maximum(part_down, -1e30)), axis=0)
        total += tl.sum(f * part_total, axis=0)
        peak = new
        start += PARTS
    tl.store(state + anchors, peak, mask=inside)
    tl.store(state + b + anchors, total, mask=inside)
    tl.store(state + 2 * b + anchors, moment, mask=inside)


@triton.jit
def _weights_kernel(
    e1: tl.tensor,  # (b, d)
    e2: tl.tensor,  # (b, d)
    r1: tl.tensor,  # (b, r)
    r2: tl.tensor,  # (b, r)
    reference_weight: tl.tensor,  # (1,)
    mask: tl.tensor,  # (b, b)
    image_anchors: tl.tensor,  # (4, b)   peak, scale, weight / total, the last also relative to the shared peak
    text_anchors: tl.tensor,  # (4, b)
    shared: tl.tensor,  # (3,)            1 if one peak and one scale are shared by all anchors, this peak, this scale
    v: tl.tensor,  # (rows, width)        out: w + w', as a pointer or as a tensor descriptor
    first_row: tl.tensor,
    first_column: tl.tensor,
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    width: tl.tensor,
    b: tl.tensor,
    D: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SHARED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BUFFER: tl.constexpr,
) -> None:
    """Weigh the pairs of one tile, unless the other variant of this kernel is the one for the batch."""
    if (tl.load(shared) == 0.0) == SHARED:
        return
    program = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(
        program // column_tiles, program % column_tiles, row_tiles, column_tiles, GROUP
    )
    top = first_row + row_tile * ROWS
    first = first_column + column_tile * COLUMNS
    z = _tile(
        e1, e2, r1, r2, reference_weight, top, first, b, D, R,
        ROWS, COLUMNS, DEPTH, HAS_REFERENCE, DESCRIPTORS, PRECISION, WIDEN,
    )  # fmt: skip
    rows = top + tl.arange(0, ROWS)
    columns = first + tl.arange(0, COLUMNS)
    if SHARED:  # one exponential serves both directions: all anchors have one peak and one scale
        e = tl.exp2((z - tl.load(shared + 1)) * tl.load(shared + 2))
        row_factor = tl.load(image_anchors + 3 * b + rows, mask=rows < b, other=0.0)
        column_factor = tl.load(text_anchors + 3 * b + columns, mask=columns < b, other=0.0)
        w = e * (row_factor[:, None] + column_factor[None, :])
    else:  # the exponentials of the first sweep, divided by their own total
        row_peak = tl.load(image_anchors + rows, mask=rows < b, other=0.0)
        row_scale = tl.load(image_anchors + b + rows, mask=rows < b, other=0.0)
        row_factor = tl.load(image_anchors + 2 * b + rows, mask=rows < b, other=0.0)
        w = tl.exp2((z - row_peak[:, None]) * row_scale[:, None]) * row_factor[:, None]
        column_peak = tl.load(text_anchors + columns, mask=columns < b, other=0.0)
        column_scale = tl.load(text_anchors + b + columns, mask=columns < b, other=0.0)
        column_factor = tl.load(text_anchors + 2 * b + columns, mask=columns < b, other=0.0)
        w += tl.exp2((z - column_peak[None, :]) * column_scale[None, :]) * column_factor[None, :]

    # Beyond the negatives an exponential may be infinite and a factor nan; the mask comes last and removes them.
    if HAS_MASK:  # noqa: SIM114
        w = tl.where(_negatives(mask, rows, columns, b, HAS_MASK), w, 0.0)
    elif ((top < first + COLUMNS) & (first < top + ROWS)) | (top + ROWS > b) | (first + COLUMNS > b):
        w = tl.where(_negatives(mask, rows, columns, b, HAS_MASK), w, 0.0)
    w = w.to(BUFFER)
    if DESCRIPTORS:
        v.store([row_tile * ROWS, column_tile * COLUMNS], w)
    else:
        local_rows = row_tile * ROWS + tl.arange(0, ROWS)
        local_columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(v + local_rows[:, None] * width + local_columns[None, :], w)


# ---------------------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """How large a tile is and how many threads work on it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How one dtype is computed on one generation of GPUs."""

    sums: Blocks
    weights: Blocks  # of the same depth: both sweeps have to see the same bits of z
    masked: Blocks  # of both sweeps where there is a mask, which takes registers
    panel: int  # rows of one launch of the first sweep
    rows: int  # of the buffer for V, at most
    columns: int  # of the buffer for V, at most: as many as let V^T E1 fill the GPU once
    buffer: torch.dtype  # of V
    descriptors: bool  # load and store through the copy engine
    shared: bool  # spare the second exponential of a pair in the second sweep where the batch allows it


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
_SMALL = Blocks(128, 128, 32, 8, 3)
_NARROW = {
    dtype: plan
    if dtype == torch.float32
    else plan._replace(sums=_SMALL, weights=_SMALL, masked=_SMALL, rows=8192, columns=4096, descriptors=False)
    for dtype, plan in _WIDE.items()
}
PLANS: dict[int, dict[torch.dtype, Plan]] = {8: _NARROW, 9: _WIDE}
"""By major compute capability; a later generation takes the last one. Those for Hopper were measured on an H100: no
other plan of `tools/tune_fused.py` was faster by more than 2 %, see docs/benchmarks/gpu/tune.json. Those for Ampere
compile.
"""

GROUP = 8
"""Tiles are met in bands of so many rows, so that what a program loads is in the cache from the one before."""

SMALLEST = 2048
"""In the mode ``"auto"`` a smaller batch is left to the plain core: the launches of all kernels take milliseconds."""

SPREAD = 120.0
"""How many powers of two all peaks of a batch may span if one peak is to serve all exponentials."""

LOG2_E = math.log2(math.e)

# ---------------------------------------------------------------------------------------------------------------------
# What runs them
# ---------------------------------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Tell whether Triton was asked to interpret its kernels (``TRITON_INTERPRET=1``), which works on the CPU."""
    return not isinstance(_sums_kernel, triton.JITFunction)


def plan_for(dtype: torch.dtype, device: torch.device) -> Plan:
    """Return the constants for a dtype on a device."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else max(PLANS)
    return PLANS[max(known for known in PLANS if known <= major)][dtype]


class TritonSweeps:
    """The sweeps on an NVIDIA GPU; see `drrho_core.extend.Sweeps`.

    Parameters
    ----------
    plan : Plan or None, default: None
        Constants to use in place of those in `PLANS`; for measurements.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Say why not."""
        features = batch.image_features
        if features.dtype not in _WIDE:
            return f"the Triton kernels take float32 and half types, not {features.dtype}"
        widest = max(array.shape[1] for array in (features, *(batch.reference_features or ())))
        if features.shape[0] * (widest + 64) >= 2**31:
            return "the Triton kernels count in 32 bits"
        if not interpreted():
            if features.device.type != "cuda":
                return f"the Triton kernels run on an NVIDIA GPU, not on {features.device}"
            if torch.version.hip is not None or torch.cuda.get_device_capability(features.device)[0] < min(PLANS):
                return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or higher"
        if mode == "auto" and features.dtype == torch.float32:
            return "float32 has no faster product than the library's"
        if mode == "auto" and features.shape[0] < SMALLEST:
            return f"the batch is smaller than {SMALLEST}"
        return None

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Sweep once."""
        return self._run(batch).sum_negatives()

    def pull_back(self, batch: Batch, first: FirstSweep, weight_image: Tensor, weight_text: Tensor, /) -> SecondSweep:
        """Sweep again."""
        return self._run(batch).pull_back(first, (weight_image, weight_text))

    def _run(self, batch: Batch) -> _Run:
        features = batch.image_features
        return _Run(batch, self._plan or plan_for(features.dtype, features.device))


class _Run:
    """One batch, as the kernels take it."""

    def __init__(self, batch: Batch, plan: Plan) -> None:
        if batch.pair_mask is not None:
            plan = plan._replace(sums=plan.masked, weights=plan.masked)
        self.plan = plan
        self.device = batch.image_features.device
        self.b, self.d = batch.image_features.shape
        self.features = batch.image_features.detach(), batch.text_features.detach()
        reference = batch.reference_features
        if reference is not None and reference[0].shape[1] == 0:
            reference = None
        self.has_reference = reference is not None
        # An argument that is not read must be a pointer all the same.
        sides = (*self.features, *(self.features if reference is None else reference))
        self.sides = [_padded(side.detach(), plan.sums.depth) for side in sides]
        weight = batch.reference_weight
        if isinstance(weight, Tensor):
            self.weight = weight.detach().to(torch.float32).reshape(1)
        else:
            self.weight = self._full(weight, 1)
        self.temperatures = [
            side.detach().to(torch.float32).contiguous() for side in (batch.temperature_image, batch.temperature_text)
        ]
        # A temperature below 4e-39 has no reciprocal; the largest number keeps (z - peak) / t at 0 for the peak.
        largest = torch.finfo(torch.float32).max
        self.scales = [(LOG2_E / side).clamp(max=largest) for side in self.temperatures]
        self.pair_mask = batch.pair_mask
        self.mask = self.weight if self.pair_mask is None else self.pair_mask.contiguous().view(torch.uint8)

    def sum_negatives(self) -> FirstSweep:
        """Sweep once: a launch per panel of rows, whose parts are merged before the next launch."""
        b, blocks = self.b, self.plan.sums
        panel = min(self.plan.panel, triton.cdiv(b, blocks.rows) * blocks.rows)
        row_tiles, column_tiles = triton.cdiv(panel, blocks.rows), triton.cdiv(b, blocks.columns)
        sources, positive = self._sources(blocks), self._empty(b)
        image_parts, text_parts = self._empty(3, column_tiles, panel), self._empty(3, row_tiles, b)
        states = [torch.stack([self._full(NEVER.value, b), self._full(0.0, b), self._full(0.0, b)]) for _ in range(2)]
        with self._on_device():
            for first in range(0, b, panel):
                height = min(panel, b - first)
                rows_here = triton.cdiv(height, blocks.rows)
                _sums_kernel[(rows_here * column_tiles,)](
                    *sources, self.weight, self.mask, *self.scales, positive, image_parts, text_parts,
                    first, rows_here, column_tiles, panel, column_tiles * panel, row_tiles * b,
                    b, **self._options(blocks),
                )  # fmt: skip
                self._merge(image_parts, column_tiles, states[0], self.scales[0], first, height)
                self._merge(text_parts, rows_here, states[1], self.scales[1], 0, b)
        counts = self._counts()
        log_sums, means, saved = [], [], []
        for (peak, total, moment), t, count in zip(states, self.temperatures, counts, strict=True):
            has = count > 0
            peak, total = torch.where(has, peak, positive), torch.where(has, total, 1.0)
            start = peak - positive
            log_sums.append(torch.where(has, start / t + torch.log(total), -torch.inf))
            means.append(torch.where(has, (start + moment / total) / t, 0.0))
            saved += [peak, total]
        return FirstSweep(log_sums[0], log_sums[1], means[0], means[1], counts[0], counts[1], tuple(saved))

    def pull_back(self, first: FirstSweep, weights: tuple[Tensor, Tensor]) -> SecondSweep:
        """Sweep again: rectangle by rectangle, and each V is multiplied with the features at once."""
        b, blocks, plan = self.b, self.plan.weights, self.plan
        peaks, totals = first.saved[::2], first.saved[1::2]
        weights = weights[0].detach().to(torch.float32), weights[1].detach().to(torch.float32)
        factors = [weight / total for weight, total in zip(weights, totals, strict=True)]
        back = None
        if plan.buffer == torch.float16:  # a power of two brings the largest w near the largest float16
            # V is at most the largest factor of each side together, because an exponential is at most 1.
            bound = factors[0].amax() + factors[1].amax()
            power = torch.where(bound > 0, torch.floor(torch.log2(32768.0 / bound)), 0.0).clamp(-100.0, 100.0)
            factors, back = [factor * torch.exp2(power) for factor in factors], torch.exp2(-power)
        shared_factors, shared = self._share(peaks, factors, (first.count_image, first.count_text))
        anchors = [torch.stack(x) for x in zip(peaks, self.scales, factors, shared_factors, strict=True)]

        # The interpreter truncates where a GPU rounds to bfloat16; there V stays float32 until torch has rounded it.
        buffer = torch.float32 if interpreted() else plan.buffer
        # Whole tiles are stored, so the buffer is a whole number of them.
        heights = spans_of(b, plan.rows, blocks.rows)
        widths = spans_of(b, plan.columns, 128 if blocks.columns >= 128 else blocks.columns)
        width = triton.cdiv(widths[0][1], blocks.columns) * blocks.columns
        height = triton.cdiv(heights[0][1], blocks.rows) * blocks.rows
        v = torch.empty((height, width), dtype=buffer, device=self.device)
        out = _descriptor(v, (blocks.rows, blocks.columns)) if plan.descriptors else v
        sources, pulls = self._sources(blocks), (self._full(0.0, b, self.d), self._full(0.0, b, self.d))
        with self._on_device():
            for first_row, height in heights:
                for first_column, across in widths:
                    row_tiles, column_tiles = triton.cdiv(height, blocks.rows), triton.cdiv(across, blocks.columns)
                    # Which variant is the right one is known on the device alone: the other returns at once.
                    for variant in (True, False) if plan.shared else (False,):
                        _weights_kernel[(row_tiles * column_tiles,)](
                            *sources, self.weight, self.mask, *anchors, shared, out,
                            first_row, first_column, row_tiles, column_tiles, width, b,
                            SHARED=variant, BUFFER=_TRITON_TYPES[buffer], **self._options(blocks),
                        )  # fmt: skip
                    rows, columns = slice(first_row, first_row + height), slice(first_column, first_column + across)
                    here = v[:height, :across]
                    add_product(pulls[0][rows], here, self.features[1][columns])
                    add_product(pulls[1][columns], here.T, self.features[0][rows])
        if back is not None:
            for pull in pulls:
                pull.mul_(back)
        return SecondSweep(*pulls)

    def _share(
        self, peaks: tuple[Tensor, ...], factors: list[Tensor], counts: tuple[Tensor, Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Return the factors relative to one peak and whether they may be used, without waiting for the device.

        With one temperature, ``exp((z - peak_i) / t) f_i = exp((z - peak) / t) a_i``: one exponential serves rows and
        columns. It neither overflows nor loses the largest weight of any anchor while all peaks are close together.
        """
        if not self.plan.shared:
            return factors, self._full(0.0, 3)
        active = [(count > 0) & (factor > 0) for count, factor in zip(counts, factors, strict=True)]
        low = torch.minimum(*(torch.where(a, p, torch.inf).amin() for a, p in zip(active, peaks, strict=True)))
        # Pairs of anchors without weight have exponentials too: the highest peak is that of all anchors with negatives.
        high = torch.maximum(*(torch.where(n > 0, p, -torch.inf).amax() for n, p in zip(counts, peaks, strict=True)))
        ends = [end for t in self.temperatures for end in (t.amin(), t.amax())]
        scale = self.scales[0][0]
        middle = low + (high - low) / 2
        safe = (ends[0] == ends[1]) & (ends[2] == ends[3]) & (ends[0] == ends[2]) & ((high - low) * scale <= SPREAD)
        moved = [
            torch.where(a, factor * torch.exp2((middle - peak) * scale), 0.0)
            for a, factor, peak in zip(active, factors, peaks, strict=True)
        ]
        return moved, torch.stack([safe.to(torch.float32), middle, scale])

    def _merge(self, parts: Tensor, number: int, state: Tensor, scale: Tensor, first: int, count: int) -> None:
        _, places, stride = parts.shape
        _merge_kernel[(triton.cdiv(count, 64),)](
            parts, state, scale, number, stride, places * stride, first, count, self.b,
            PARTS=16, ANCHORS=64, num_warps=4,
        )  # fmt: skip

    def _sources(self, blocks: Blocks) -> list[Any]:
        """Return the features as a kernel loads them."""
        if not self.plan.descriptors:
            return list(self.sides)
        sizes = (blocks.rows, blocks.columns) * 2
        return [_descriptor(side, (size, blocks.depth)) for side, size in zip(self.sides, sizes, strict=True)]

    def _options(self, blocks: Blocks) -> dict[str, Any]:
        return {
            "D": self.sides[0].shape[1],
            "R": self.sides[2].shape[1],
            "ROWS": blocks.rows,
            "COLUMNS": blocks.columns,
            "DEPTH": blocks.depth,
            "GROUP": GROUP,
            "HAS_REFERENCE": self.has_reference,
            "HAS_MASK": self.pair_mask is not None,
            "DESCRIPTORS": self.plan.descriptors,
            "PRECISION": "ieee",
            "WIDEN": interpreted(),
            **launch_options(blocks),
        }

    def _counts(self) -> tuple[Tensor, Tensor]:
        if self.pair_mask is None:
            number = self._full(self.b - 1.0, self.b)
            return number, number
        diagonal = self.pair_mask.diagonal().to(torch.float32)
        image, text = (self.pair_mask.sum(axis).to(torch.float32) - diagonal for axis in (1, 0))
        return image, text

    def _on_device(self) -> Any:
        return torch.cuda.device(self.device if self.device.type == "cuda" else -1)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.float32, device=self.device)


_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch_options(blocks: Blocks) -> dict[str, Any]:
    """Return the compiler's options; products and sums may be fused, which rounds less."""
    return {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}


def add_product(out: Tensor, v: Tensor, features: Tensor) -> None:
    """Add ``v features`` to `out` in float32: on a GPU from half types as they are."""
    if v.device.type != "cuda":  # no CPU multiplies half types into float32
        out.addmm_(v.to(features.dtype).to(torch.float32), features.to(torch.float32))
    elif v.dtype == torch.float32:
        out.addmm_(v, features)
    else:
        _half_product(v.device)(out, v, features)


@functools.cache
def _half_product(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Return how this torch adds a product of half types to a float32 sum: in cuBLAS, or in two steps."""

    def in_one(out: Tensor, v: Tensor, features: Tensor) -> None:
        torch.addmm(out, v, features, out_dtype=torch.float32, out=out)

    def in_two(out: Tensor, v: Tensor, features: Tensor) -> None:
        out += torch.mm(v, features, out_dtype=torch.float32)

    probe = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
    out = torch.zeros((16, 16), dtype=torch.float32, device=device)
    try:
        in_one(out, probe, probe.T)
    except (RuntimeError, TypeError, NotImplementedError):
        return in_two
    return in_one if bool(torch.all(out == 16.0)) else in_two


def _padded(side: Tensor, depth: int) -> Tensor:
    """Return features with a whole number of the kernels' steps, contiguous; most widths are one already."""
    missing = -side.shape[1] % depth
    return torch.nn.functional.pad(side, (0, missing)) if missing else side.contiguous()


def _descriptor(x: Tensor, block: tuple[int, int]) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def spans_of(b: int, largest: int, unit: int) -> list[tuple[int, int]]:
    """Cut b into spans of nearly the same length, a multiple of `unit`; return where each starts and its length."""
    length = triton.cdiv(triton.cdiv(b, triton.cdiv(b, largest)), unit) * unit
    return [(start, min(length, b - start)) for start in range(0, b, length)]
