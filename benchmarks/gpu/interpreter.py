"""Whether Triton's interpreter works at all: under some versions of NumPy no loop with a run-time bound."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def _add_up(out: tl.tensor, count: tl.tensor, SIZE: tl.constexpr) -> None:
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for _ in range(count):
        total += 1.0
    tl.store(out + tl.arange(0, SIZE), total)


def broken() -> str | None:
    """Say why nothing can be interpreted here, or None."""
    out = torch.zeros(16)
    try:
        _add_up[(1,)](out, 3, SIZE=16)
    except Exception as error:
        last = str(error).rpartition("Error(")[2].strip("'\\\")")
        return f"Triton {triton.__version__} cannot interpret a loop under NumPy {np.__version__}: {last}"
    return None if bool((out == 3).all()) else f"Triton {triton.__version__} interprets a loop wrongly"
