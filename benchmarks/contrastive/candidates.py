"""The candidates (the programs that are timed in turn) and the ratios of their times that are reported.

A step on b pairs with features of width d consists of matrix products, each of b x b x d multiply-adds. With a
reference model, one pass needs 4 products: two for the logits and two for the gradients. Without a reference model it
needs 3. Two passes compute the logits twice.
"""

from __future__ import annotations

import os

FEATURE_DIM = 512
"""Width of the learner's and of the reference model's features."""

TEMPERATURE, GAMMA = 0.05, 0.9

DTYPES = {"float32": 4, "float64": 8, "bfloat16": 4, "float16": 4}
"""Bytes of a number of the b x b matrices: half types are widened to float32."""

CANDIDATES = {
    "one pass": "contrastive_step with a reference model; the logits are cached",
    "two passes": "the same step with tile_size=1024; the logits are computed twice, and no b x b array exists",
    "faster product": "one pass, with products by another routine of the library (torch: oneDNN)",
    "no reference": "contrastive_step without a reference model",
    "dense autograd": "the same formula on b x b matrices, with a reference model, differentiated by the library",
    "released form": "the form of the released DRRho-CLIP program: autograd, separate matrices for each direction",
    "cross-entropy": "CLIP's loss without a reference model, differentiated by the library",
}

# Ratios that are reported, with their explanations on the page.
RATIOS = {
    "share": "the rate of the 4 matrix products of one pass, divided by the library's own rate of matrix products",
    "two-pass share": "the same rate for two passes: 4 of their 6 products are counted, so it is at most 67 %; up to "
    "b = 1,024 jax exceeds this limit, because XLA computes the logits only once",
    "over dense": "the time of dense autograd, divided by the time of one pass",
    "over dense, faster": "the time of dense autograd, divided by the time of one pass with the faster product",
    "over released": "the time of the released form, divided by the time of one pass",
    "over cross-entropy": "the time of cross-entropy, divided by the time of the step without a reference model",
}

TIMES_OF_RATIOS = {
    "share": ("product", "one pass", 4.0),
    "two-pass share": ("product", "two passes", 4.0),
    "over dense": ("dense autograd", "one pass", 1.0),
    "over dense, faster": ("dense autograd", "faster product", 1.0),
    "over released": ("released form", "one pass", 1.0),
    "over cross-entropy": ("cross-entropy", "no reference", 1.0),
}
"""Each ratio is factor * time of the first candidate / time of the second candidate."""

# The approximate number of b x b matrices that a candidate holds when it needs the most memory.
_MATRICES_IN_MEMORY = {
    "dense autograd": 8, "released form": 16, "cross-entropy": 6, "one pass": 2, "faster product": 2, "no reference": 2
}  # fmt: skip


def has_candidate(backend: str, candidate: str) -> bool:
    """Tell whether a candidate exists for a library: some need torch, some need a library with autograd."""
    if candidate in ("faster product", "released form"):
        return backend == "torch"
    return candidate not in ("dense autograd", "cross-entropy") or backend in ("torch", "jax")


def reason_to_skip(candidate: str, batch_size: int) -> str | None:
    """Return why a candidate is left out (two passes, or more than half of the free memory), or None."""
    needed = _MATRICES_IN_MEMORY.get(candidate, 0) * 4 * batch_size**2
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # If the logits exceed the memory budget (1 GiB), `contrastive_step` makes two passes. The time of two passes must
    # not be reported as the time of one pass.
    if candidate in ("one pass", "faster product", "no reference") and 4 * batch_size**2 > 2**30:
        return "not run: with logits above 1 GiB the step makes two passes"
    return f"not run: about {needed / 2**30:.0f} GiB" if needed > available / 2 else None
