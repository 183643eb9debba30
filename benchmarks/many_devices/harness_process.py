"""One of the processes of `harness.measured_runs`: `drrho train` with a stopwatch and a counter in each step."""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from drrho_torch import TorchRanks
from drrho_torch.backend import TorchBackend

from benchmarks.many_devices.counted_ranks import CountedRanks, count_messages
from benchmarks.many_devices.harness import CASES, LEFT_OUT, words_of
from benchmarks.many_devices.process import PROBE, few_bytes, loopback, timed
from drrho_clip.cli import main as drrho
from drrho_clip.config import TrainConfig
from drrho_clip.data import HostBatch
from drrho_clip.epoch_length import pairs_per_step
from drrho_clip.methods import METHODS
from drrho_clip.plan.exchanges import Message
from drrho_clip.plan.options import PlanOptions
from drrho_clip.plan.run import plan_run
from drrho_clip.processes.one import OneProcess
from drrho_clip.trainer import Trainer


class Stopwatch:
    """Measures every step of a run, and steps that this process takes alone beside it.

    Parameters
    ----------
    take_step : callable
        `Trainer.take_step`, which the watch replaces.
    counted : list of CountedRanks
        The ranks of all groups that this process has joined; the last ones are those of the run.
    select : callable, optional
        The selection of the method, which runs on the whole super-batch in every process.
    """

    def __init__(
        self, take_step: Callable[..., Any], counted: list[CountedRanks], select: Callable[..., Any] | None
    ) -> None:
        self._take_step, self._counted, self._select = take_step, counted, select
        self._large = torch.zeros(PROBE // 4)
        # The time that the last selection of a step took, by the size of the batch.
        self._selecting: dict[int, float] = defaultdict(float)
        self.rounds: list[dict[str, float]] = []
        self.figures: dict[str, Any] = {}

    def step(self, trainer: Trainer, batch: HostBatch, epoch: int) -> Any:
        """Take a step of the run; measure before and while it is taken."""
        if trainer.done == 0:
            self._begin(trainer)
        # The last step writes a line of metrics, so it is not measured, and no process takes it alone.
        if trainer.done == trainer.total_steps - 1:
            return self._take_step(trainer, batch, epoch=epoch)
        whole, share = next(self._batches), next(self._shares)
        seconds = {
            "large": timed(lambda: self._ranks.all_sum((self._large,))),
            "few bytes": timed(lambda: few_bytes(self._ranks, self._exchanges)),
            "alone": timed(lambda: self._take_step(self._alone, whole, epoch=0)),
            "alone, share": timed(lambda: self._take_step(self._small, share, epoch=0)),
        }
        for name, trainer_alone in (("selection", self._alone), ("selection, share", self._small)):
            seconds[name] = self._selecting[trainer_alone.run.config.batch_size]
        ranks, before = self._counted[-1], loopback()
        ranks.clear()
        kept: list[Any] = []
        seconds["step"] = timed(lambda: kept.append(self._take_step(trainer, batch, epoch=epoch)))
        dist.barrier()
        self.rounds.append({**seconds, "loopback": loopback() - before})
        self.figures = {"received": ranks.total, "exchanges": sum(ranks.calls.values())} | self.figures
        return kept[0]

    def select(self, learner: Any, reference: Any, batch: Any, config: TrainConfig, xp: Any) -> Any:
        """Select with the method of the run, and remember how long it took."""
        select, kept = self._select, list[Any]()
        assert select is not None
        self._selecting[config.batch_size] = timed(lambda: kept.append(select(learner, reference, batch, config, xp)))
        return kept[0]

    def _begin(self, trainer: Trainer) -> None:
        """Build the trainers of the steps alone, and plan the exchanges."""
        config, backend = trainer.run.config, trainer.backend
        options = PlanOptions(world_size=trainer.processes.size, bandwidth=1.0)
        planned = plan_run(config, backend, trainer.splits, options=options).ranks
        assert planned is not None
        self._exchanges: tuple[Message, ...] = planned.forms[config.form].exchanges
        self._ranks = TorchRanks(dist.group.WORLD)
        small = replace(config, batch_size=config.batch_size // trainer.processes.size)
        self._alone, self._small = (
            Trainer(
                replace(trainer.run, config=settings),
                backend,
                trainer.splits,
                guidance=trainer.guidance,
                processes=OneProcess(backend),
            )
            for settings in (config, small)
        )
        self._batches, self._shares = drawn(self._alone), drawn(self._small)
        self.figures = {"batch": config.batch_size, "form": config.form, "probe": PROBE}


def drawn(trainer: Trainer) -> Iterator[HostBatch]:
    """Yield the batches of a trainer, epoch by epoch."""
    config = trainer.run.config
    for epoch in range(config.epochs):
        yield from trainer.source.epoch(pairs_per_step(config), seed=config.seed, epoch=epoch)


def measure(case: str, folder: Path, counted: list[CountedRanks]) -> dict[str, Any]:
    """Train the run of a case, and return the figures of this process."""
    words = words_of(case, folder)
    name = words[len(words) - words[::-1].index("--method")]
    watch = Stopwatch(Trainer.take_step, counted, METHODS[name].select)
    selects = {} if METHODS[name].select is None else {name: METHODS[name]._replace(select=watch.select)}

    def take_step(trainer: Trainer, batch: HostBatch, *, epoch: int) -> Any:
        return watch.step(trainer, batch, epoch)

    out = folder / os.environ["WORLD_SIZE"] / case
    with mock.patch.object(Trainer, "take_step", take_step), mock.patch.dict(METHODS, selects):
        code = drrho(["train", *words, "--out", str(out)])
    if code:
        raise SystemExit(code)
    return {**watch.figures, "rounds": watch.rounds[LEFT_OUT:]}


def main() -> None:
    """Measure all cases, and write the figures of each case into a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    counted = count_messages(TorchBackend)
    for case in CASES:
        figures = measure(case, folder, counted)
        file = folder / os.environ["WORLD_SIZE"] / f"{case}-{os.environ['RANK']}.json"
        file.write_text(json.dumps(figures), encoding="utf-8")
    # Meanwhile the threads of gloo let go of the tensors of the last message; see docs/many-devices.md.
    dist.barrier()


if __name__ == "__main__":
    main()
