"""torch.compile's own loop for the solvers of the core (`drrho_core`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from drrho_core.extend import Body, Carry, plain_loop


def repeat(count: int, body: Body, carry: Carry) -> Carry:
    """Take `count` steps: as one loop of the graph if torch.compile traces, else step by step in Python.

    If the loop were unrolled, the longest solver would take more than a minute to compile.
    """
    if count == 0 or not torch.compiler.is_compiling():
        return plain_loop(count, body, carry)

    def more(done: Tensor, *_: Tensor) -> Tensor:
        return done < count

    def step(done: Tensor, *inner: Tensor) -> tuple[Tensor, ...]:
        # `while_loop` refuses a result that shares memory with an input, such as an array that a step does not change.
        return (done + 1, *(array.clone() for array in body(inner)))

    # The counter is on the host, so that no step waits for a device.
    first = torch.zeros((), dtype=torch.int64)
    _, *last = while_loop(more, step, (first, *(array.clone() for array in carry)))  # type: ignore[no-untyped-call]
    return tuple(last)
