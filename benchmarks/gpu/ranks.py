"""Measure the step of one of several ranks, processes that share a batch, with the fused kernels and without.

A group of one process exchanges its arrays by NCCL, and the results are compared with the step without ranks. NCCL
accepts only one process per GPU, so a rank of four has stand-ins for the other ranks: its time is the rank's own work.
The best possible time of a rank is the time of the step on the whole batch, divided by the number of ranks.
"""

from __future__ import annotations

import atexit
import statistics
import tempfile
from typing import Any

from benchmarks.gpu.libraries import GAMMA, TEMPERATURE, Absent, open_library
from benchmarks.gpu.plan import Case
from benchmarks.gpu.processes import FAILED, Report, Row, rounded
from benchmarks.gpu.sweeps import Sweeps, times

GRADIENT, LOSS = 2.0**-6, 1e-4
"""Bounds of the differences between the step of a group and the step without: of gradients, relative to the largest
entry, and of the loss. Gradients and weights are rounded to bfloat16."""


class RankSteps:
    """`sharded_contrastive_step` of a rank beside `contrastive_step` on the whole batch, in bfloat16."""

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        self.library = open_library(first["library"], dry_run=dry_run)
        self.dry_run = dry_run
        self._sweeps = Sweeps(first, report, dry_run)
        self._ranks: Any = None

    def __call__(self, case: Case) -> Row:
        from drrho_core import fused_kernels

        if case["engine"] == "fused" and (reason := self.library.no_kernels()) is not None:
            raise Absent(reason)
        ranks, num_ranks = self.ranks(case["ranks"]), case["ranks"]
        whole = self._sweeps.arrays(case["b"], case["d"])
        own = tuple(x[: case["b"] // num_ranks] for x in whole)
        try:
            with fused_kernels("always" if case["engine"] == "fused" else "never"):
                return self.measured(whole, own, ranks, case["form"])
        finally:
            self.library.forget()

    def measured(self, whole: tuple[Any, ...], own: tuple[Any, ...], ranks: Any, form: str) -> Row:
        """Time a rank's step on the own pairs and the step on the whole batch; compare the two for one rank."""
        from drrho_core import contrastive_step, sharded_contrastive_step

        def options(arrays: tuple[Any, ...]) -> dict[str, Any]:
            return {"temperature": TEMPERATURE, "gamma": GAMMA, "reference_features": (arrays[2], arrays[3])}

        def alone(*arrays: Any) -> Any:
            return contrastive_step(arrays[0], arrays[1], arrays[4], arrays[4], **options(arrays))

        def shared(*arrays: Any) -> Any:
            given = (arrays[0], arrays[1], arrays[4], arrays[4])
            return sharded_contrastive_step(*given, ranks=ranks, form=form, **options(arrays))

        most = 3 if self.dry_run else 20
        best = statistics.median(times(self.library, alone, whole, most=most)) / ranks.size
        took = statistics.median(times(self.library, shared, own, most=most))
        row: Row = {"rank_ms": rounded(1e3 * took), "best_ms": rounded(1e3 * best), "ratio": rounded(took / best)}
        if (memory := self.library.extra_megabytes(shared, own)) is not None:
            row["extra_mb"] = rounded(memory)
        return row if ranks.size > 1 else row | self.compared(alone(*whole), shared(*own))

    def compared(self, expected: Any, result: Any) -> Row:
        """Return the differences between two results, and a reason if they are too large."""
        gradients = [
            [self.library.numpy(getattr(step, f"{side}_gradient")) for side in ("image", "text")]
            for step in (expected, result)
        ]
        off = max(float(abs(b - a).max() / abs(a).max()) for a, b in zip(*gradients, strict=True))
        loss = abs(float(result.loss) - float(expected.loss))
        row: Row = {"gradient_off": rounded(off), "loss_off": rounded(loss)}
        # A nan is in no bound.
        if off <= GRADIENT and loss <= LOSS:
            return row
        return row | {"status": FAILED, "reason": f"a group differs from no group: gradient {off:.1e}, loss {loss:.1e}"}

    def ranks(self, number: int) -> Any:
        """Return the ranks: a group of this process, or this process and stand-ins."""
        if number > 1:
            from benchmarks.many_devices.counted_ranks import StandIn

            return StandIn(number, self.library.xp)
        if self._ranks is None:
            self._ranks = joined_group(dry_run=self.dry_run)
        return self._ranks


def joined_group(*, dry_run: bool) -> Any:
    """Return the ranks of a group of this process: on NCCL, in a dry run on gloo."""
    import torch
    import torch.distributed as dist
    from drrho_torch import TorchRanks

    options: dict[str, Any] = {}
    if not dry_run:
        if not dist.is_available() or not dist.is_nccl_available():
            raise Absent("this torch has no NCCL")
        torch.cuda.set_device(0)
        options["device_id"] = torch.device("cuda", 0)
    folder = tempfile.mkdtemp()  # in the folder of temporary files of `make gpu`, which is removed
    dist.init_process_group(
        "gloo" if dry_run else "nccl", init_method=f"file://{folder}/store", rank=0, world_size=1, **options
    )
    atexit.register(dist.destroy_process_group)
    return TorchRanks(dist.group.WORLD)
