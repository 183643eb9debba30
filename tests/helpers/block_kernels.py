"""Kernels for the blocks of ranks, in plain NumPy: they keep a whole block in memory, and a rank may let them decline.

The sums and the weights are those of `drrho_core.extend.BlockSweeps`, written from its formulas.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from drrho_core.extend import Batch, SecondSweep


class DenseBlocks:
    """Kernels that take a batch unless the thread of the rank has set `reason`."""

    def __init__(self) -> None:
        self._local = threading.local()
        self.ranks_with_blocks: set[int] = set()

    def on_rank(self, rank: int, reason: str | None) -> None:
        """Say which rank this thread is, and why the kernels decline the batches of this rank; None: they do not."""
        self._local.rank, self._local.reason = rank, reason

    def declines(self, _batch: Batch, _mode: str, /) -> str | None:
        """Return the reason that the rank has set; a thread that is no rank has no kernels."""
        reason: str | None = getattr(self._local, "reason", "the thread is no rank")
        return reason

    def block_sums(self, batch: Batch, paired: bool, /) -> Any:
        """Return peak, total, mean, count and positive of both directions."""
        self.ranks_with_blocks.add(self._local.rank)
        z, counts = _similarities(batch, paired)
        positive = np.diagonal(z).copy() if paired else None
        sides = []
        for side, t, here in ((z, batch.temperature_image, counts), (z.T, batch.temperature_text, counts.T)):
            has = here.any(axis=1)
            peak = np.where(has, np.max(np.where(here, side, -np.inf), axis=1), 0.0)
            x = np.where(here, (side - peak[:, None]) / t[:, None], 0.0)
            e = np.where(here, np.exp(x), 0.0)
            total = e.sum(axis=1)
            mean = (e * x).sum(axis=1) / np.where(has, total, 1.0)
            number = None if batch.pair_mask is None else here.sum(axis=1).astype(z.dtype)
            sides.append((peak, total, mean, number, positive))
        return tuple(sides)

    def pull_block(self, batch: Batch, paired: bool, sums: Any, weights: Any, /) -> SecondSweep:
        """Return V E2 and V^T E1."""
        z, counts = _similarities(batch, paired)
        v = np.zeros_like(z)
        temperatures = batch.temperature_image, batch.temperature_text
        for turn, (peak, total), weight, t in zip((False, True), sums, weights, temperatures, strict=True):
            side = z.T if turn else z
            factor = np.where(total > 0, weight / np.where(total > 0, total, 1.0), 0.0)
            w = factor[:, None] * np.exp((side - peak[:, None]) / t[:, None])
            v += np.where(counts, w.T if turn else w, 0.0)
        return SecondSweep(v @ batch.text_features, v.T @ batch.image_features)


def _similarities(batch: Batch, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return Z of a block, and which of its entries are negatives."""
    z = batch.image_features @ batch.text_features.T
    if batch.reference_features is not None:
        z = z - batch.reference_weight * batch.reference_features[0] @ batch.reference_features[1].T
    counts = np.ones(z.shape, dtype=bool) if batch.pair_mask is None else batch.pair_mask.copy()
    if paired:
        np.fill_diagonal(counts, False)
    return z, counts
