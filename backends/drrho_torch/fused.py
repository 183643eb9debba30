"""Both sweeps over all pairs of a batch as Triton kernels (docs/fused.md); a sweep (or pass) visits each pair once.

Names: b pairs; image features E1 and text features E2, (b, d) each; z, the b x b matrix of similarities, with images as
rows and texts as columns. Each image and each text is an anchor, with a temperature t. The texts of other pairs are the
negatives of an image, with weights w_ij; the images of other pairs are the negatives of a text, with weights w'_ij.

The kernels are in `drrho_torch.fused_kernels`, the constants in `drrho_torch.fused_plans`. Pass 1 launches one kernel
per panel, a range of rows of z, and merges the results into sums per anchor. Pass 2 computes V = w + w' for a rectangle
of z into a buffer, and torch's own product multiplies the buffer with the features. No b x b matrix is ever in memory.

Both sweeps compute the same bits of z and the same exponentials, so the weights of an anchor have the right sum for
every temperature t. No program (an instance of a kernel) adds to the results of another program, so the same inputs
always give the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from drrho_core.extend import Batch, FirstSweep, SecondSweep
from drrho_torch.fused_kernels import NEVER, merge_kernel, sums_kernel, weights_kernel
from drrho_torch.fused_plans import GROUP, PLANS, SMALLEST, SPREAD, Blocks, Plan, launch_options, plan_for

LOG2_E = math.log2(math.e)


def interpreted() -> bool:
    """Tell whether Triton interprets the kernels (``TRITON_INTERPRET=1``), which works on the CPU."""
    return not isinstance(sums_kernel, triton.JITFunction)


class TritonSweeps:
    """The sweeps on an NVIDIA GPU; see `drrho_core.extend.Sweeps`.

    Parameters
    ----------
    plan : Plan or None, default: None
        Constants that replace those of `drrho_torch.fused_plans.PLANS`, for measurements.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Return the reason why these kernels do not take this batch, or None if they take it."""
        features = batch.image_features
        if features.dtype not in TRITON_TYPES:
            return f"the Triton kernels take float32 and half types, not {features.dtype}"
        widest = max(array.shape[1] for array in (features, *(batch.reference_features or ())))
        # The kernels compute positions in a feature array as 32-bit integers. Padding adds fewer than 64 columns.
        if features.shape[0] * (widest + 64) >= 2**31:
            return "the Triton kernels need feature arrays of fewer than 2**31 numbers, padding included"
        if not interpreted():
            if features.device.type != "cuda":
                return f"the Triton kernels run on an NVIDIA GPU, not on {features.device}"
            if torch.version.hip is not None or torch.cuda.get_device_capability(features.device)[0] < min(PLANS):
                return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or higher"
        if mode == "auto" and features.dtype == torch.float32:
            return "the Triton kernels multiply float32 no faster than torch"
        if mode == "auto" and features.shape[0] < SMALLEST:
            return f"the batch is smaller than {SMALLEST}"
        return None

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Run pass 1: return sums over the negatives of each anchor."""
        return self._run(batch).sum_negatives()

    def pull_back(self, batch: Batch, first: FirstSweep, weight_image: Tensor, weight_text: Tensor, /) -> SecondSweep:
        """Run pass 2: return V E2 and V^T E1."""
        return self._run(batch).pull_back(first, (weight_image, weight_text))

    def block_sums(self, batch: Batch, paired: bool, /) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Run pass 1 on a block of a batch that ranks share; see `drrho_core.extend.BlockSweeps`."""
        return self._run(batch, paired).block_sums()

    def pull_block(
        self, batch: Batch, paired: bool, sums: tuple[tuple[Tensor, Tensor], ...], weights: tuple[Tensor, Tensor], /
    ) -> SecondSweep:
        """Run pass 2 on a block."""
        return self._run(batch, paired).pull_block(sums, weights)

    def _run(self, batch: Batch, paired: bool = True) -> _Run:
        features = batch.image_features
        return _Run(batch, self._plan or plan_for(features.dtype, features.device), paired)


class _Run:
    """One batch, or one block of a batch that ranks share, in the form in which the kernels take it."""

    def __init__(self, batch: Batch, plan: Plan, paired: bool = True) -> None:
        self.paired = paired
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
        # Without reference features a kernel does not read the arguments r1 and r2, but the launch needs arrays for
        # them, so the features are passed once more.
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
        # The scale log2(e) / t makes exp((z - m) / t) a power of two; m is the peak, the largest z of an anchor. For a
        # temperature below 4e-39 the scale would overflow, so the largest float32 replaces the scale. The exponent of
        # z = m is then still 0.
        largest = torch.finfo(torch.float32).max
        self.scales = [(LOG2_E / side).clamp(max=largest) for side in self.temperatures]
        self.pair_mask = batch.pair_mask
        self.mask = self.weight if self.pair_mask is None else self.pair_mask.contiguous().view(torch.uint8)

    def sum_negatives(self) -> FirstSweep:
        """Run pass 1."""
        states, positive = self._sums()
        # Totals and moments are relative to the peak m. Relative to the positive z_ii, with D_ij = (z_ij - z_ii) / t:
        # log sum_j exp(D_ij) = (m - z_ii) / t + log total, and the mean of D_ij with weights exp(D_ij) is
        # (m - z_ii + moment / total) / t. For an anchor without negatives the two numbers are -inf and 0.
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

    def block_sums(self) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Run pass 1 and return the sums of each anchor relative to the peak of the block."""
        (states, positive), counts = self._sums(), self._counts()
        image, text = (
            (
                torch.where(count > 0, peak, 0.0),
                torch.where(count > 0, total, 0.0),
                torch.where(count > 0, moment / total / t, 0.0),
                None if self.pair_mask is None else count,
                positive if self.paired else None,
            )
            for (peak, total, moment), t, count in zip(states, self.temperatures, counts, strict=True)
        )
        return image, text

    def _sums(self) -> tuple[list[Tensor], Tensor]:
        """Return peak, total and moment of both directions' anchors, (3, b) each, and the positives.

        There is one launch per panel of rows; the results of a panel are merged before the next launch.
        """
        b, blocks = self.b, self.plan.sums
        panel = min(self.plan.panel, triton.cdiv(b, blocks.rows) * blocks.rows)
        row_tiles, column_tiles = triton.cdiv(panel, blocks.rows), triton.cdiv(b, blocks.columns)
        sources, positive = self._sources(blocks), self._empty(b)
        # Peak, total and moment (see `sums_kernel`) of each row and column of each tile, and of each anchor so far.
        image_parts, text_parts = self._empty(3, column_tiles, panel), self._empty(3, row_tiles, b)
        states = [torch.stack([self._full(NEVER.value, b), self._full(0.0, b), self._full(0.0, b)]) for _ in range(2)]
        with self._on_device():
            for first in range(0, b, panel):
                height = min(panel, b - first)
                rows_here = triton.cdiv(height, blocks.rows)
                sums_kernel[(rows_here * column_tiles,)](
                    *sources, self.weight, self.mask, *self.scales, positive, image_parts, text_parts,
                    first, rows_here, column_tiles, panel, column_tiles * panel, row_tiles * b,
                    b, **self._options(blocks),
                )  # fmt: skip
                self._merge(image_parts, column_tiles, states[0], self.scales[0], first, height)
                self._merge(text_parts, rows_here, states[1], self.scales[1], 0, b)
        return states, positive

    def pull_back(self, first: FirstSweep, weights: tuple[Tensor, Tensor]) -> SecondSweep:
        """Run pass 2."""
        peaks, totals = first.saved[::2], first.saved[1::2]
        weights = weights[0].detach().to(torch.float32), weights[1].detach().to(torch.float32)
        # w_ij = factor_i exp((z_ij - m_i) / t_i), in which factor_i is the given weight of anchor i divided by total_i.
        factors = [weight / total for weight, total in zip(weights, totals, strict=True)]
        # An exponential is at most 1, so V is at most the sum of the largest factors of both sides.
        return self._pull(peaks, factors, (first.count_image, first.count_text), factors)

    def pull_block(self, sums: tuple[tuple[Tensor, Tensor], ...], weights: tuple[Tensor, Tensor]) -> SecondSweep:
        """Run pass 2 with sums that may belong to several blocks; without negatives the total is 0."""
        weights = weights[0].detach().to(torch.float32), weights[1].detach().to(torch.float32)
        peaks = tuple(peak.detach().to(torch.float32) for peak, _ in sums)
        totals = tuple(total.detach().to(torch.float32) for _, total in sums)
        factors = [torch.where(total > 0, weight / total, 0.0) for weight, total in zip(weights, totals, strict=True)]
        # An exponential is at most the total, so V is at most the sum of the largest weights of both sides.
        return self._pull(peaks, factors, (totals[0], totals[1]), weights)

    def _pull(
        self,
        peaks: tuple[Tensor, ...],
        factors: list[Tensor],
        counts: tuple[Tensor, Tensor],
        largest: Sequence[Tensor],
    ) -> SecondSweep:
        """For one rectangle after the other, compute V and multiply V with the features.

        `counts` is above 0 for anchors with negatives. `largest` holds bounds of the weights of both sides.
        """
        b, blocks, plan = self.b, self.plan.weights, self.plan
        back = None
        # A float16 overflows above 65504 and is imprecise below 6e-5, so V is scaled by a power of two (exactly).
        if plan.buffer == torch.float16:
            bound = largest[0].amax() + largest[1].amax()
            power = torch.where(bound > 0, torch.floor(torch.log2(32768.0 / bound)), 0.0).clamp(-100.0, 100.0)
            factors, back = [factor * torch.exp2(power) for factor in factors], torch.exp2(-power)
        shared_factors, shared = self._share(peaks, factors, counts)
        anchors = [torch.stack(x) for x in zip(peaks, self.scales, factors, shared_factors, strict=True)]

        # Triton's interpreter truncates numbers to bfloat16, but a GPU rounds them. Under the interpreter the buffer is
        # float32, and torch rounds V afterwards.
        buffer = torch.float32 if interpreted() else plan.buffer
        # Kernels store whole tiles, so the height and the width of the buffer are multiples of those of a tile.
        heights = spans(b, plan.rows, blocks.rows)
        widths = spans(b, plan.columns, 128 if blocks.columns >= 128 else blocks.columns)
        width = triton.cdiv(widths[0][1], blocks.columns) * blocks.columns
        height = triton.cdiv(heights[0][1], blocks.rows) * blocks.rows
        v = torch.empty((height, width), dtype=buffer, device=self.device)
        out = _descriptor(v, (blocks.rows, blocks.columns)) if plan.descriptors else v
        sources, pulls = self._sources(blocks), (self._full(0.0, b, self.d), self._full(0.0, b, self.d))
        with self._on_device():
            for first_row, height in heights:
                for first_column, across in widths:
                    row_tiles, column_tiles = triton.cdiv(height, blocks.rows), triton.cdiv(across, blocks.columns)
                    # Both variants are launched, because only the device knows which one is right (see `_share`);
                    # the other variant returns at once.
                    for variant in (True, False) if plan.shared else (False,):
                        weights_kernel[(row_tiles * column_tiles,)](
                            *sources, self.weight, self.mask, *anchors, shared, out,
                            first_row, first_column, row_tiles, column_tiles, width, b,
                            SHARED=variant, BUFFER=TRITON_TYPES[buffer], **self._options(blocks),
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
        """Return the factors relative to one peak for all anchors, and a tensor of three numbers.

        The numbers are 1 if these factors may be used and 0 otherwise, the peak, and the scale. If all temperatures are
        equal, ``exp((z - peak_i) / t) f_i = exp((z - peak) / t) a_i``, in which f_i are the old and a_i the returned
        factors. One exponential then serves rows and columns. If all peaks are close together, this exponential never
        overflows, and for the largest weight of each anchor it does not underflow.
        """
        if not self.plan.shared:
            return factors, self._full(0.0, 3)
        active = [(count > 0) & (factor > 0) for count, factor in zip(counts, factors, strict=True)]
        low = torch.minimum(*(torch.where(a, p, torch.inf).amin() for a, p in zip(active, peaks, strict=True)))
        # `high` covers all anchors with negatives: exponentials are computed even for pairs of anchors without weight.
        high = torch.maximum(*(torch.where(n > 0, p, -torch.inf).amax() for n, p in zip(counts, peaks, strict=True)))
        ends = [end for t in self.temperatures for end in (t.amin(), t.amax())]
        scale = self.scales[0][0]
        # All temperatures are equal if the minima and the maxima of both sides are all equal.
        middle = low + (high - low) / 2
        safe = (ends[0] == ends[1]) & (ends[2] == ends[3]) & (ends[0] == ends[2]) & ((high - low) * scale <= SPREAD)
        moved = [
            torch.where(a, factor * torch.exp2((middle - peak) * scale), 0.0)
            for a, factor, peak in zip(active, factors, peaks, strict=True)
        ]
        return moved, torch.stack([safe.to(torch.float32), middle, scale])

    def _merge(self, parts: Tensor, number: int, state: Tensor, scale: Tensor, first: int, count: int) -> None:
        """Merge the sums of `number` tiles into those of `count` anchors, which start at anchor `first`."""
        _, places, stride = parts.shape
        merge_kernel[(triton.cdiv(count, 64),)](
            parts, state, scale, number, stride, places * stride, first, count, self.b,
            PARTS=16, ANCHORS=64, num_warps=4,
        )  # fmt: skip

    def _sources(self, blocks: Blocks) -> list[Any]:
        """Return the features in the form in which a kernel loads them: descriptors or pointers."""
        if not self.plan.descriptors:
            return list(self.sides)
        sizes = (blocks.rows, blocks.columns) * 2
        return [_descriptor(side, (size, blocks.depth)) for side, size in zip(self.sides, sizes, strict=True)]

    def _options(self, blocks: Blocks) -> dict[str, Any]:
        """Return the constants of both kernels; Triton compiles a kernel for each set of constants."""
        return {
            "D": self.sides[0].shape[1],
            "R": self.sides[2].shape[1],
            "ROWS": blocks.rows,
            "COLUMNS": blocks.columns,
            "DEPTH": blocks.depth,
            "GROUP": GROUP,
            "HAS_REFERENCE": self.has_reference,
            "HAS_MASK": self.pair_mask is not None,
            "PAIRED": self.paired,
            "DESCRIPTORS": self.plan.descriptors,
            "PRECISION": "ieee",
            "WIDEN": interpreted(),
            **launch_options(blocks),
        }

    def _counts(self) -> tuple[Tensor, Tensor]:
        """Return the number of negatives of each image anchor and of each text anchor."""
        if self.pair_mask is None:
            number = self._full(self.b - float(self.paired), self.b)
            return number, number
        # The diagonal of the mask may be True, but a positive pair is never a negative.
        diagonal = self.pair_mask.diagonal().to(torch.float32) if self.paired else 0.0
        image, text = (self.pair_mask.sum(axis).to(torch.float32) - diagonal for axis in (1, 0))
        return image, text

    def _on_device(self) -> Any:
        return torch.cuda.device(self.device if self.device.type == "cuda" else -1)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.float32, device=self.device)


TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def add_product(out: Tensor, v: Tensor, features: Tensor) -> None:
    """Add ``v features`` to `out` in float32; on a GPU, half types (float16, bfloat16) are not converted."""
    # On the CPU torch cannot multiply half types and return float32.
    if v.device.type != "cuda":
        out.addmm_(v.to(features.dtype).to(torch.float32), features.to(torch.float32))
    elif v.dtype == torch.float32:
        out.addmm_(v, features)
    else:
        _half_product(v.device)(out, v, features)


@functools.cache
def _half_product(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Return the function with which this version of torch adds a product of half types to a float32 sum.

    Not every version of torch can multiply and add in one call of cuBLAS. A test product decides, once per device.
    """

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
    """Return contiguous features, padded so that their width is a multiple of `depth`; most widths need no padding."""
    # Columns of 0 change no product.
    missing = -side.shape[1] % depth
    return torch.nn.functional.pad(side, (0, missing)) if missing else side.contiguous()


def _descriptor(x: Tensor, block: tuple[int, int]) -> Any:
    """Return a descriptor with which the GPU's copy engine loads and stores blocks of this size of a matrix."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def spans(b: int, largest: int, unit: int) -> list[tuple[int, int]]:
    """Cut b into spans of nearly the same length, a multiple of `unit`; return the start and the length of each."""
    length = triton.cdiv(triton.cdiv(b, triton.cdiv(b, largest)), unit) * unit
    return [(start, min(length, b - start)) for start in range(0, b, length)]
