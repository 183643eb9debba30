"""The two sweeps of the contrastive objective for CuPy: cuBLAS on tiles, CUDA for what follows (docs/fused.md).

Shapes, stated once: b pairs, features (b, d), reference features (b, r), float16 or float32. All sums are float32.

    z_ij = sum_k E1_ik E2_jk - lambda sum_k R1_ik R2_jk            row i = image, column j = text

A square tile of z is made by cuBLAS, from half types on the tensor cores, and lies in one float32 buffer. A thread then
walks along part of a row or of a column and leaves the maximum and the sum of its exponentials, or its weights' sums.
At last the buffer is overwritten by V = w + w', which cuBLAS multiplies with the features. A matrix of b x b never
exists. No thread adds to what another one has written.

CuPy is an argument here and never imported, so that this file can be read, checked and tested without it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_core._arrays import Array
from drrho_core._fused import Batch, FirstSweep, SecondSweep

TILE = 4096
"""Side of a tile: large enough for cuBLAS, 64 MB in float32. Not tuned."""

PARTS = 32
"""How many threads share an anchor of a tile. Neighbours read neighbouring numbers, along rows as along columns."""

SMALLEST = 1024
"""In the mode ``"auto"`` a smaller batch is left to the plain core."""

SOURCE = r"""
// Who belongs to thread `id`. An anchor is a row (image) or a column (text) of the tile, its candidates are the entries
// of that row or column; part p of an anchor has the candidates p, p + parts, p + 2 parts ...
struct Walk {
    int anchor, part;
};

__device__ inline Walk walk(int id, int anchors, int parts, int along_rows) {
    Walk w;
    w.part = along_rows ? id % parts : id / anchors;
    w.anchor = along_rows ? id / parts : id % anchors;
    return w;
}

// Whether candidate and anchor, by their places in the batch, are a negative pair.
__device__ inline bool counts(int anchor, int candidate, int along_rows, const bool* mask, int has_mask, int b) {
    if (anchor == candidate) return false;
    if (!has_mask) return true;
    long long row = along_rows ? anchor : candidate;
    return mask[row * b + (along_rows ? candidate : anchor)];
}

// Largest z of a part, and the sum of exp((z - largest) / t): (parts, anchors) each.
extern "C" __global__ void negatives(
    const float* z, int side, int anchors, int candidates, int first_anchor, int first_candidate, int along_rows,
    int parts, const bool* mask, int has_mask, int b, const float* temperature, float minus_infinity,
    float* peaks, float* sums)
{
    for (int id = blockIdx.x * blockDim.x + threadIdx.x; id < anchors * parts; id += gridDim.x * blockDim.x) {
        Walk w = walk(id, anchors, parts, along_rows);
        long long step = along_rows ? 1 : side;
        const float* here = z + (along_rows ? (long long)w.anchor * side : w.anchor);
        float t = temperature[first_anchor + w.anchor], peak = minus_infinity, sum = 0.0f;
        for (int k = w.part; k < candidates; k += parts) {
            if (!counts(first_anchor + w.anchor, first_candidate + k, along_rows, mask, has_mask, b)) continue;
            float value = here[k * step];
            if (value > peak) {
                sum = sum * expf((peak - value) / t) + 1.0f;
                peak = value;
            } else {
                sum += expf((value - peak) / t);
            }
        }
        peaks[w.part * anchors + w.anchor] = peak;
        sums[w.part * anchors + w.anchor] = sum;
    }
}

// Sum of w and of w D over a part: (parts, anchors) each.
extern "C" __global__ void weigh(
    const float* z, int side, int anchors, int candidates, int first_anchor, int first_candidate, int along_rows,
    int parts, const bool* mask, int has_mask, int b, const float* temperature, const float* positive,
    const float* log_denominator, float* weights, float* weighted)
{
    for (int id = blockIdx.x * blockDim.x + threadIdx.x; id < anchors * parts; id += gridDim.x * blockDim.x) {
        Walk w = walk(id, anchors, parts, along_rows);
        int place = first_anchor + w.anchor;
        long long step = along_rows ? 1 : side;
        const float* here = z + (along_rows ? (long long)w.anchor * side : w.anchor);
        float t = temperature[place], p = positive[place], l = log_denominator[place];
        float weight = 0.0f, total = 0.0f;
        for (int k = w.part; k < candidates; k += parts) {
            if (!counts(place, first_candidate + k, along_rows, mask, has_mask, b)) continue;
            float d = (here[k * step] - p) / t;  // subtracted first, while the difference is exact
            float one = expf(d - l);
            weight += one;
            total += one * d;
        }
        weights[w.part * anchors + w.anchor] = weight;
        weighted[w.part * anchors + w.anchor] = total;
    }
}

// z becomes V = w + w'.
extern "C" __global__ void combine(
    float* z, int side, int rows, int columns, int first_row, int first_column, const bool* mask, int has_mask, int b,
    const float* temperature_image, const float* temperature_text, const float* positive,
    const float* log_denominator_image, const float* log_denominator_text)
{
    for (int id = blockIdx.x * blockDim.x + threadIdx.x; id < rows * columns; id += gridDim.x * blockDim.x) {
        int i = first_row + id / columns, j = first_column + id % columns;
        float* here = z + (long long)(id / columns) * side + id % columns;
        float v = 0.0f;
        if (counts(i, j, 1, mask, has_mask, b)) {
            v = expf((*here - positive[i]) / temperature_image[i] - log_denominator_image[i])
                + expf((*here - positive[j]) / temperature_text[j] - log_denominator_text[j]);
        }
        *here = v;
    }
}
"""

# What cuBLAS calls them.
_TYPES = {"float32": 0, "float16": 2}
_COMPUTE_FLOAT32, _COMPUTE_TENSOR_FLOAT32 = 68, 77
_NORMAL, _TRANSPOSED = 0, 1
_POINTERS_ON_DEVICE = 1
_ANY_ALGORITHM = -1


class CupySweeps:
    """The sweeps on an NVIDIA GPU; see `drrho_core._fused.Sweeps`.

    Parameters
    ----------
    cupy : module
        CuPy.
    cublas : module
        ``cupy_backends.cuda.libs.cublas``.
    """

    def __init__(self, cupy: Any, cublas: Any) -> None:
        self._cupy = cupy
        self._cublas = cublas
        self._module = cupy.RawModule(code=SOURCE)
        self._kernels = {name: self._module.get_function(name) for name in ("negatives", "weigh", "combine")}

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Say why not."""
        features = batch.image_features
        if features.dtype.name not in _TYPES:
            return f"the kernels for CuPy take float32 and float16, not {features.dtype}"
        if mode == "auto" and features.dtype.name == "float32":
            return "float32 has no faster product than CuPy's own"
        if mode == "auto" and features.shape[0] < SMALLEST:
            return f"the batch is smaller than {SMALLEST}"
        return None

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Sweep once: what a tile leaves is merged into what there is."""
        cp, b = self._cupy, batch.image_features.shape[0]
        run = _Run(self, batch)
        peaks = [cp.full((b,), -np.inf, dtype=np.float32) for _ in range(2)]
        sums = [cp.zeros((b,), dtype=np.float32) for _ in range(2)]
        for rows, columns in run.squares:
            run.similarity(rows, columns)
            for side, (anchors, candidates) in enumerate(((rows, columns), (columns, rows))):
                peak, total = run.walk("negatives", side, anchors, candidates, np.float32(-np.inf))
                peaks[side][anchors], sums[side][anchors] = self._merge(
                    cp.concatenate([peaks[side][anchors][None, :], peak]),
                    cp.concatenate([sums[side][anchors][None, :], total]),
                    run.temperatures[side][anchors],
                )
        positive = _row_products(batch.image_features, batch.text_features)
        if batch.reference_features is not None:
            positive = positive + run.minus_weight * _row_products(*batch.reference_features)
        image, text = (
            cp.log(total) + (peak - positive) / temperature
            for total, peak, temperature in zip(sums, peaks, run.temperatures, strict=True)
        )
        if batch.pair_mask is None:
            counts = [cp.full((b,), b - 1, dtype=np.float32)] * 2
        else:
            own = cp.diagonal(batch.pair_mask).astype(np.float32)
            counts = [cp.sum(batch.pair_mask, axis=axis, dtype=np.float32) - own for axis in (1, 0)]
        return FirstSweep(positive, image, text, counts[0], counts[1])

    def pull_back(
        self, batch: Batch, positive: Array, log_denominator_image: Array, log_denominator_text: Array, /
    ) -> SecondSweep:
        """Sweep again: what a tile leaves is added to what there is."""
        cp, (b, d) = self._cupy, batch.image_features.shape
        run = _Run(self, batch)
        positive = cp.ascontiguousarray(positive, dtype=np.float32)
        logs = [cp.ascontiguousarray(x, dtype=np.float32) for x in (log_denominator_image, log_denominator_text)]
        # w is about 1 / b, too small for float16's exponent: so V and the features that it meets are float32, and from
        # float16 they are multiplied as TensorFloat-32, which has float16's significand.
        features = [cp.ascontiguousarray(x, dtype=np.float32) for x in (batch.text_features, batch.image_features)]
        compute = _COMPUTE_FLOAT32 if batch.image_features.dtype == np.float32 else _COMPUTE_TENSOR_FLOAT32
        pulls = [cp.zeros((b, d), dtype=np.float32) for _ in range(2)]
        sums = [[cp.zeros((b,), dtype=np.float32) for _ in range(2)] for _ in range(2)]
        for rows, columns in run.squares:
            z = run.similarity(rows, columns)
            for side, (anchors, candidates) in enumerate(((rows, columns), (columns, rows))):
                parts = run.walk("weigh", side, anchors, candidates, positive, logs[side])
                for total, part in zip(sums[side], parts, strict=True):
                    total[anchors] += cp.sum(part, axis=0)
            run.launch(
                "combine", z.shape[0] * z.shape[1],
                z, run.buffer_side, *z.shape, rows.start, columns.start, *run.mask, b,
                *run.temperatures, positive, *logs,
            )  # fmt: skip
            run.product(z, features[0][columns], pulls[0][rows], add=True, compute=compute)
            run.product(z, features[1][rows], pulls[1][columns], transposed=True, add=True, compute=compute)
        return SecondSweep(pulls[0], pulls[1], sums[0][0], sums[1][0], sums[0][1], sums[1][1])

    def _merge(self, peaks: Array, sums: Array, temperature: Array) -> tuple[Array, Array]:
        """Put partial maxima and sums (parts, n) together; -inf and 0 where nothing counts."""
        cp = self._cupy
        peak = cp.max(peaks, axis=0)
        shift = cp.where(peak == -np.inf, np.float32(0.0), peak)
        return peak, cp.sum(sums * cp.exp((peaks - shift) / temperature), axis=0)


class _Run:
    """One batch: its buffer, its arrays as the kernels want them, and how they are launched."""

    def __init__(self, sweeps: CupySweeps, batch: Batch) -> None:
        cp = self._cupy = sweeps._cupy
        self._cublas, self._kernels = sweeps._cublas, sweeps._kernels
        self.b = batch.image_features.shape[0]
        self.features = [cp.ascontiguousarray(x) for x in (batch.image_features, batch.text_features)]
        self.reference = None
        if batch.reference_features is not None and batch.reference_features[0].shape[1]:
            self.reference = [cp.ascontiguousarray(x) for x in batch.reference_features]
        self.minus_weight = -cp.asarray(batch.reference_weight, dtype=np.float32).reshape(1)
        self.numbers = cp.asarray([0.0, 1.0], dtype=np.float32)
        self.temperatures = [
            cp.ascontiguousarray(x, dtype=np.float32) for x in (batch.temperature_image, batch.temperature_text)
        ]
        self.buffer_side = min(TILE, self.b)
        self.buffer = cp.empty((self.buffer_side, self.buffer_side), dtype=np.float32)
        # A pointer that is not followed must be one all the same.
        mask = self.buffer if batch.pair_mask is None else cp.ascontiguousarray(batch.pair_mask)
        self.mask = (mask, int(batch.pair_mask is not None))
        spans = [slice(first, min(first + TILE, self.b)) for first in range(0, self.b, TILE)]
        self.squares = [(rows, columns) for rows in spans for columns in spans]

    def similarity(self, rows: slice, columns: slice) -> Array:
        """Make a tile of z in the buffer."""
        z = self.buffer[: rows.stop - rows.start, : columns.stop - columns.start]
        if self.reference is not None:
            self.product(
                self.reference[0][rows], self.reference[1][columns], z, right_transposed=True, alpha=self.minus_weight
            )
        add = self.reference is not None
        self.product(self.features[0][rows], self.features[1][columns], z, right_transposed=True, add=add)
        return z

    def product(
        self,
        left: Array,
        right: Array,
        out: Array,
        *,
        transposed: bool = False,
        right_transposed: bool = False,
        alpha: Array | None = None,
        add: bool = False,
        compute: int = _COMPUTE_FLOAT32,
    ) -> None:
        """Set or add to `out` (m, n) float32 the product of `left` (m, k) and `right` (k, n), rows being contiguous."""
        m, n = out.shape
        k = left.shape[0] if transposed else left.shape[1]
        alpha = self.numbers[1:] if alpha is None else alpha
        beta = self.numbers[1:] if add else self.numbers[:1]
        handle = self._cupy.cuda.device.get_cublas_handle()
        before = self._cublas.getPointerMode(handle)
        self._cublas.setPointerMode(handle, _POINTERS_ON_DEVICE)
        try:
            # cuBLAS counts by columns: to it, `out` is its transpose, and that is right^T left^T.
            self._cublas.gemmEx(
                handle,
                _TRANSPOSED if right_transposed else _NORMAL,
                _TRANSPOSED if transposed else _NORMAL,
                n, m, k,
                _pointer(alpha),
                _pointer(right), _TYPES[right.dtype.name], _leading(right),
                _pointer(left), _TYPES[left.dtype.name], _leading(left),
                _pointer(beta),
                _pointer(out), _TYPES["float32"], _leading(out),
                compute, _ANY_ALGORITHM,
            )  # fmt: skip
        finally:
            self._cublas.setPointerMode(handle, before)

    def walk(self, kernel: str, side: int, anchors: slice, candidates: slice, *more: Any) -> tuple[Array, Array]:
        """Let threads walk along the buffer's rows (side 0) or columns (side 1); two results, (parts, anchors) each."""
        number = anchors.stop - anchors.start
        out = [self._cupy.empty((PARTS, number), dtype=np.float32) for _ in range(2)]
        self.launch(
            kernel, number * PARTS,
            self.buffer, self.buffer_side, number, candidates.stop - candidates.start, anchors.start, candidates.start,
            int(side == 0), PARTS, *self.mask, self.b, self.temperatures[side], *more, *out,
        )  # fmt: skip
        return out[0], out[1]

    def launch(self, kernel: str, threads: int, *arguments: Any) -> None:
        """Run a kernel with at least one thread for each number it makes, or a loop over them."""
        block = 256
        grid = min(-(-threads // block), 65535)
        # Python's integers would be 64 bits wide.
        self._kernels[kernel]((grid,), (block,), tuple(np.int32(x) if isinstance(x, int) else x for x in arguments))


def _row_products(left: Array, right: Array) -> Array:
    return (left.astype(np.float32) * right.astype(np.float32)).sum(axis=1)


def _pointer(array: Array) -> int:
    """Return where an array lies on the device."""
    return int(array.data.ptr)


def _leading(array: Array) -> int:
    """Return how far apart rows are; a single row may claim anything, which cuBLAS would not believe."""
    return max(int(array.strides[0]) // int(array.itemsize), int(array.shape[1]), 1)
