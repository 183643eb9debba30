"""The place at which a backend registers routines of its array library: `register`, called once when it is imported.

The core is written in the operations of the Array API standard and runs without any registration. A registered routine
makes it faster on one library, or lets a compiler trace it quickly; the results stay the same up to rounding.

    loop      a loop of a fixed number of steps that a compiler does not unroll
    sort      a faster sort
    matmul    a product for the tiles of the similarity matrix
    exp       an exponential for these tiles
    tiles     a loop over these tiles that a compiler does not unroll
    sweeps    fused kernels for both passes over all pairs of a batch

Shapes in the contract of the kernels: b pairs, features (b, d), reference features (b, r); everything per anchor is
(b,) and float32 or wider.

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
"""``loop(count, body, carry)`` returns the carry after `count` steps. If nothing is traced it may be `plain_loop`."""

Sort: TypeAlias = Callable[[Array], Array]
"""``sort(values)`` returns the values in ascending order along the last axis."""

Matmul: TypeAlias = Callable[[Array, Array], Array]
"""``matmul(a, b)`` returns ``a @ b`` for two matrices, each of which may be a transposed view."""

ChooseMatmul: TypeAlias = Callable[[Array], Matmul | None]
"""``choose(like)`` returns the product for matrices of the dtype and device of `like`, or None for ``a @ b``.

The core calls it once per batch, and never while torch.compile traces.
"""

Exponential: TypeAlias = Callable[[Array, bool], Array]
"""``exp(x, overwrite)`` returns ``exp(x)`` and may write it into `x` if `overwrite` is true.

Fresh memory takes as long as the exponential itself.
"""

ChooseTiles: TypeAlias = Callable[[], Any]
"""``choose()`` returns a subclass of `drrho_core.contrastive.tiles.Tiles` with the library's own loop, or None.

The core calls it for each batch of more than one tile. The answer should be None unless code is being traced.
"""


class Batch(NamedTuple):
    """The arguments of both passes, as the user gave them: half types are not widened, nothing is concatenated."""

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
    mean_text: Array
    count_image: Array  # number of negatives
    count_text: Array
    saved: Any  # intermediate results that this library's `pull_back` reads


class SecondSweep(NamedTuple):
    """Result of `Sweeps.pull_back`, in float32 or wider; V = w + w'."""

    image_pull: Array  # (b, d)  V E2
    text_pull: Array  # (b, d)  V^T E1


class Sweeps(Protocol):
    """The two passes over all pairs of a batch, as kernels of one library or as the core's own."""

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Return None if the kernels take this batch, else the reason in a few words.

        In the mode ``"auto"`` they take batches on which they are expected to be faster, in ``"always"`` all batches
        that they can compute.
        """
        ...

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Pass 1: the log-sum-exp of each anchor over its negatives."""
        ...

    def pull_back(self, batch: Batch, first: FirstSweep, weight_image: Array, weight_text: Array, /) -> SecondSweep:
        """Pass 2: the weighted sums of features, given the sum (b,) of each anchor's weights, at least 0.

        ``w_ij = weight_i exp(D_ij - log_sum_i)``, and w' alike for text anchors. Divide the exponentials by the sum of
        the very same exponentials: a logarithm of size 1/t has lost the digits that make the weights add up.
        """
        ...


LoadSweeps: TypeAlias = Callable[[], Sweeps | str]
"""``load()`` returns the kernels, or says in a few words why there are none here. It is called once, when needed."""


class Extensions(NamedTuple):
    """The routines that are registered for one library; None stands for the core's own."""

    loop: Loop | None = None
    sort: Sort | None = None
    matmul: ChooseMatmul | None = None
    exp: Exponential | None = None
    tiles: ChooseTiles | None = None
    sweeps: LoadSweeps | None = None


# One entry per library. Kernels are loaded when the first batch asks, because importing a compiler takes seconds.
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
        The library, named like its namespace without the wrapper: ``torch``, ``jax.numpy``.
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
    A call replaces everything that was registered for the library before. To add one routine, pass the others again:
    ``register(name, **registered(name)._replace(exp=exp)._asdict())``.

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
    # Kernels that an earlier registration loaded would otherwise stay in use.
    _EXTENSIONS[name] = Extensions(loop, sort, matmul, exp, tiles, sweeps)
    _LOADED.pop(name, None)


def registered(name: str) -> Extensions:
    """Return the routines that are registered for a library, all None if there are none.

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
