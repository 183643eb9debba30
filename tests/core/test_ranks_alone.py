"""An argument that is wrong on one rank only is an error on all ranks, so no rank waits for a rank that has stopped.

A test here lets every rank catch the own error and compares the messages. If a rank stops while another rank waits for
it, `ThreadRanks` reports another message: that the rank has already returned.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drrho_torch.accumulation import RepeatedRows
from drrho_torch.adapter import EstimatorAdapter
from drrho_torch.step_function import StepSettings, evaluate

from drrho_core import (
    InnerEstimator,
    PerSampleTemperature,
    ThreadRanks,
    distillation_loss,
    fused_kernels,
    info_nce,
    load_shards,
    save_shards,
    sharded_contrastive_step,
    sigmoid_loss,
    unimodal_contrastive_step,
)
from drrho_core.state.inner import COLUMNS, OWNER
from drrho_core.state.sharded_table import ShardedTable
from drrho_core.state.table import ArrayTable
from helpers import problems

NUM_RANKS = 3
P = problems.draw(1, b=6)


def own(ranks: Any, *arrays: Any) -> list[Any]:
    """Return two rows of each array, or one row if the test has set ``ranks.short``."""
    stop = 2 * ranks.rank + (1 if getattr(ranks, "short", False) else 2)
    return [x[2 * ranks.rank : stop] for x in arrays]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sharded_contrastive_step": lambda ranks, a, **how: sharded_contrastive_step(
        *own(ranks, *a), *own(ranks, *P.arrays[2:]), ranks=ranks, temperature=0.5, **how
    ),
    "unimodal_contrastive_step": lambda ranks, a, **how: unimodal_contrastive_step(
        *own(ranks, *a), *own(ranks, *P.arrays[2:]), ranks=ranks, temperature=0.5, **how
    ),
    "info_nce": lambda ranks, a, **how: info_nce(*own(ranks, *a), ranks=ranks, temperature=0.5, **how),
    "sigmoid_loss": lambda ranks, a, **how: sigmoid_loss(*own(ranks, *a), ranks=ranks, scale=2.0, bias=0.0, **how),
    "distillation_loss": lambda ranks, a, **how: distillation_loss(
        *own(ranks, *a, *(P.reference_features or ())),
        ranks=ranks, temperature=0.5, reference_temperature=0.5, **how,
    ),
}  # fmt: skip


def errors(work: Callable[[Any, bool], Any]) -> list[str]:
    """Return the error of each rank of ``work(ranks, wrong)``; `wrong` is True on rank 1 only."""

    def caught(ranks: Any) -> str:
        try:
            work(ranks, ranks.rank == 1)
        except (TypeError, ValueError, MemoryError, UserWarning) as error:
            return str(error)
        return "no error"

    return ThreadRanks.run(NUM_RANKS, caught)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"tile_size": 0}, "tile_size must be at least 1, got 0"),
        ({"memory_budget": -1}, "memory_budget must be at least 0, got -1"),
        ({"tile_size": "large"}, "tile_size must be an integer, got 'large'"),
        ({"form": "tree"}, "form must be 'reduce' or 'ring', got 'tree'"),
    ],
)
def test_a_wrong_setting_of_one_rank_is_an_error_on_all(function: str, how: dict[str, Any], words: str) -> None:
    every = errors(lambda ranks, wrong: FUNCTIONS[function](ranks, P.arrays[:2], **(how if wrong else {})))
    assert every == [f"rank 1 refuses its arguments: {words}"] * NUM_RANKS


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_argument_of_one_rank_that_is_no_array_is_an_error_on_all(function: str) -> None:
    def call(ranks: Any, wrong: bool) -> None:
        images = P.image_features.tolist() if wrong else P.image_features
        FUNCTIONS[function](ranks, (images, P.text_features))

    every = errors(call)
    assert len(set(every)) == 1
    assert "_features must be an array, got list" in every[0]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_unequal_local_batches_are_an_error_on_all(function: str) -> None:
    def call(ranks: Any, wrong: bool) -> None:
        ranks.short = wrong
        FUNCTIONS[function](ranks, P.arrays[:2])

    message = "batch_size must be the same on all ranks, got 2 on ranks 0, 2 and 1 on rank 1"
    assert errors(call) == [message] * NUM_RANKS


@pytest.mark.parametrize("function", ["sharded_contrastive_step", "info_nce"])
def test_fused_kernels_that_one_rank_demands_are_an_error_on_all(function: str) -> None:
    def call(ranks: Any, wrong: bool) -> None:
        with fused_kernels("always" if wrong else "auto"):
            FUNCTIONS[function](ranks, P.arrays[:2])

    every = errors(call)
    assert len(set(every)) == 1
    assert "because several ranks share the batch, got 'always'" in every[0]


def estimator(ranks: Any) -> InnerEstimator:
    return InnerEstimator(6, like=np.zeros(1), ranks=ranks)


def test_memory_that_one_rank_lacks_to_grow_is_an_error_on_all() -> None:
    def call(ranks: Any, wrong: bool) -> None:
        made: list[int] = []

        def make(rows: int) -> Any:
            made.append(rows)
            if wrong and len(made) > 1:
                raise MemoryError("no room for the rows")
            return ArrayTable(COLUMNS, rows, like=np.zeros(1), owner=OWNER)

        ShardedTable(make, 6, ranks).grow(60)

    assert errors(call) == ["rank 1 refuses its arguments: no room for the rows"] * NUM_RANKS


@pytest.mark.parametrize(
    "state", [estimator, lambda ranks: PerSampleTemperature(6, 0.5, like=np.zeros(1), ranks=ranks)]
)
def test_a_folder_of_one_rank_that_is_no_path_is_an_error_on_all(state: Any, tmp_path: Path) -> None:
    def save(ranks: Any, folder: Any) -> None:
        save_shards(state(ranks), folder, step=1)

    def load(ranks: Any, folder: Any) -> None:
        load_shards(state(ranks), folder)

    ThreadRanks.run(NUM_RANKS, lambda ranks: save(ranks, tmp_path))
    for function in (save, load):
        every = errors(lambda ranks, wrong, function=function: function(ranks, 3 if wrong else os.fspath(tmp_path)))
        assert len(set(every)) == 1
        assert re.match("rank 1 refuses its arguments: .*not '?int", every[0]), every


@pytest.mark.parametrize("split", [False, True])
def test_a_warning_that_is_an_error_on_one_rank_comes_after_the_last_exchange(split: bool) -> None:
    features = [torch.from_numpy(x) for x in P.arrays[:2]]
    stored = []

    def call(ranks: Any, wrong: bool) -> None:
        images, texts = (x.clone().requires_grad_() for x in own(ranks, *features))
        index = torch.arange(2) + 2 * ranks.rank
        buffers = [torch.full((6,), -torch.inf, dtype=torch.float64) for _ in range(2)]
        rows = InnerEstimator(6, like=buffers[0], ranks=ranks if split else None)
        settings = StepSettings(
            training=True, update=True, gamma=0.5, eps=0.0, reference_weight=1.0, radius=0.0, tile_size=None,
            memory_budget=None, table=EstimatorAdapter(rows), repeated=RepeatedRows(), pairs=(False, False, False),
            ranks=ranks,
        )  # fmt: skip
        arguments = (images, texts, index, None, None, None, None, None, None, None, 0.5, None)
        with torch.no_grad():
            evaluate(settings, *arguments)
            if not wrong:
                settings = settings._replace(repeated=None)
            try:
                evaluate(settings, *arguments)
            finally:
                stored.append(ranks.rank)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every = errors(call)
    assert [message.split(" ")[0] for message in every] == ["no", "ContrastiveLoss", "no"]
    assert sorted(stored) == [0, 1, 2]
