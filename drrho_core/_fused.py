"""Kernels that a backend may have for the two sweeps over all pairs of a batch.

`drrho_core._pairs` writes the sweeps once, in the standard's operations. On a GPU a kernel of the library's own does
better: it multiplies half types where they are fastest, and what follows a matrix product happens before the product
leaves the chip. A backend registers its `Sweeps` when it is imported. They say themselves what they cannot do, and
then the plain core does it.

Shapes: b pairs, features (b, d), reference features (b, r); everything per anchor is (b,) and float32 or wider.

    Z = E1 E2^T - lambda R1 R2^T,   D_ij = (Z_ij - Z_ii) / t_i,   D'_ij = (Z_ij - Z_jj) / t'_j
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

from drrho_core._array_api import Array, Namespace, is_compiling, library

MODES = ("never", "auto", "always")
"""What `fused_kernels` may be given."""


class Batch(NamedTuple):
    """What the sweeps are about, as the user gave it: half types are not widened, nothing is concatenated."""

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
    saved: Any  # what this library's `pull_back` reads of the first sweep


class SecondSweep(NamedTuple):
    """Result of `Sweeps.pull_back`, in float32 or wider; V = w + w'."""

    image_pull: Array  # (b, d)  V E2
    text_pull: Array  # (b, d)  V^T E1


class Sweeps(Protocol):
    """One library's kernels."""

    def declines(self, batch: Batch, mode: str, /) -> str | None:
        """Say in a few words why these kernels do not take this batch, or None where they do.

        In the mode ``"auto"`` they take what they are thought to be faster at, in ``"always"`` whatever they can.
        """
        ...

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Sweep once over all pairs, for the log-sum-exps."""
        ...

    def pull_back(self, batch: Batch, first: FirstSweep, weight_image: Array, weight_text: Array, /) -> SecondSweep:
        """Sweep again, given the sum (b,) of each anchor's weights, at least 0.

        ``w_ij = weight_i exp(D_ij - log_sum_i)``, and w' alike for text anchors. Divide the exponentials by the sum of
        the very same exponentials: a logarithm of size 1/t has lost the digits that make the weights add up.
        """
        ...


_LOADERS: dict[str, Callable[[], Sweeps | str]] = {}
_SWEEPS: dict[str, Sweeps | str] = {}
_MODE: ContextVar[str | None] = ContextVar("fused_kernels", default=None)


def register_sweeps(name: str, load: Callable[[], Sweeps | str]) -> None:
    """Let the sweeps of a library's arrays use its own kernels.

    Parameters
    ----------
    name : str
        The library, named as its namespace without the wrapper's: ``torch``, ``jax.numpy``.
    load : callable
        Called once, when the first batch asks: returns the kernels, or says in a few words why there are none here.
    """
    _LOADERS[name] = load
    _SWEEPS.pop(name, None)


@contextmanager
def fused_kernels(mode: str) -> Iterator[None]:
    """Say whether the contrastive steps use the kernels of the arrays' library.

    Parameters
    ----------
    mode : {"never", "auto", "always"}
        ``"never"``: the plain core. ``"auto"``: kernels where they are expected to be faster. ``"always"``: kernels, or
        an error that says why not. It holds inside the ``with`` block, in this thread or task, and for what is traced
        there. Outside of all blocks the environment variable ``DRRHO_FUSED`` holds it; the default is ``"auto"``.

    Raises
    ------
    ValueError
        If the mode is another one; later, under ``"always"``, if the kernels do not apply.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import contrastive_step
    >>> unseen = np.full(3, -np.inf)
    >>> with fused_kernels("auto"):                               # NumPy has no kernels: the plain core runs
    ...     step = contrastive_step(np.eye(3), np.eye(3), unseen, unseen, temperature=0.5)
    >>> float(step.loss)
    -1.0
    """
    token = _MODE.set(_checked("mode", mode))
    try:
        yield
    finally:
        _MODE.reset(token)


def find(batch: Batch, xp: Namespace) -> Sweeps | None:
    """Return the kernels for a batch, or None where the plain core is to run.

    Raises
    ------
    ValueError
        If the mode is ``"always"`` and they do not apply, or the environment holds another mode than the three.
    """
    if is_compiling(xp):  # inductor fuses the plain core itself, and cannot trace what is below
        return None
    mode = _MODE.get() or _checked("DRRHO_FUSED", os.environ.get("DRRHO_FUSED") or "auto")
    if mode == "never":
        return None
    sweeps = _load(library(xp))
    if isinstance(sweeps, str):
        reason: str | None = sweeps
    else:
        reason = sweeps.declines(batch, mode)
        if reason is None:
            return sweeps
    if mode == "always":
        raise ValueError(f"fused_kernels must be 'never' or 'auto' here, because {reason}, got 'always'")
    return None


def _load(name: str) -> Sweeps | str:
    if name not in _LOADERS:  # not remembered: the backend may be imported later
        return f"no kernels are registered for {name}"
    if name not in _SWEEPS:
        _SWEEPS[name] = _LOADERS[name]()
    return _SWEEPS[name]


def _checked(name: str, mode: object) -> str:
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"{name} must be {', '.join(map(repr, MODES[:-1]))} or {MODES[-1]!r}, got {mode!r}")
    return mode
