"""The program of each section's process: it measures case by case and reports each row immediately."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.checks import Demo, Tests
from benchmarks.gpu.kit import Kit
from benchmarks.gpu.libraries import Absent, Library
from benchmarks.gpu.plan import Case
from benchmarks.gpu.processes import FAILED, LEFT_OUT, NO_MEMORY, OK, Row
from benchmarks.gpu.ranks import RankSteps
from benchmarks.gpu.sweeps import Peers, Sweeps


def main(part: str, cases: Sequence[Case], descriptor: int, *, dry_run: bool) -> None:
    """Measure cases of one part and report to a file descriptor."""
    # Children of this process must not keep the pipe open, or the parent would wait for them.
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) as pipe:

        def report(kind: str, content: Any) -> None:
            pipe.write(json.dumps({kind: content}) + "\n")

        try:
            # The library or its device may be missing.
            measure = PARTS[part](cases[0], report, dry_run)
        except Absent as error:
            report("absent", str(error))
            return
        for number, case in enumerate(cases):
            report("begin", number)
            row = measured(measure, case)
            report("row", row)
            if row["status"] not in (OK, LEFT_OUT) and not healthy(getattr(measure, "library", None)):
                # The device cannot be used any more in this process: the next case gets a fresh process.
                return
            gc.collect()


def measured(measure: Callable[[Case], Row], case: Case) -> Row:
    """Return the row of a case; an exception becomes the row's reason."""
    try:
        return {"status": OK, **measure(case)}
    except Absent as error:
        return {"status": LEFT_OUT, "reason": str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        traceback.print_exc()
        status = NO_MEMORY if is_out_of_memory(error) else FAILED
        return {
            "status": status,
            "reason": reason[:500],
            "output": "\n".join(traceback.format_exc().splitlines()[-25:]),
        }


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of any library means that memory ran out."""
    # Each library has a different exception for this, so the text of the error is searched.
    words = f"{type(error).__name__} {error}".lower().replace("_", " ")
    return isinstance(error, MemoryError) or any(
        sign in words for sign in ("out of memory", "outofmemory", "resource exhausted", "failed to allocate")
    )


PARTS: dict[str, Any] = {
    "kit": Kit,
    "sweeps": Sweeps,
    "ranks": RankSteps,
    "peers": Peers,
    "tests": Tests,
    "demo": Demo,
}
"""For each part the class that measures it.

An object of the class is made from the first case, a `Report` and `dry_run`, and is then called with each case.
"""


def healthy(library: Library | None) -> bool:
    """Tell whether the device still works after an error; some errors make it unusable until the process ends."""
    if library is None:
        return True
    try:
        library.forget()
        library.wait(library.unit(8, 8, 0, "float32"))
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return False
    return True
