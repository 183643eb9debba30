"""Routines for the arrays of a library: those that a backend has registered, or else operations of the standard.

The standard is the Array API standard, in whose operations the core (drrho_core) is written. `drrho_core.extend` says
which faster routines a backend can register. Among them are fused kernels, which replace the core's own two passes over
all pairs of a batch. `fused_kernels` chooses between the kernels and these passes.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

from drrho_core import extend
from drrho_core._array_api import Array, Namespace, device_of, has_memory, is_compiling, library, values_visible
from drrho_core.extend import Batch, BlockSweeps, Body, Carry, Exponential, Matmul, Sweeps

MODES = ("never", "auto", "always")
"""The modes of `fused_kernels`."""

_MODE: ContextVar[str | None] = ContextVar("fused_kernels", default=None)


def is_traced(xp: Namespace) -> bool:
    """Tell whether a compiler is tracing: torch.compile reports it, and under jax.jit a new array has no device."""
    return is_compiling(xp) or device_of(xp.zeros(())) is None


def repeat(
    count: int, body: Body, carry: Carry, xp: Namespace, *, finished: Callable[[Carry], Array] | None = None
) -> Carry:
    """Apply `body` to `carry` `count` times, in the loop that is registered for the arrays' library, if there is one.

    If values can be read at no cost, the loop ends as soon as every entry of ``finished(carry)`` is true, because the
    remaining steps would change nothing.
    """
    # The first step may turn an array that can be read into a traced array, so every step tests this again.
    while count > 0 and finished is not None:
        over = finished(carry)
        if not values_visible(over, xp):
            break
        if bool(xp.all(over)):
            return carry
        carry, count = body(carry), count - 1
    loop = extend.registered(library(xp)).loop
    return (extend.plain_loop if loop is None else loop)(count, body, carry)


def descending(values: Array, xp: Namespace) -> Array:
    """Return values, none of them nan, sorted along the last axis, the largest first."""
    sort = extend.registered(library(xp)).sort
    if sort is not None and (is_compiling(xp) or has_memory(values)):
        return xp.flip(sort(values), axis=-1)
    # Equal numbers may change places, and a sort that allows this is several times as fast as a stable sort.
    return xp.sort(values, axis=-1, descending=True, stable=False)


def tile_routines(like: Array, xp: Namespace) -> tuple[Matmul, Exponential]:
    """Return the matrix product and the exponential for tiles, which have the dtype and the device of `like`."""
    routines = extend.registered(library(xp))
    # torch.compile cannot trace `routines.matmul`, and it chooses a fast product by itself.
    matmul = None if routines.matmul is None or is_compiling(xp) else routines.matmul(like)

    def plain_exp(x: Array, _overwrite: bool) -> Array:
        exponential: Array = xp.exp(x)
        return exponential

    return operator.matmul if matmul is None else matmul, routines.exp or plain_exp


@contextmanager
def fused_kernels(mode: str) -> Iterator[None]:
    """Choose whether the contrastive steps use the fused kernels of the arrays' library.

    Parameters
    ----------
    mode : {"never", "auto", "always"}
        ``"never"``: the core's own passes run. ``"auto"``: kernels run if they are expected to be faster. ``"always"``:
        kernels run, or an error says why they cannot run. The mode holds inside the ``with`` block, in this thread or
        task, and for code that is traced there. Outside of all blocks the environment variable ``DRRHO_FUSED`` sets the
        mode; the default is ``"auto"``.

    Raises
    ------
    ValueError
        If there is no such mode. In the mode ``"always"`` a step raises this error if there are no kernels for it.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import contrastive_step
    >>> unseen = np.full(3, -np.inf)
    >>> with fused_kernels("auto"):                               # NumPy has no kernels: the core's passes run
    ...     step = contrastive_step(np.eye(3), np.eye(3), unseen, unseen, temperature=0.5)
    >>> float(step.loss)
    -1.0
    """
    token = _MODE.set(_check_mode("mode", mode))
    try:
        yield
    finally:
        _MODE.reset(token)


def find_kernels(batch: Batch, xp: Namespace) -> Sweeps | None:
    """Return the fused kernels for a batch, or None if the core's own passes have to run.

    If ranks share the batch, see `find_block_kernels`.

    Raises
    ------
    ValueError
        If the mode is ``"always"`` and there are no kernels for the batch, or if the value of
        ``DRRHO_FUSED`` is no mode.
    """
    if is_compiling(xp):  # torch.compile fuses the core's passes by itself, and cannot trace the code below
        return None
    mode = _MODE.get() or os.environ.get("DRRHO_FUSED") or "auto"
    if mode not in MODES:
        _check_mode("DRRHO_FUSED", mode)
    if mode == "never":
        return None
    kernels = extend.load_sweeps(library(xp))
    reason = kernels if isinstance(kernels, str) else kernels.declines(batch, mode)
    if reason is not None and mode == "always":
        raise _refusal(reason)
    return None if reason is not None or isinstance(kernels, str) else kernels


def find_block_kernels(batch: Batch, xp: Namespace) -> BlockSweeps | None:
    """Return the fused kernels for the blocks of a batch that ranks share; `batch` has the rows of one rank."""
    return None if _block_kernels(xp) is None else cast(BlockSweeps | None, find_kernels(batch, xp))


def block_kernels(xp: Namespace) -> str:
    """Describe the kernels for blocks and the mode, which must be the same on all ranks; ``none`` without kernels."""
    try:
        kernels = _block_kernels(xp)
    except ValueError:  # about DRRHO_FUSED; the check of the step raises the same error
        kernels = None
    return "none" if kernels is None else f"{type(kernels).__name__} in the mode {_mode()}"


def refuse_kernels(reason: str, xp: Namespace | None) -> None:
    """Raise a ValueError if the mode is ``"always"`` and no kernels compute the blocks of a batch that ranks share."""
    if not is_compiling(xp) and _mode() == "always" and (xp is None or _block_kernels(xp) is None):
        raise _refusal(reason)


def _block_kernels(xp: Namespace) -> BlockSweeps | None:
    """Return the kernels of a library if they compute blocks and the mode is not ``"never"``."""
    if is_compiling(xp) or _mode() == "never":
        return None
    kernels = extend.load_sweeps(library(xp))
    return cast(BlockSweeps, kernels) if hasattr(kernels, "block_sums") else None


def _mode() -> str:
    """Return the mode of `fused_kernels` that holds here."""
    return _check_mode("DRRHO_FUSED", _MODE.get() or os.environ.get("DRRHO_FUSED") or "auto")


def _refusal(reason: str) -> ValueError:
    return ValueError(f"fused_kernels must be 'never' or 'auto' here, because {reason}, got 'always'")


def _check_mode(name: str, mode: object) -> str:
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"{name} must be {', '.join(map(repr, MODES[:-1]))} or {MODES[-1]!r}, got {mode!r}")
    return mode
