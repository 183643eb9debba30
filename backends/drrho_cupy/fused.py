"""Both sweeps over all pairs of a batch for CuPy: products by cuBLAS, exponentials and sums in CUDA (docs/fused.md).

A sweep (or pass) visits each pair once. Shapes: b pairs, features E1 and E2 (b, d), reference features R1 and R2
(b, r), in float16 or float32. All sums are float32. lambda is the reference weight, t the temperature of an anchor. An
anchor is an image (a row of z) or a text (a column of z).

    z_ij = sum_k E1_ik E2_jk - lambda sum_k R1_ik R2_jk            row i = image, column j = text

cuBLAS computes a rectangle of z into a float32 buffer; float16 features are multiplied on the tensor cores. In pass 1 a
block of threads reads one tile of the buffer and writes three numbers for each row and each column of the tile: the
peak (the largest z), the total (the sum of ``exp((z - peak) / t)``) and the moment (the sum of
``exp((z - peak) / t) (z - peak)``). A second kernel merges these numbers per anchor. In pass 2 the rectangle becomes
V = w + w', the weights of the pairs in both directions, which cuBLAS multiplies with the features. No b x b matrix is
ever in memory.

Both passes compute the same z and the same exponentials, so the weights of an anchor have the right sum for every t.
No thread adds to the results of another thread, so the same inputs give the same bits.

The functions get CuPy as an argument and never import it, so that this file can be checked and tested without CuPy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from drrho_core.checks import Array
from drrho_core.extend import Batch, FirstSweep, SecondSweep

HEIGHT, WIDTH = 4096, 8192
"""Largest height and width of a rectangle. A rectangle is large enough for cuBLAS to be fast. It takes 134 MB as z in
float32 and 67 MB as V in float16. The numbers were not tuned.
"""

SMALLEST = 2048
"""Smallest batch for the kernels in the mode ``"auto"``. The plain core computes smaller batches, because launching all
kernels takes milliseconds.
"""

LOG2_E = math.log2(math.e)

NEVER = -3e38
"""Replaces z of a pair that is no negative. It is below every z, but finite, so that no difference becomes nan."""

SIDE, THREADS, MERGED = 64, 256, 32
"""Side of a tile; threads of a block; anchors whose sums one block merges. `SOURCE` repeats the numbers."""

SOURCE = r"""
#define SIDE 64
#define THREADS 256
#define PARTS 4    // threads that share a row or a column of a tile: THREADS / SIDE
#define MERGED 32
#define WALKERS 8  // threads that share an anchor of a merge: THREADS / MERGED
#define NEVER -3e38f

// Tell whether image i and text j are a negative pair.
__device__ inline bool counts(int i, int j, const bool* mask, int has_mask, int b) {
    return i != j && (!has_mask || mask[(long long)i * b + j]);
}

struct Sums {
    float peak, total, moment;
};

// Merge the sums of two sets of pairs. With f = exp((old peak - new peak) / t), a total becomes f * total, and a moment
// becomes f * (moment + total * (old peak - new peak)). If only the old peak is NEVER, f is 0. The difference of the
// peaks is bounded, because 0 times infinity would be nan.
__device__ inline Sums merged(Sums a, Sums c, float scale) {
    Sums s;
    s.peak = fmaxf(a.peak, c.peak);
    float down_a = a.peak - s.peak, down_c = c.peak - s.peak;
    float f_a = exp2f(down_a * scale), f_c = exp2f(down_c * scale);
    s.total = f_a * a.total + f_c * c.total;
    s.moment = f_a * (a.moment + a.total * fmaxf(down_a, -1e30f)) + f_c * (c.moment + c.total * fmaxf(down_c, -1e30f));
    return s;
}

// Compute peak, total and moment of each row and each column of a tile: m = max z, sum e with e = exp((z - m) / t), and
// sum e (z - m). Results: (3, column tiles, rows) and (3, row tiles, columns).
extern "C" __global__ void sums(
    const float* z, int stride, int rows, int columns, int first_row, int first_column, const bool* mask, int has_mask,
    int b, const float* scale_image, const float* scale_text, float* image_parts, float* text_parts)
{
    // The extra column keeps a column of the tile from lying in one bank of shared memory.
    __shared__ float tile[SIDE][SIDE + 1];
    __shared__ float shared[3][SIDE][PARTS];
    int row_tiles = (rows + SIDE - 1) / SIDE, column_tiles = (columns + SIDE - 1) / SIDE;
    int row_tile = blockIdx.x / column_tiles, column_tile = blockIdx.x % column_tiles;
    int top = row_tile * SIDE, left = column_tile * SIDE;
    for (int k = threadIdx.x; k < SIDE * SIDE; k += THREADS) {
        int i = top + k / SIDE, j = left + k % SIDE;
        bool is_negative = i < rows && j < columns && counts(first_row + i, first_column + j, mask, has_mask, b);
        tile[k / SIDE][k % SIDE] = is_negative ? z[(long long)i * stride + j] : NEVER;
    }
    __syncthreads();
    int anchor = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
    for (int along_rows = 1; along_rows >= 0; --along_rows) {
        int place = (along_rows ? top : left) + anchor;
        bool inside = place < (along_rows ? rows : columns);
        float scale = 0.0f, peak = NEVER, total = 0.0f, moment = 0.0f;
        if (inside) scale = along_rows ? scale_image[first_row + place] : scale_text[first_column + place];
        // PARTS threads share an anchor: groups of eight entries go to the threads in rotation, so that no two threads
        // of a warp read the same bank of shared memory at once.
        for (int m = 0; m < SIDE / PARTS; ++m) {
            int k = m / 8 * 8 * PARTS + part * 8 + m % 8;
            peak = fmaxf(peak, along_rows ? tile[anchor][k] : tile[k][anchor]);
        }
        shared[0][anchor][part] = peak;
        __syncthreads();
        for (int q = 0; q < PARTS; ++q) peak = fmaxf(peak, shared[0][anchor][q]);
        // The peak is subtracted before the scale multiplies z, because the difference of two close numbers is exact,
        // but a product with 1/t is rounded.
        for (int m = 0; m < SIDE / PARTS; ++m) {
            int k = m / 8 * 8 * PARTS + part * 8 + m % 8;
            float x = (along_rows ? tile[anchor][k] : tile[k][anchor]) - peak;
            float e = exp2f(x * scale);
            total += e;
            moment += e * x;
        }
        shared[1][anchor][part] = total;
        shared[2][anchor][part] = moment;
        __syncthreads();
        if (part == 0 && inside) {
            for (int q = 1; q < PARTS; ++q) {
                total += shared[1][anchor][q];
                moment += shared[2][anchor][q];
            }
            float* out = along_rows ? image_parts : text_parts;
            int count = along_rows ? rows : columns, tiles = along_rows ? column_tiles : row_tiles;
            int at = (along_rows ? column_tile : row_tile) * count + place;
            out[at] = peak;
            out[tiles * count + at] = total;
            out[2 * tiles * count + at] = moment;
        }
        __syncthreads();
    }
}

// Merge the sums of tiles, (3, number, count), into those of anchors, (3, b), from anchor `first` on. The order of the
// additions is fixed, so the same inputs give the same bits.
extern "C" __global__ void merge(
    const float* parts, int number, int count, int first, int b, const float* scales, float* state)
{
    __shared__ Sums shared[WALKERS][MERGED];
    int place = blockIdx.x * MERGED + threadIdx.x % MERGED, walker = threadIdx.x / MERGED;
    bool inside = place < count;
    float scale = inside ? scales[first + place] : 0.0f;
    Sums s = {NEVER, 0.0f, 0.0f};
    for (int k = walker; inside && k < number; k += WALKERS) {
        const float* here = parts + k * count + place;
        Sums next = {here[0], here[number * count], here[2 * number * count]};
        s = merged(s, next, scale);
    }
    shared[walker][threadIdx.x % MERGED] = s;
    __syncthreads();
    if (walker == 0 && inside) {
        float* here = state + first + place;
        Sums old = {here[0], here[b], here[2 * b]};
        for (int w = 0; w < WALKERS; ++w) old = merged(old, shared[w][threadIdx.x], scale);
        here[0] = old.peak;
        here[b] = old.total;
        here[2 * b] = old.moment;
    }
}

// Return the bits of a number from 0 to 65504 as a float16, rounded to the nearest, and to an even last bit at a tie.
__device__ inline unsigned short half_bits(float x) {
    if (x < 6.103515625e-05f) return (unsigned short)rintf(x * 16777216.0f);  // below 2^-14 numbers are 2^-24 apart
    union { float value; unsigned int bits; } u;
    u.value = x;
    return (unsigned short)(((u.bits + 0xfff + ((u.bits >> 13) & 1)) >> 13) - (112 << 10));
}

// Compute V = w + w': each direction divides the exponentials of pass 1 by its own totals. If is_half is 0, V
// overwrites z.
extern "C" __global__ void weigh(
    const float* z, int stride, int rows, int columns, int first_row, int first_column, const bool* mask, int has_mask,
    int b, const float* peak_image, const float* scale_image, const float* factor_image,
    const float* peak_text, const float* scale_text, const float* factor_text, void* v, int is_half)
{
    for (int id = blockIdx.x * THREADS + threadIdx.x; id < rows * columns; id += gridDim.x * THREADS) {
        int i = first_row + id / columns, j = first_column + id % columns;
        long long at = (long long)(id / columns) * stride + id % columns;
        float w = 0.0f;
        if (counts(i, j, mask, has_mask, b)) {
            w = exp2f((z[at] - peak_image[i]) * scale_image[i]) * factor_image[i]
                + exp2f((z[at] - peak_text[j]) * scale_text[j]) * factor_text[j];
        }
        if (is_half) ((unsigned short*)v)[at] = half_bits(w);
        else ((float*)v)[at] = w;
    }
}
"""

# Constants of cuBLAS, which CuPy does not name; a test compares them with CuPy's own if there is a GPU.
TYPES = {"float32": 0, "float16": 2}
COMPUTE_FLOAT32 = 68
NORMAL, TRANSPOSED = 0, 1
POINTERS_ON_DEVICE = 1
ANY_ALGORITHM = -1


class CupySweeps:
    """The sweeps on an NVIDIA GPU; see `drrho_core.extend.Sweeps`.

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
        self._kernels = {name: self._module.get_function(name) for name in ("sums", "merge", "weigh")}

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Return the reason why these kernels do not take this batch, or None if they take it."""
        features = batch.image_features
        if features.dtype.name not in TYPES:
            return f"the kernels for CuPy take float32 and float16, not {features.dtype}"
        if mode == "auto" and features.dtype.name == "float32":
            return "the kernels for CuPy multiply float32 no faster than CuPy itself"
        if mode == "auto" and features.shape[0] < SMALLEST:
            return f"the batch is smaller than {SMALLEST}"
        return None

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Run pass 1: for one rectangle after the other, merge the sums of the tiles into those of the anchors."""
        cp, b = self._cupy, batch.image_features.shape[0]
        run = _Run(self, batch)
        positive = cp.empty((b,), dtype=np.float32)
        states = [cp.zeros((3, b), dtype=np.float32) for _ in range(2)]
        for state in states:
            state[0] = NEVER
        for rows, columns in run.rectangles:
            z = run.similarity(rows, columns)
            low, high = max(rows.start, columns.start), min(rows.stop, columns.stop)
            # The positives z_ii come from the same products as all of z, so that equal features have equal z.
            if low < high:
                diagonal = z[low - rows.start : high - rows.start, low - columns.start : high - columns.start]
                positive[low:high] = cp.diagonal(diagonal)
            row_tiles, column_tiles = (_ceil(length, SIDE) for length in z.shape)
            image_parts = cp.empty((3, column_tiles, z.shape[0]), dtype=np.float32)
            text_parts = cp.empty((3, row_tiles, z.shape[1]), dtype=np.float32)
            parts = image_parts, text_parts
            run.launch("sums", row_tiles * column_tiles, *run.tile(z, rows, columns), *run.scales, *parts)
            for anchors, part, scale, state in zip((rows, columns), parts, run.scales, states, strict=True):
                _, number, count = part.shape
                run.launch("merge", _ceil(count, MERGED), part, number, count, anchors.start, b, scale, state)
        # The diagonal of the mask may be True, but a positive pair is never a negative.
        if batch.pair_mask is None:
            counts = [cp.full((b,), b - 1, dtype=np.float32)] * 2
        else:
            own = cp.diagonal(batch.pair_mask).astype(np.float32)
            counts = [cp.sum(batch.pair_mask, axis=axis, dtype=np.float32) - own for axis in (1, 0)]
        # Totals and moments are relative to the peak m. Relative to the positive z_ii, with D_ij = (z_ij - z_ii) / t:
        # log sum_j exp(D_ij) = (m - z_ii) / t + log total, and the mean of D_ij with weights exp(D_ij) is
        # (m - z_ii + moment / total) / t. For an anchor without negatives the two numbers are -inf and 0.
        log_sums, means, saved = [], [], []
        for state, t, count in zip(states, run.temperatures, counts, strict=True):
            has = count > 0
            peak, total = cp.where(has, state[0], positive), cp.where(has, state[1], np.float32(1.0))
            log_sums.append(cp.where(has, (peak - positive) / t + cp.log(total), np.float32(-np.inf)))
            means.append(cp.where(has, (peak - positive + state[2] / total) / t, np.float32(0.0)))
            saved += [peak, total]
        return FirstSweep(log_sums[0], log_sums[1], means[0], means[1], counts[0], counts[1], tuple(saved))

    def pull_back(self, batch: Batch, first: FirstSweep, weight_image: Array, weight_text: Array, /) -> SecondSweep:
        """Run pass 2: for one rectangle after the other, compute V and multiply V with the features."""
        cp, (b, d) = self._cupy, batch.image_features.shape
        run = _Run(self, batch)
        peaks, totals = first.saved[::2], first.saved[1::2]
        weights = [cp.ascontiguousarray(x, dtype=np.float32) for x in (weight_image, weight_text)]
        # w_ij = factor_i exp((z_ij - m_i) / t_i), in which factor_i is the given weight of anchor i divided by total_i.
        factors = [weight / total for weight, total in zip(weights, totals, strict=True)]
        back, v = None, run.buffer
        is_half = batch.image_features.dtype == np.float16
        # A float16 overflows above 65504 and is imprecise below 6e-5, so V is scaled by a power of two (exactly).
        if is_half:
            # An exponential is at most 1, so V is at most the sum of the largest factors of both sides.
            bound = cp.maximum(cp.max(factors[0]) + cp.max(factors[1]), np.float32(1e-25))
            power = cp.floor(cp.log2(np.float32(32768.0) / bound)).astype(np.float32)
            factors, back = [factor * cp.exp2(power) for factor in factors], cp.exp2(-power).reshape(1)
            v = cp.empty(run.buffer.shape, dtype=np.float16)
        sides = [x for three in zip(peaks, run.scales, factors, strict=True) for x in three]
        pulls = [cp.zeros((b, d), dtype=np.float32) for _ in range(2)]
        images, texts = run.features
        for rows, columns in run.rectangles:
            z = run.similarity(rows, columns)
            blocks = min(_ceil(z.shape[0] * z.shape[1], THREADS), 65535)
            run.launch("weigh", blocks, *run.tile(z, rows, columns), *sides, v, int(is_half))
            here = v[: z.shape[0], : z.shape[1]]
            run.product(here, texts[columns], pulls[0][rows], alpha=back, add=True)
            run.product(here, images[rows], pulls[1][columns], transposed=True, alpha=back, add=True)
        return SecondSweep(pulls[0], pulls[1])


class _Run:
    """Owns the buffer and the arrays of one batch, in the form that kernels take, and launches the kernels."""

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
        # The scale log2(e) / t makes exp((z - m) / t) a power of two; m is the peak, the largest z of an anchor. For a
        # temperature below 4e-39 the scale would overflow, so the largest float32 replaces the scale. The exponent of
        # z = m is then still 0.
        largest = np.finfo(np.float32).max
        self.scales = [cp.minimum(np.float32(LOG2_E) / t, largest) for t in self.temperatures]
        height, width = _span(self.b, HEIGHT), _span(self.b, WIDTH)
        self.buffer = cp.empty((height, width), dtype=np.float32)
        # Without a mask the kernels do not read this argument, but the argument has to be a pointer.
        mask = self.buffer if batch.pair_mask is None else cp.ascontiguousarray(batch.pair_mask)
        self.mask = (mask, int(batch.pair_mask is not None))
        self.rectangles = [
            (slice(i, min(i + height, self.b)), slice(j, min(j + width, self.b)))
            for i in range(0, self.b, height)
            for j in range(0, self.b, width)
        ]

    def similarity(self, rows: slice, columns: slice) -> Array:
        """Compute a rectangle of z = E1 E2^T - lambda R1 R2^T in the buffer."""
        z = self.buffer[: rows.stop - rows.start, : columns.stop - columns.start]
        # The product of the reference features comes first, times -lambda. The product of the features is then added.
        if self.reference is not None:
            self.product(
                self.reference[0][rows], self.reference[1][columns], z, right_transposed=True, alpha=self.minus_weight
            )
        add = self.reference is not None
        self.product(self.features[0][rows], self.features[1][columns], z, right_transposed=True, add=add)
        return z

    def tile(self, z: Array, rows: slice, columns: slice) -> tuple[Any, ...]:
        """Return the arguments of a kernel that describe a rectangle: the positions in the buffer and in the batch."""
        return self.buffer, self.buffer.shape[1], *z.shape, rows.start, columns.start, *self.mask, self.b

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
    ) -> None:
        """Write the product of `left` (m, k) and `right` (k, n) to `out` (m, n) float32, or add it to `out`.

        The rows of all three arrays are contiguous. With `transposed` the shape of `left` is (k, m), with
        `right_transposed` that of `right` is (n, k). `alpha` multiplies the product.
        """
        m, n = out.shape
        k = left.shape[0] if transposed else left.shape[1]
        alpha = self.numbers[1:] if alpha is None else alpha
        beta = self.numbers[1:] if add else self.numbers[:1]
        # alpha and beta stay on the device, so that no product waits for the host.
        handle = self._cupy.cuda.device.get_cublas_handle()
        before = self._cublas.getPointerMode(handle)
        self._cublas.setPointerMode(handle, POINTERS_ON_DEVICE)
        try:
            # cuBLAS expects matrices stored column by column, so it reads these as transposes: out^T = right^T left^T.
            self._cublas.gemmEx(
                handle,
                TRANSPOSED if right_transposed else NORMAL,
                TRANSPOSED if transposed else NORMAL,
                n, m, k,
                pointer_of(alpha),
                pointer_of(right), TYPES[right.dtype.name], _leading(right),
                pointer_of(left), TYPES[left.dtype.name], _leading(left),
                pointer_of(beta),
                pointer_of(out), TYPES["float32"], _leading(out),
                COMPUTE_FLOAT32, ANY_ALGORITHM,
            )  # fmt: skip
        finally:
            self._cublas.setPointerMode(handle, before)

    def launch(self, kernel: str, blocks: int, *arguments: Any) -> None:
        """Run a kernel with this number of blocks of threads."""
        # CuPy would pass Python's integers with 64 bits, but the kernels take 32 bits.
        numbers = tuple(np.int32(x) if isinstance(x, int) else x for x in arguments)
        self._kernels[kernel]((blocks,), (THREADS,), numbers)


def _ceil(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def _span(b: int, largest: int) -> int:
    """Cut b into as few spans as possible, of nearly the same length; return this length, a multiple of 64."""
    return _ceil(_ceil(b, _ceil(b, largest)), 64) * 64


def pointer_of(array: Array) -> int:
    """Return the address of an array on the device."""
    return int(array.data.ptr)


def _leading(array: Array) -> int:
    """Return the distance between rows, in numbers."""
    # cuBLAS rejects a distance below the width, and the stride of a single row is arbitrary.
    return max(int(array.strides[0]) // int(array.itemsize), int(array.shape[1]), 1)
