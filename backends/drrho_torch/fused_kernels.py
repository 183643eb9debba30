"""The Triton kernels of both sweeps over all pairs of a batch; `drrho_torch.fused` launches them.

A sweep visits each pair once. Shapes: b pairs, features E1 and E2 (b, d), reference features R1 and R2 (b, r), in
float16, bfloat16 or float32. All sums are float32. lambda is the reference weight, t the temperature of an anchor. An
anchor is an image (a row of z) or a text (a column of z).

    z_ij = sum_k E1_ik E2_jk - lambda sum_k R1_ik R2_jk            row i = image, column j = text

`sums_kernel` computes one tile of z per program (an instance of the kernel). The program writes three
numbers for each row and each column of the tile: the peak (the largest z), the total (the sum of
``exp((z - peak) / t)``) and the moment (the sum of ``exp((z - peak) / t) (z - peak)``). `merge_kernel` combines these
numbers of all tiles, per anchor. `weights_kernel` computes the tile again and writes V = w + w', the weights of the
pairs in both directions, into a buffer. Exponentials are computed as powers of two, which are fastest on a GPU, so the
scales are log2(e) / t instead of 1 / t.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-3e38)
"""Replaces z of a pair that is no negative. It is below every z, but finite, so that no difference becomes nan."""


@triton.jit
def _add_product(
    z: tl.tensor,  # (ROWS, COLUMNS) float32
    left: tl.tensor,  # (b, WIDTH), as a pointer or as a tensor descriptor
    right: tl.tensor,  # (b, WIDTH)
    top: tl.tensor,  # first row of the tile
    first: tl.tensor,  # first column of the tile
    b: tl.tensor,
    WIDTH: tl.constexpr,  # width of the features, a multiple of DEPTH
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # convert to float32 first: the interpreter multiplies the bits of bfloat16 as integers
) -> tl.tensor:
    """Return ``z + left right^T`` for one tile."""
    # Only a block of DEPTH columns of the factors is on the chip at a time; z stays in registers.
    for start in range(0, WIDTH, DEPTH):
        # The copy engine (TMA) fetches a block by descriptor and fills rows past the end with 0.
        if DESCRIPTORS:
            a = left.load([top, start])
            c = right.load([first, start])
        # With pointers, rows past the end repeat the last row, so that loads need no mask.
        else:
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
    """Return a tile of z. Both sweeps call this function, so that they compute the same bits."""
    z = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    # -lambda R1 R2^T comes first: the product E1 E2^T is then added to the same accumulator.
    if HAS_REFERENCE:
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
    PAIRED: tl.constexpr,  # image i and text i are a positive pair; False for a block of two ranks
) -> tl.tensor:
    """Return a mask of the pairs of a tile that are negatives."""
    # A pair is a negative if its image and its text exist (are no padding), i != j, and the pair mask is True.
    counts = (rows < b)[:, None] & (columns < b)[None, :]
    if PAIRED:
        counts = counts & (rows[:, None] != columns[None, :])
    # Positions in the mask have 64 bits, because b * b may exceed 2^31.
    if HAS_MASK:
        places = tl.minimum(rows, b - 1).to(tl.int64)[:, None] * b + tl.minimum(columns, b - 1)[None, :]
        counts = counts & (tl.load(mask + places) != 0)
    return counts


@triton.jit
def sums_kernel(
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
    first_row: tl.tensor,  # first row of this launch
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    panel: tl.tensor,  # largest number of rows of a launch
    image_plane: tl.tensor,  # distance in memory from the peaks to the totals, and from the totals to the moments
    text_plane: tl.tensor,  # the same for text_parts
    b: tl.tensor,
    D: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PAIRED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Sum the exponentials of one tile along its rows and along its columns."""
    # Programs that run at the same time work on a band of GROUP rows of tiles, so that loads hit the cache.
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

    # Only tiles on the diagonal or at the end of the batch need a mask, unless the batch has a pair mask.
    on_diagonal = (top < first + COLUMNS) & (first < top + ROWS) & PAIRED
    if on_diagonal:
        here = tl.sum(tl.where(rows[:, None] == columns[None, :], z, 0.0), axis=1)
        tl.store(positive + rows, here, mask=(rows >= first) & (rows < first + COLUMNS) & (rows < b))
    if HAS_MASK:  # noqa: SIM114 (Triton decides this when it compiles)
        z = tl.where(_negatives(mask, rows, columns, b, HAS_MASK, PAIRED), z, NEVER)
    elif on_diagonal | (top + ROWS > b) | (first + COLUMNS > b):
        z = tl.where(_negatives(mask, rows, columns, b, HAS_MASK, PAIRED), z, NEVER)

    # For each row: peak m, total sum_j e_ij with e_ij = exp((z_ij - m) / t_i), and moment sum_j e_ij (z_ij - m). The
    # peak is subtracted before the scale multiplies z, because the difference of two close numbers is exact, but a
    # product with 1/t is rounded.
    row_scale = tl.load(scale_image + rows, mask=rows < b, other=0.0)
    row_peak = tl.max(z, axis=1)
    x = z - row_peak[:, None]
    e = tl.exp2(x * row_scale[:, None])
    at = image_parts + column_tile * panel + local_rows
    tl.store(at, row_peak)
    tl.store(at + image_plane, tl.sum(e, axis=1))
    tl.store(at + 2 * image_plane, tl.sum(e * x, axis=1))

    # The same for each column, with the temperatures of the text anchors.
    column_scale = tl.load(scale_text + columns, mask=columns < b, other=0.0)
    column_peak = tl.max(z, axis=0)
    x = z - column_peak[None, :]
    e = tl.exp2(x * column_scale[None, :])
    at = text_parts + row_tile * b + columns
    tl.store(at, column_peak, mask=columns < b)
    tl.store(at + text_plane, tl.sum(e, axis=0), mask=columns < b)
    tl.store(at + 2 * text_plane, tl.sum(e * x, axis=0), mask=columns < b)


@triton.jit
def merge_kernel(
    parts: tl.tensor,  # (3, number of parts, row stride)   peaks, totals and moments of tiles
    state: tl.tensor,  # (3, b)                             in and out: the same of anchors, for all merged tiles
    scale: tl.tensor,  # (b,)
    number: tl.tensor,  # number of parts
    stride: tl.tensor,
    plane: tl.tensor,  # distance in memory from the peaks to the totals, and from the totals to the moments
    first: tl.tensor,  # the anchor that entry 0 of every part belongs to
    count: tl.tensor,  # number of anchors
    b: tl.tensor,
    PARTS: tl.constexpr,
    ANCHORS: tl.constexpr,
) -> None:
    """Merge the parts (numbers of one tile) of ANCHORS anchors, in the order of the tiles; a new peak rescales sums."""
    local = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    inside = local < count
    anchors = first + local
    c = tl.load(scale + anchors, mask=inside, other=0.0)
    peak = tl.load(state + anchors, mask=inside, other=NEVER)
    total = tl.load(state + b + anchors, mask=inside, other=0.0)
    moment = tl.load(state + 2 * b + anchors, mask=inside, other=0.0)
    # The loop is a `while`, because Triton's interpreter takes only constants as the bounds of a `for`.
    start = 0
    while start < number:
        k = start + tl.arange(0, PARTS)
        exists = (k < number)[:, None] & inside[None, :]
        at = parts + k[:, None] * stride + local[None, :]
        part_peak = tl.load(at, mask=exists, other=NEVER)
        part_total = tl.load(at + plane, mask=exists, other=0.0)
        part_moment = tl.load(at + 2 * plane, mask=exists, other=0.0)
        new = tl.maximum(peak, tl.max(part_peak, axis=0))
        # With f = exp((old peak - new peak) / t), the total becomes f * total, and the moment becomes
        # f * (moment + total * (old peak - new peak)). If only the old peak is NEVER, f is 0. The difference of the
        # peaks is bounded, because 0 times infinity would be nan.
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
def weights_kernel(
    e1: tl.tensor,  # (b, d)
    e2: tl.tensor,  # (b, d)
    r1: tl.tensor,  # (b, r)
    r2: tl.tensor,  # (b, r)
    reference_weight: tl.tensor,  # (1,)
    mask: tl.tensor,  # (b, b)
    image_anchors: tl.tensor,  # (4, b)   peak; scale; factor = weight / total; factor relative to the shared peak
    text_anchors: tl.tensor,  # (4, b)    the same for the text anchors
    shared: tl.tensor,  # (3,)            1 if all anchors can share one peak and scale, else 0; this peak; this scale
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
    PAIRED: tl.constexpr,
    SHARED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BUFFER: tl.constexpr,
) -> None:
    """Compute the weights V of one tile, unless the batch needs the other variant of this kernel."""
    # The variant with SHARED = True uses one peak for all anchors, the variant with SHARED = False one peak per anchor.
    # The device decides here which variant is right, because the host would have to wait for the device.
    if (tl.load(shared) == 0.0) == SHARED:
        return
    # Programs that run at the same time work on a band of GROUP rows of tiles, so that loads hit the cache.
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
    # V_ij = w_ij + w'_ij. With one peak and one scale for all anchors, one exponential serves both directions.
    if SHARED:
        e = tl.exp2((z - tl.load(shared + 1)) * tl.load(shared + 2))
        row_factor = tl.load(image_anchors + 3 * b + rows, mask=rows < b, other=0.0)
        column_factor = tl.load(text_anchors + 3 * b + columns, mask=columns < b, other=0.0)
        w = e * (row_factor[:, None] + column_factor[None, :])
    # Otherwise each direction computes the exponentials of the first sweep again and divides them by the totals.
    else:
        row_peak = tl.load(image_anchors + rows, mask=rows < b, other=0.0)
        row_scale = tl.load(image_anchors + b + rows, mask=rows < b, other=0.0)
        row_factor = tl.load(image_anchors + 2 * b + rows, mask=rows < b, other=0.0)
        w = tl.exp2((z - row_peak[:, None]) * row_scale[:, None]) * row_factor[:, None]
        column_peak = tl.load(text_anchors + columns, mask=columns < b, other=0.0)
        column_scale = tl.load(text_anchors + b + columns, mask=columns < b, other=0.0)
        column_factor = tl.load(text_anchors + 2 * b + columns, mask=columns < b, other=0.0)
        w += tl.exp2((z - column_peak[None, :]) * column_scale[None, :]) * column_factor[None, :]

    # For pairs that are no negatives an exponential may be infinite and a factor nan. The mask is applied last, so that
    # it removes these values.
    if HAS_MASK:  # noqa: SIM114
        w = tl.where(_negatives(mask, rows, columns, b, HAS_MASK, PAIRED), w, 0.0)
    elif ((top < first + COLUMNS) & (first < top + ROWS) & PAIRED) | (top + ROWS > b) | (first + COLUMNS > b):
        w = tl.where(_negatives(mask, rows, columns, b, HAS_MASK, PAIRED), w, 0.0)
    # The buffer has the dtype in which torch multiplies V with the features.
    w = w.to(BUFFER)
    if DESCRIPTORS:
        v.store([row_tile * ROWS, column_tile * COLUMNS], w)
    else:
        local_rows = row_tile * ROWS + tl.arange(0, ROWS)
        local_columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(v + local_rows[:, None] * width + local_columns[None, :], w)
