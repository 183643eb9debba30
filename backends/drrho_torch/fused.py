"""The two sweeps of the contrastive objective as Triton kernels (docs/fused.md).

Shapes, stated once: b pairs, features (b, d), reference features (b, r), half types or float32. All sums are float32.

    z_ij = sum_k E1_ik E2_jk - lambda sum_k R1_ik R2_jk            row i = image, column j = text

`_negatives_kernel` makes one tile of z per program and leaves the maximum and the sum of exponentials of its rows and
its columns. `_weights_kernel` makes the tile again and leaves V = w + w' of the pairs in a buffer of ``panel`` x
``panel`` numbers. `_pull_kernel` multiplies that buffer with the features. A matrix of b x b never exists.

No program adds to what another one has written, so the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from drrho_core._fused import Batch, FirstSweep, SecondSweep

# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _add_product(
    acc: tl.tensor,  # (rows, columns) float32
    left: tl.tensor,  # (b, depth)
    right: tl.tensor,  # (b, depth)
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    DEPTH: tl.constexpr,  # how much of the depth is met at once
    EVEN: tl.constexpr,  # DEPTH divides the depth: loads need no mask
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies the bits of bfloat16 as integers
) -> tl.tensor:
    """Return ``acc + left[rows] right[columns]^T``."""
    k = tl.arange(0, DEPTH)
    left_tile = left + rows[:, None] * depth + k[None, :]
    right_tile = right + columns[None, :] * depth + k[:, None]
    for start in range(0, depth, DEPTH):
        if EVEN:
            a = tl.load(left_tile + start)
            c = tl.load(right_tile + start)
        else:
            a = tl.load(left_tile + start, mask=k[None, :] < depth - start, other=0.0)
            c = tl.load(right_tile + start, mask=k[:, None] < depth - start, other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            c = c.to(tl.float32)
        acc = tl.dot(a, c, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _tile(
    e1: tl.tensor,
    e2: tl.tensor,
    r1: tl.tensor,
    r2: tl.tensor,
    reference_weight: tl.tensor,  # (1,)
    mask: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    b: tl.tensor,
    d: tl.tensor,
    r: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_R: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Return a tile of z and which of its pairs are negatives."""
    # Rows past the end repeat the last one, so that loads need no mask there; they are no negatives below.
    safe_rows = tl.minimum(rows, b - 1)
    safe_columns = tl.minimum(columns, b - 1)
    z = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if HAS_REFERENCE:  # first, because then one accumulator is enough
        z = _add_product(z, r1, r2, safe_rows, safe_columns, r, DEPTH, EVEN_R, PRECISION, WIDEN)
        z = z * -tl.load(reference_weight)
    z = _add_product(z, e1, e2, safe_rows, safe_columns, d, DEPTH, EVEN_D, PRECISION, WIDEN)
    counts = (rows < b)[:, None] & (columns < b)[None, :] & (rows[:, None] != columns[None, :])
    if HAS_MASK:  # b * b may pass 2^31
        places = safe_rows.to(tl.int64)[:, None] * b + safe_columns[None, :]
        counts = counts & (tl.load(mask + places) != 0)
    return z, counts


@triton.jit
def _negatives_kernel(
    e1: tl.tensor,  # (b, d)
    e2: tl.tensor,  # (b, d)
    r1: tl.tensor,  # (b, r)
    r2: tl.tensor,  # (b, r)
    reference_weight: tl.tensor,  # (1,)
    mask: tl.tensor,  # (b, b)
    temperature_image: tl.tensor,  # (b,)
    temperature_text: tl.tensor,  # (b,)
    positive: tl.tensor,  # (b,)                      out: the diagonal of z
    peak_image: tl.tensor,  # (column tiles, panel)   out: the largest z of a row of the tile
    sum_image: tl.tensor,  # (column tiles, panel)    out: sum of exp((z - peak) / t) over it
    peak_text: tl.tensor,  # (row tiles, b)           out: the same of its columns
    sum_text: tl.tensor,  # (row tiles, b)            out
    first_row: tl.tensor,
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    panel: tl.tensor,
    b: tl.tensor,
    d: tl.tensor,
    r: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_R: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Sum the exponentials of one tile along its rows and along its columns."""
    program = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(
        program // column_tiles, program % column_tiles, row_tiles, column_tiles, GROUP
    )
    local_rows = row_tile * ROWS + tl.arange(0, ROWS)
    rows = first_row + local_rows
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    z, counts = _tile(
        e1, e2, r1, r2, reference_weight, mask, rows, columns, b, d, r,
        ROWS, COLUMNS, DEPTH, EVEN_D, EVEN_R, HAS_REFERENCE, HAS_MASK, PRECISION, WIDEN,
    )  # fmt: skip

    first = column_tile * COLUMNS
    top = first_row + row_tile * ROWS
    if (top < first + COLUMNS) & (first < top + ROWS):  # the diagonal passes through: one tile has each of its entries
        here = tl.sum(tl.where(rows[:, None] == columns[None, :], z, 0.0), axis=1)
        tl.store(positive + rows, here, mask=(rows >= first) & (rows < first + COLUMNS) & (rows < b))

    z = tl.where(counts, z, float("-inf"))
    t_image = tl.load(temperature_image + rows, mask=rows < b, other=1.0)
    t_text = tl.load(temperature_text + columns, mask=columns < b, other=1.0)
    row_peak = tl.max(z, axis=1)
    column_peak = tl.max(z, axis=0)
    # Where nothing counts the peak is -inf, and -inf - (-inf) would be nan.
    row_shift = tl.where(row_peak == float("-inf"), 0.0, row_peak)
    column_shift = tl.where(column_peak == float("-inf"), 0.0, column_peak)
    row_sum = tl.sum(tl.exp((z - row_shift[:, None]) * (1.0 / t_image)[:, None]), axis=1)
    column_sum = tl.sum(tl.exp((z - column_shift[None, :]) * (1.0 / t_text)[None, :]), axis=0)
    tl.store(peak_image + column_tile * panel + local_rows, row_peak)
    tl.store(sum_image + column_tile * panel + local_rows, row_sum)
    tl.store(peak_text + row_tile * b + columns, column_peak, mask=columns < b)
    tl.store(sum_text + row_tile * b + columns, column_sum, mask=columns < b)


@triton.jit
def _weights_kernel(
    e1: tl.tensor,  # (b, d)
    e2: tl.tensor,  # (b, d)
    r1: tl.tensor,  # (b, r)
    r2: tl.tensor,  # (b, r)
    reference_weight: tl.tensor,  # (1,)
    mask: tl.tensor,  # (b, b)
    temperature_image: tl.tensor,  # (b,)
    temperature_text: tl.tensor,  # (b,)
    positive: tl.tensor,  # (b,)
    log_denominator_image: tl.tensor,  # (b,)
    log_denominator_text: tl.tensor,  # (b,)
    v: tl.tensor,  # (panel, panel)                      out: w + w'
    weight_image: tl.tensor,  # (column tiles, panel)    out: sum of w over a row of the tile
    weighted_image: tl.tensor,  # (column tiles, panel)  out: sum of w D over it
    weight_text: tl.tensor,  # (row tiles, b)            out: the same of w', D' over its columns
    weighted_text: tl.tensor,  # (row tiles, b)          out
    first_row: tl.tensor,
    first_column: tl.tensor,
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    panel: tl.tensor,
    b: tl.tensor,
    d: tl.tensor,
    r: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_R: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Weigh the pairs of one tile."""
    program = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(
        program // column_tiles, program % column_tiles, row_tiles, column_tiles, GROUP
    )
    local_rows = row_tile * ROWS + tl.arange(0, ROWS)
    local_columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    rows = first_row + local_rows
    columns = first_column + local_columns
    z, counts = _tile(
        e1, e2, r1, r2, reference_weight, mask, rows, columns, b, d, r,
        ROWS, COLUMNS, DEPTH, EVEN_D, EVEN_R, HAS_REFERENCE, HAS_MASK, PRECISION, WIDEN,
    )  # fmt: skip

    # The positive is subtracted before the division, while the difference is exact.
    t_image = tl.load(temperature_image + rows, mask=rows < b, other=1.0)
    positive_image = tl.load(positive + rows, mask=rows < b, other=0.0)
    log_image = tl.load(log_denominator_image + rows, mask=rows < b, other=0.0)
    d_image = (z - positive_image[:, None]) * (1.0 / t_image)[:, None]
    w_image = tl.exp(tl.where(counts, d_image - log_image[:, None], float("-inf")))
    tile = first_column // COLUMNS + column_tile
    tl.store(weight_image + tile * panel + local_rows, tl.sum(w_image, axis=1))
    tl.store(weighted_image + tile * panel + local_rows, tl.sum(w_image * d_image, axis=1))

    t_text = tl.load(temperature_text + columns, mask=columns < b, other=1.0)
    positive_text = tl.load(positive + columns, mask=columns < b, other=0.0)
    log_text = tl.load(log_denominator_text + columns, mask=columns < b, other=0.0)
    d_text = (z - positive_text[None, :]) * (1.0 / t_text)[None, :]
    w_text = tl.exp(tl.where(counts, d_text - log_text[None, :], float("-inf")))
    tl.store(weight_text + row_tile * b + columns, tl.sum(w_text, axis=0), mask=columns < b)
    tl.store(weighted_text + row_tile * b + columns, tl.sum(w_text * d_text, axis=0), mask=columns < b)

    total = (w_image + w_text).to(v.dtype.element_ty)
    tl.store(v + local_rows[:, None] * panel + local_columns[None, :], total)  # 0 past the end: nothing counts there


@triton.jit
def _pull_kernel(
    v: tl.tensor,  # (rows, inner) by its two strides, 0 past the end
    features: tl.tensor,  # (b, d)
    out: tl.tensor,  # (b, d) float32                    in and out
    row_stride: tl.tensor,
    inner_stride: tl.tensor,
    first_row: tl.tensor,  # of `out`
    first_inner: tl.tensor,  # of `features`
    num_rows: tl.tensor,
    num_inner: tl.tensor,
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    d: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Add ``v features`` to some rows of `out`."""
    program = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(
        program // column_tiles, program % column_tiles, row_tiles, column_tiles, GROUP
    )
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    safe_rows = tl.minimum(rows, num_rows - 1)
    places = (first_row + rows)[:, None] * d + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < d)[None, :]
    acc = tl.load(out + places, mask=inside, other=0.0)
    v_tile = v + safe_rows[:, None] * row_stride + k[None, :] * inner_stride
    feature_tile = features + (first_inner + k)[:, None] * d + columns[None, :]
    for start in range(0, num_inner, DEPTH):
        a = tl.load(v_tile + start * inner_stride)
        c = tl.load(feature_tile + start * d, mask=(k < num_inner - start)[:, None] & (columns < d)[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            c = c.to(tl.float32)
        acc = tl.dot(a, c, acc, input_precision=PRECISION)
    tl.store(out + places, acc, mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# What runs them
# ---------------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """How large a tile is and who works on it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How one dtype is computed."""

    panel: int  # side of the buffer for V; a multiple of all blocks' rows and columns
    sweep: Blocks
    pull: Blocks
    buffer: torch.dtype  # of V
    sweep_precision: str
    pull_precision: str


PLANS = {
    # w is about 1 / b: too small for float16's exponent, so there V is float32 and multiplied as TensorFloat-32, which
    # has float16's significand. Plain float32 is never rounded to TensorFloat-32.
    torch.bfloat16: Plan(4096, Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 64, 8, 3), torch.bfloat16, "ieee", "ieee"),
    torch.float16: Plan(4096, Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 32, 8, 3), torch.float32, "ieee", "tf32"),
    torch.float32: Plan(4096, Blocks(64, 64, 32, 4, 2), Blocks(64, 64, 32, 4, 2), torch.float32, "ieee", "ieee"),
}
"""None of these sizes was tuned: for Hopper they compile, nearly without spilled registers; no more is known."""

GROUP = 8
"""Tiles are met in bands of so many rows, so that what a program loads is in the cache from the one before."""

SMALLEST = 1024
"""In the mode ``"auto"`` a smaller batch is left to the plain core."""


def interpreted() -> bool:
    """Tell whether Triton was asked to interpret its kernels (``TRITON_INTERPRET=1``), which works on the CPU."""
    return not isinstance(_pull_kernel, triton.JITFunction)


class TritonSweeps:
    """The sweeps on an NVIDIA GPU; see `drrho_core._fused.Sweeps`."""

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Say why not."""
        features = batch.image_features
        if features.dtype not in PLANS:
            return f"the Triton kernels take float32 and half types, not {features.dtype}"
        widest = max(array.shape[1] for array in (features, *(batch.reference_features or ())))
        if features.shape[0] * widest >= 2**31:
            return "the Triton kernels count in 32 bits"
        if not interpreted():
            if features.device.type != "cuda":
                return f"the Triton kernels run on an NVIDIA GPU, not on {features.device}"
            if torch.version.hip is not None or torch.cuda.get_device_capability(features.device)[0] < 8:
                return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or higher"
        if mode == "auto" and features.dtype == torch.float32:
            return "float32 has no faster product than the library's"
        if mode == "auto" and features.shape[0] < SMALLEST:
            return f"the batch is smaller than {SMALLEST}"
        return None

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Sweep once."""
        return _Run(batch).sum_negatives()

    def pull_back(
        self, batch: Batch, positive: Tensor, log_denominator_image: Tensor, log_denominator_text: Tensor, /
    ) -> SecondSweep:
        """Sweep again."""
        return _Run(batch).pull_back(positive, log_denominator_image, log_denominator_text)


class _Run:
    """One batch, as the kernels want it."""

    def __init__(self, batch: Batch) -> None:
        features = batch.image_features
        self.plan = PLANS[features.dtype]
        self.device = features.device
        self.e1, self.e2 = batch.image_features.contiguous(), batch.text_features.contiguous()
        self.mask = batch.pair_mask
        # A pointer that is not followed must be one all the same.
        self.r1, self.r2 = (self.e1, self.e2) if batch.reference_features is None else batch.reference_features
        self.r1, self.r2 = self.r1.contiguous(), self.r2.contiguous()
        weight = batch.reference_weight
        if isinstance(weight, Tensor):
            self.weight = weight.to(torch.float32).reshape(1)
        else:
            self.weight = self._full(weight, 1)
        self.temperatures = [
            side.to(torch.float32).contiguous() for side in (batch.temperature_image, batch.temperature_text)
        ]
        self.b, self.d = features.shape
        self.r = self.r1.shape[1]
        blocks = self.plan.sweep
        self.panels = range(0, self.b, self.plan.panel)
        self.row_tiles = triton.cdiv(min(self.b, self.plan.panel), blocks.rows)
        self.column_tiles = triton.cdiv(self.b, blocks.columns)
        self.panel = self.plan.panel
        mask = self.e1 if self.mask is None else self.mask.contiguous().view(torch.uint8)
        self.inputs = (self.e1, self.e2, self.r1, self.r2, self.weight, mask, *self.temperatures)
        self.options: dict[str, Any] = {
            "ROWS": blocks.rows,
            "COLUMNS": blocks.columns,
            "DEPTH": blocks.depth,
            "GROUP": GROUP,
            "EVEN_D": self.d % blocks.depth == 0,
            "EVEN_R": self.r % blocks.depth == 0,
            "HAS_REFERENCE": batch.reference_features is not None,
            "HAS_MASK": self.mask is not None,
            "PRECISION": self.plan.sweep_precision,
            "WIDEN": interpreted(),
            **_launch(blocks),
        }

    def sum_negatives(self) -> FirstSweep:
        """Sweep once: a launch per panel of rows, whose partial results are merged before the next."""
        positive = self._empty(self.b)
        peaks = [self._full(-torch.inf, self.b) for _ in range(2)]
        sums = [self._full(0.0, self.b) for _ in range(2)]
        by_row = [self._empty(self.column_tiles, self.panel) for _ in range(2)]
        by_column = [self._empty(self.row_tiles, self.b) for _ in range(2)]
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            for first in self.panels:
                rows = slice(first, min(first + self.panel, self.b))
                row_tiles = triton.cdiv(rows.stop - first, self.plan.sweep.rows)
                _negatives_kernel[(row_tiles * self.column_tiles,)](
                    *self.inputs, positive, *by_row, *by_column,
                    first, row_tiles, self.column_tiles, self.panel, self.b, self.d, self.r, **self.options,
                )  # fmt: skip
                height = rows.stop - first
                peaks[0][rows], sums[0][rows] = _merge(
                    by_row[0][:, :height], by_row[1][:, :height], self.temperatures[0][rows]
                )
                peaks[1], sums[1] = _merge(
                    torch.cat([peaks[1][None], by_column[0][:row_tiles]]),
                    torch.cat([sums[1][None], by_column[1][:row_tiles]]),
                    self.temperatures[1],
                )
        image, text = (
            torch.log(total) + (peak - positive) / temperature
            for total, peak, temperature in zip(sums, peaks, self.temperatures, strict=True)
        )
        count_image, count_text = self._counts()
        return FirstSweep(positive, image, text, count_image, count_text)

    def pull_back(self, positive: Tensor, log_denominator_image: Tensor, log_denominator_text: Tensor) -> SecondSweep:
        """Sweep again: square by square, and each square's V is multiplied with the features at once."""
        anchors = [x.to(torch.float32).contiguous() for x in (positive, log_denominator_image, log_denominator_text)]
        pulls = [self._full(0.0, self.b, self.d) for _ in range(2)]
        image = [self._empty(self.b) for _ in range(2)]
        text = [self._full(0.0, self.b) for _ in range(2)]
        side = min(self.panel, triton.cdiv(self.b, self._padding) * self._padding)
        v = torch.empty((side, side), dtype=self.plan.buffer, device=self.device)
        by_row = [self._empty(self.column_tiles, side) for _ in range(2)]
        by_column = [self._empty(self.row_tiles, self.b) for _ in range(2)]
        blocks = self.plan.sweep
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            for first_row in self.panels:
                num_rows = min(self.panel, self.b - first_row)
                row_tiles = triton.cdiv(num_rows, blocks.rows)
                for first_column in self.panels:
                    num_columns = min(self.panel, self.b - first_column)
                    column_tiles = triton.cdiv(num_columns, blocks.columns)
                    _weights_kernel[(row_tiles * column_tiles,)](
                        *self.inputs, *anchors, v, *by_row, *by_column,
                        first_row, first_column, row_tiles, column_tiles, side, self.b, self.d, self.r, **self.options,
                    )  # fmt: skip
                    self._pull(v, (side, 1), self.e2, pulls[0], first_row, first_column, num_rows, num_columns)
                    self._pull(v, (1, side), self.e1, pulls[1], first_column, first_row, num_columns, num_rows)
                for total, part in zip(image, by_row, strict=True):
                    total[first_row : first_row + num_rows] = part[:, :num_rows].sum(0)
                for total, part in zip(text, by_column, strict=True):
                    total += part[:row_tiles].sum(0)
        return SecondSweep(pulls[0], pulls[1], image[0], text[0], image[1], text[1])

    @property
    def _padding(self) -> int:
        """What V's sides are multiples of, so that its loads need no mask."""
        return max(*self.plan.sweep[:2], self.plan.pull.depth)

    def _pull(
        self,
        v: Tensor,
        strides: tuple[int, int],
        features: Tensor,
        out: Tensor,
        first_row: int,
        first_inner: int,
        num_rows: int,
        num_inner: int,
    ) -> None:
        blocks = self.plan.pull
        row_tiles, column_tiles = triton.cdiv(num_rows, blocks.rows), triton.cdiv(self.d, blocks.columns)
        _pull_kernel[(row_tiles * column_tiles,)](
            v, features, out, *strides, first_row, first_inner, num_rows, num_inner, row_tiles, column_tiles, self.d,
            ROWS=blocks.rows, COLUMNS=blocks.columns, DEPTH=blocks.depth, GROUP=GROUP,
            PRECISION=self.plan.pull_precision, WIDEN=interpreted() or v.dtype != features.dtype, **_launch(blocks),
        )  # fmt: skip

    def _counts(self) -> tuple[Tensor, Tensor]:
        if self.mask is None:
            number = self._full(self.b - 1.0, self.b)
            return number, number
        diagonal = self.mask.diagonal().to(torch.float32)
        image, text = (self.mask.sum(axis).to(torch.float32) - diagonal for axis in (1, 0))
        return image, text

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.float32, device=self.device)


def _launch(blocks: Blocks) -> dict[str, Any]:
    """Return what only the compiler wants; products and sums may be fused, which rounds less."""
    return {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}


def _merge(peaks: Tensor, sums: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Put partial maxima and sums (parts, n) together; -inf and 0 where nothing counts."""
    peak = peaks.amax(0)
    shift = torch.where(peak == -torch.inf, torch.zeros_like(peak), peak)
    return peak, (sums * torch.exp((peaks - shift) / temperature)).sum(0)
