"""Matrix products by oneDNN, a library that torch contains, for processors on which torch's own products are slow.

The products compute tiles, the squares into which the matrix of all pairs of a batch is cut.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from drrho_core.extend import Matmul

SMALLEST = 256
"""If a product has fewer rows, columns or summed terms than this, converting its factors to oneDNN's tensors takes as
much time as the faster product saves."""

_ENABLED: ContextVar[bool | None] = ContextVar("onednn_products", default=None)


@contextmanager
def onednn_products(enabled: bool = True) -> Iterator[None]:
    """Set whether oneDNN multiplies float32 tiles on the CPU in place of torch's ``a @ b``.

    torch computes a float32 product with Intel's MKL, which does not use every instruction of an AMD processor; a tile
    then takes twice as long as necessary. oneDNN chooses instructions by the processor's features, not by its maker.

    Parameters
    ----------
    enabled : bool, default: True
        The setting inside of the ``with`` block, in this thread or task. Outside of all blocks the environment variable
        ``DRRHO_ONEDNN`` is the setting: ``0`` (default) or ``1``.

    Raises
    ------
    TypeError
        If `enabled` is not a bool.
    ValueError
        In the first step outside of all blocks, if the environment variable is neither ``0`` nor ``1``.

    Notes
    -----
    Only the products change, and only by rounding. oneDNN multiplies float32 features on the CPU if torch has
    oneDNN (``torch.backends.mkldnn``, not switched off) and a tile has at least 256 rows, columns and features. torch
    computes all other products, and those that ``torch.compile`` traces. The setting is off by default because the gain
    depends on the processor: a processor for which MKL is made gains nothing.

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
    """Return oneDNN's product if it is enabled and supports matrices such as `like`; None for torch's own product."""
    # The innermost block decides; without a block the environment is read anew for each batch.
    enabled = _ENABLED.get()
    if enabled is None:
        setting = os.environ.get("DRRHO_ONEDNN") or "0"
        if setting not in ("0", "1"):
            raise ValueError(f"DRRHO_ONEDNN must be '0' or '1', got {setting!r}")
        enabled = setting == "1"
    if not enabled or like.dtype != torch.float32 or like.device.type != "cpu":
        return None
    available = torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return product if available else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``."""
    if min(*a.shape, b.shape[1]) < SMALLEST:
        return a @ b
    # `linear` accepts oneDNN's tensors, which matmul refuses, and expects the transpose of the right factor. The right
    # factor may be a plain tensor, which saves a conversion. `contiguous` copies transposed views, because a copy by
    # oneDNN would take 1.5 times as long.
    return torch.nn.functional.linear(a.contiguous().to_mkldnn(), b.T.contiguous()).to_dense()
