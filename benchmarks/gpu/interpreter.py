"""Test whether Triton's interpreter works: with a few versions of NumPy it cannot run a loop with a run-time bound."""

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
    """Return why the interpreter does not work here, or None."""
    # The smallest kernel with such a loop. Triton chains several errors, and the message contains the last.
    out = torch.zeros(16)
    try:
        _add_up[(1,)](out, 3, SIZE=16)
    except Exception as error:
        last = str(error).rpartition("Error(")[2].strip("'\\\")")
        return f"Triton {triton.__version__} cannot interpret a loop under NumPy {np.__version__}: {last}"
    return None if bool((out == 3).all()) else f"Triton {triton.__version__} interprets a loop wrongly"
