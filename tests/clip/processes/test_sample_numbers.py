"""The numbers of the samples, divided among processes: each stores a part, and a checkpoint holds all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from drrho_clip.config import TrainConfig
from drrho_clip.data import HostBatch
from drrho_clip.data.splits import open_splits
from drrho_clip.errors import AgreedError
from drrho_clip.models import ModelSpec
from drrho_clip.plan.memory import memory_of_run
from drrho_clip.processes.one import OneProcess
from drrho_clip.run import Run, describe_run, remove_unused_estimates
from drrho_clip.sample_numbers import SampleNumbers, check_home, rows_of_all_processes
from drrho_core.backend import get_backend
from helpers.thread_processes import ThreadProcesses

N, B = 10, 6
CONFIG = TrainConfig(data="digits", method="fastclip-v2", backend="numpy", dtype="float64", estimator="split")
BACKEND = get_backend("numpy", dtype="float64")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with a temperature per sample, whose processes divide the numbers of the samples."""
    return describe_run(tmp_path / "run", CONFIG, open_splits(CONFIG).train)


def _trained(run: Run, processes: Any) -> tuple[SampleNumbers, list[float]]:
    """Return the numbers after two steps, and the estimates that the second step has read for the own pairs."""
    numbers, generator = SampleNumbers(run, BACKEND, N, processes), np.random.default_rng(0)
    read = []
    for _ in range(2):
        rows, results = generator.permutation(N)[:B], generator.uniform(0.1, 1.0, (4, B))
        own = slice(processes.rank * B // processes.size, (processes.rank + 1) * B // processes.size)
        empty = np.zeros((B // processes.size, 1))
        batch: Any = HostBatch(rows[own], empty, empty, whole_index=rows if processes.size > 1 else None)
        read = numbers.of_batch(batch)[0].tolist()
        image, text, *slopes = (result[own] for result in results)
        result: Any = SimpleNamespace(
            log_inner_image=image, log_inner_text=text, temperature_gradient=tuple(1e-3 * slope for slope in slopes)
        )
        numbers.after_step(batch, result)
    return numbers, read


@pytest.mark.parametrize("size", [2, 3, 6])
def test_divided_numbers_are_those_of_one_process_and_each_process_stores_a_part(run: Run, size: int) -> None:
    alone, expected = _trained(run, OneProcess(BACKEND))

    def work(processes: ThreadProcesses) -> Any:
        numbers, read = _trained(run, processes)
        again = SampleNumbers(run, BACKEND, N, processes)
        again.load(alone.whole())
        saved = numbers.gathered(), again.gathered()
        arrays = *numbers.estimator.state_dict().values(), numbers.own_temperature()["momentum_text"]
        stored = [len(array) for array in arrays]
        return read, saved, numbers.whole(), stored, numbers.shapes()

    results = ThreadProcesses.run(size, work)
    assert [row for read, *_ in results for row in read] == expected
    most = -(-N // size)
    for rank, (_, saved, whole, stored, shapes) in enumerate(results):
        assert stored == [min(most, max(0, N - rank * most))] * 3
        assert shapes == {name: array.shape for name, array in alone.whole().items()}
        for gathered in saved:
            # The first process alone holds the numbers of all samples.
            found = gathered | whole
            assert found.keys() == (alone.whole().keys() if rank == 0 else whole.keys())
            for name, array in found.items():
                np.testing.assert_allclose(array, alone.whole()[name], rtol=1e-13)


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_rows_are_gathered_in_blocks_and_parts_may_be_empty(at_once: int) -> None:
    parts = [np.asarray([1.0, 2.0, 3.0]), np.asarray([4.0]), np.asarray([])]

    def work(processes: ThreadProcesses) -> Any:
        return rows_of_all_processes(parts[processes.rank], 4, min(3 * processes.rank, 4), processes, at_once=at_once)

    first, *others = ThreadProcesses.run(3, work)
    assert first.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert others == [None, None]


def test_processes_that_exchange_arrays_in_the_step_only_refuse_to_divide() -> None:
    def work(processes: ThreadProcesses) -> None:
        check_home(CONFIG, BACKEND, processes)
        processes.exchanges_between_steps = False
        check_home(replace(CONFIG, estimator="host"), BACKEND, processes)
        with pytest.raises(AgreedError, match=r"estimator must be device, host or file .* numpy .*, got 'split'"):
            check_home(CONFIG, BACKEND, processes)

    ThreadProcesses.run(2, work)


def test_files_of_estimates_that_no_process_uses_are_removed(run: Run) -> None:
    run.folder.mkdir()
    for home, size, left in (("file", 2, ["estimator-1.bin", "estimator.bin"]), ("split", 4, [])):
        for rank in range(4):
            run.estimator_file_of(rank).touch()
        remove_unused_estimates(replace(run, config=replace(CONFIG, estimator=home)), size)
        assert sorted(path.name for path in run.folder.iterdir()) == left


def test_the_plan_counts_the_part_of_a_process() -> None:
    spec = ModelSpec("mlp", image_size=8, channels=1, vocabulary_size=20, context_length=6, width=16, depth=1)
    sizes: dict[str, Any] = {"num_pairs": 1000, "num_images": 0}
    for number, stored in ((1, 1000), (4, 250)):
        parts = dict(memory_of_run(CONFIG, spec, BACKEND, **sizes, num_ranks=number))
        assert (parts["inner estimates"], parts["temperatures"]) == (16 * stored, 32 * stored)
