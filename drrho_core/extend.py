"""Registration of fast routines: a backend calls `register` once, on import, with routines of its array library.

The core (`drrho_core`) is written in the operations of the Array API standard and runs without any registration. A
registered routine makes the core faster on one library, or lets a compiler trace the core quickly. The results stay the
same up to rounding.

    loop      a loop of a fixed number of steps that a compiler does not unroll
    sort      a faster sort
    matmul    a matrix product for tiles, which are blocks of the b x b matrix of similarities
    exp       an exponential for tiles
    tiles     a loop over tiles that a compiler does not unroll
    sweeps    fused kernels for both passes over all pairs of a batch

The kernels get b pairs with features E1 and E2 (b, d) and reference features R1 and R2 (b, r) of images and texts. An
array with a value per anchor has shape (b,) and is float32 or wider. An anchor is an image that is compared with all
texts, or a text that is compared with all images. The weight of the reference features is lambda, and the temperatures
are t for image anchors and t' for text anchors. The kernels use the scaled differences D and D' between similarities Z:

    Z = E1 E2^T - lambda R1 R2^T,   D_ij = (Z_ij - Z_ii) / t_i,   D'_ij = (Z_ij - Z_jj) / t'_j
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

from drrho_core._array_api import Array

Carry: TypeAlias = tuple[Array, ...]
"""The arrays that a loop passes from step to step; they keep their shapes and dtypes."""

Body: TypeAlias = Callable[[Carry], Carry]
"""One step of a loop."""

Loop: TypeAlias = Callable[[int, Body, Carry], Carry]
"""``loop(count, body, carry)`` returns the carry after `count` steps. Outside tracing it may call `plain_loop`."""

Sort: TypeAlias = Callable[[Array], Array]
"""``sort(values)`` returns the values in ascending order along the last axis."""

Matmul: TypeAlias = Callable[[Array, Array], Array]
"""``matmul(a, b)`` returns ``a @ b`` for two matrices, each of which may be a transposed view."""

ChooseMatmul: TypeAlias = Callable[[Array], Matmul | None]
"""``choose(like)`` returns a `Matmul` for matrices of the dtype and device of `like`, or None for ``a @ b``.

The core calls `choose` once per batch, and never while torch.compile traces.
"""

Exponential: TypeAlias = Callable[[Array, bool], Array]
"""``exp(x, overwrite)`` returns ``exp(x)`` and may write it into `x` if `overwrite` is true.

If `overwrite` is false, new memory is allocated for the result, which takes as long as the exponential itself.
"""

ChooseTiles: TypeAlias = Callable[[], Any]
"""``choose()`` returns a subclass of `drrho_core.contrastive.tiles.Tiles` with the library's own loop, or None.

The core calls `choose` for each batch of more than one tile. Outside tracing `choose` should return None.
"""


class Batch(NamedTuple):
    """The arguments of both passes, as the user passed them: half types are not widened, nothing is concatenated."""

    image_features: Array  # (b, d)
    text_features: Array  # (b, d)
    reference_features: tuple[Array, Array] | None  # (b, r) each
    reference_weight: float | Array  # lambda, a number or an array of shape ()
    temperature_image: Array  # (b,)
    temperature_text: Array  # (b,)
    pair_mask: Array | None  # (b, b) bool


class FirstSweep(NamedTuple):
    """Result of `Sweeps.sum_negatives`: sums over each anchor's negatives, (b,) in float32 or wider."""

    log_sum_image: Array  # log sum_j exp(D_ij) of image anchor i, -inf without negatives
    log_sum_text: Array  # log sum_i exp(D'_ij) of text anchor j
    mean_image: Array  # mean of D_ij with weights proportional to exp(D_ij), 0 without negatives
    mean_text: Array  # the same mean of D'_ij for text anchors
    count_image: Array  # number of negatives
    count_text: Array
    saved: Any  # intermediate results for `pull_back` of the same kernels


class SecondSweep(NamedTuple):
    """Result of `Sweeps.pull_back`, in float32 or wider.

    V = w + w' (b, b) is the sum of the weights w of image anchors and the weights w' of text anchors.
    """

    image_pull: Array  # (b, d)  V E2
    text_pull: Array  # (b, d)  V^T E1


class Sweeps(Protocol):
    """The two passes over all pairs of a batch, as kernels of one library or as the core's own implementation."""

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Return None if the kernels take this batch, otherwise the reason in a few words.

        In the mode ``"auto"`` kernels take the batches on which they are expected to be faster than the core. In the
        mode ``"always"`` they take all batches that they can compute.
        """
        ...

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Pass 1: the log-sum-exp of each anchor over its negatives."""
        ...

    def pull_back(self, batch: Batch, first: FirstSweep, weight_image: Array, weight_text: Array, /) -> SecondSweep:
        """Pass 2: the weighted sums of features, given the sum (b,) of each anchor's weights, which is at least 0.

        ``w_ij = weight_i exp(D_ij - log_sum_i)``, and w' likewise for text anchors. Divide the exponentials by the sum
        of these same exponentials instead of using `log_sum`. A logarithm of size 1/t is rounded so coarsely that the
        weights of anchor i would not add up to ``weight_i``.
        """
        ...


class BlockSweeps(Sweeps, Protocol):
    """Kernels that also compute one block of the similarities of ranks that share a batch.

    The batch of a block holds the images of one rank and the texts of a rank, b each. If both ranks are the same, the
    block is paired: image i and text i are a positive pair. Otherwise all pairs of the block are negatives, as far as
    `pair_mask` allows it.
    """

    def block_sums(self, batch: Batch, paired: bool, /) -> tuple[tuple[Array | None, ...], tuple[Array | None, ...]]:
        """Return sums over the negatives in a block, for the image anchors and for the text anchors.

        Each is a tuple of five arrays (b,): the peak, any number near the largest Z; the total, sum
        exp((Z - peak) / t), which is 0 without negatives; the mean of (Z - peak) / t with weights proportional to the
        exponentials, 0 without negatives; the number of negatives, None without `pair_mask`; and the positive Z_ii,
        None if the block is not paired.
        """
        ...

    def pull_block(
        self, batch: Batch, paired: bool, sums: tuple[tuple[Array, Array], ...], weights: tuple[Array, Array], /
    ) -> SecondSweep:
        """Return V E2 and V^T E1 of a block with ``w_ij = weight_i exp((Z_ij - peak_i) / t_i) / total_i``.

        `sums` holds the peak and the total of both directions. They may belong to several blocks, so Z may exceed the
        peak, but no exponential exceeds the total.
        """
        ...


LoadSweeps: TypeAlias = Callable[[], Sweeps | str]
"""``load()`` returns the kernels, or a few words that say why there are none. The core calls it at the first batch."""


class Extensions(NamedTuple):
    """The routines that are registered for one library. If a routine is None, the core uses its own."""

    loop: Loop | None = None
    sort: Sort | None = None
    matmul: ChooseMatmul | None = None
    exp: Exponential | None = None
    tiles: ChooseTiles | None = None
    sweeps: LoadSweeps | None = None


# One entry per library. Kernels are loaded at the first batch and not on import, because importing a compiler takes
# seconds.
_EXTENSIONS: dict[str, Extensions] = {}
_LOADED: dict[str, Sweeps | str] = {}
_NOTHING = Extensions()


def register(
    name: str,
    *,
    loop: Loop | None = None,
    sort: Sort | None = None,
    matmul: ChooseMatmul | None = None,
    exp: Exponential | None = None,
    tiles: ChooseTiles | None = None,
    sweeps: LoadSweeps | None = None,
) -> None:
    """Let the core use routines of a library for the arrays of this library.

    Parameters
    ----------
    name : str
        The name of the library's own namespace, not that of a wrapper: ``torch``, ``jax.numpy``.
    loop : callable, optional
        As `Loop`, for the solvers of the ambiguity sets.
    sort : callable, optional
        As `Sort`, for the same solvers.
    matmul : callable, optional
        As `ChooseMatmul`.
    exp : callable, optional
        As `Exponential`.
    tiles : callable, optional
        As `ChooseTiles`.
    sweeps : callable, optional
        As `LoadSweeps`; see `Sweeps`.

    Notes
    -----
    A call replaces everything that was registered for the library before. To add one routine, pass the routines that
    are already registered again: ``register(name, **registered(name)._replace(exp=exp)._asdict())``.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import CVaR, worst_case
    >>> before, sorted_arrays = registered("numpy"), []
    >>> def sort(values):
    ...     sorted_arrays.append(values.shape)
    ...     return np.sort(values, axis=-1)
    >>> register("numpy", sort=sort)
    >>> float(worst_case(np.asarray([1.0, 4.0, 2.0]), CVaR(1 / 3)).risk), sorted_arrays
    (4.0, [(3,)])
    >>> register("numpy", **before._asdict())
    """
    # Loaded kernels are dropped, because kernels of an earlier registration would otherwise stay in use.
    _EXTENSIONS[name] = Extensions(loop, sort, matmul, exp, tiles, sweeps)
    _LOADED.pop(name, None)


def registered(name: str) -> Extensions:
    """Return the routines that are registered for a library. All are None if nothing is registered.

    Parameters
    ----------
    name : str
        The library, as in `register`.
    """
    return _EXTENSIONS.get(name, _NOTHING)


def load_sweeps(name: str) -> Sweeps | str:
    """Return the fused kernels of a library, or the reason in a few words why it has none.

    Parameters
    ----------
    name : str
        The library, as in `register`.
    """
    if name not in _LOADED:
        load = _EXTENSIONS.get(name, _NOTHING).sweeps
        # The absence of kernels is not remembered, because the backend may be imported later.
        if load is None:
            return f"no kernels are registered for {name}"
        _LOADED[name] = load()
    return _LOADED[name]


def plain_loop(count: int, body: Body, carry: Carry) -> Carry:
    """Take `count` steps in Python.

    Parameters
    ----------
    count : int
        Number of steps.
    body : callable
        One step, as `Body`.
    carry : tuple of arrays
        The arrays that the first step gets.

    Examples
    --------
    >>> plain_loop(3, lambda carry: (2 * carry[0],), (1,))
    (8,)
    """
    # A compiler unrolls this loop: it traces the body `count` times.
    for _ in range(count):
        carry = body(carry)
    return carry
