"""Matrix products by oneDNN, for processors on which torch's own are slow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from drrho_core.extend import Matmul

SMALLEST = 256
"""Below this many rows, columns or terms the detour over oneDNN's tensors costs what its product saves."""

_ENABLED: ContextVar[bool | None] = ContextVar("onednn_products", default=None)


@contextmanager
def onednn_products(enabled: bool = True) -> Iterator[None]:
    """Say whether float32 tiles on the CPU are multiplied by oneDNN instead of torch's ``a @ b``.

    torch gives a float32 product to Intel's MKL, which on an AMD processor may not use all that the processor has; a
    tile then costs twice what it has to. oneDNN asks the processor what it can do and not who made it.

    Parameters
    ----------
    enabled : bool, default: True
        It holds inside the ``with`` block, in this thread or task. Outside of all blocks the environment variable
        ``DRRHO_ONEDNN``, ``0`` or ``1``, holds it; the default is ``0``.

    Raises
    ------
    TypeError
        If `enabled` is not a bool.
    ValueError
        In the first step outside of all blocks, if the environment variable is neither ``0`` nor ``1``.

    Notes
    -----
    Only the products change, and they to rounding. They do where features are float32 on the CPU and where torch has
    oneDNN (``torch.backends.mkldnn``, not switched off), for tiles of 256 and more rows and columns and as many
    features; all else is multiplied as ever, and so is what ``torch.compile`` traces. It is off by default because it
    depends on the processor: where MKL is at its best there is nothing to gain, and what pays elsewhere is not known.

    Examples
    --------
    >>> import torch
    >>> from drrho_core import info_nce
    >>> images, texts = torch.eye(300), torch.eye(300)
    >>> with onednn_products():
    ...     fast = info_nce(images, texts, temperature=0.5)
    >>> bool(torch.allclose(fast.loss, info_nce(images, texts, temperature=0.5).loss))
    True
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {type(enabled).__name__}")
    token = _ENABLED.set(enabled)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def choose(like: Tensor) -> Matmul | None:
    """Return oneDNN's product where it is wanted and can be had."""
    enabled = _ENABLED.get()
    if enabled is None:
        setting = os.environ.get("DRRHO_ONEDNN") or "0"
        if setting not in ("0", "1"):
            raise ValueError(f"DRRHO_ONEDNN must be '0' or '1', got {setting!r}")
        enabled = setting == "1"
    if not enabled or like.dtype != torch.float32 or like.device.type != "cpu":
        return None
    has = torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return product if has else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``."""
    if min(*a.shape, b.shape[1]) < SMALLEST:
        return a @ b
    # `linear` takes oneDNN's tensors, matmul does not; it multiplies by a transpose. The right one may be a plain
    # tensor, which spares a copy. Transposed views are copied by torch: oneDNN takes half as long again for it.
    return torch.nn.functional.linear(a.contiguous().to_mkldnn(), b.T.contiguous()).to_dense()
