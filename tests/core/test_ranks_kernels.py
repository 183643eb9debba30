"""Ranks whose fused kernels decline a batch on some ranks only, as kernels do on GPUs of several generations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from drrho_core import (
    InnerEstimator,
    ThreadRanks,
    _array_api,
    _validate,
    contrastive_step,
    extend,
    fused_kernels,
    info_nce,
    pair_loss,
    sharded_contrastive_step,
    sigmoid_loss,
    unimodal_contrastive_step,
)
from helpers import problems
from helpers.block_kernels import DenseBlocks
from helpers.ranks import joined, on_ranks, own_rows

REASON = "the device is too old"


@pytest.fixture
def kernels() -> Iterator[DenseBlocks]:
    """Register kernels for NumPy."""
    before, made = extend.registered("numpy"), DenseBlocks()
    extend.register("numpy", **before._replace(sweeps=lambda: made)._asdict())
    yield made
    extend.register("numpy", **before._asdict())


P = problems.draw(5, b=9)
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sharded_contrastive_step": lambda ranks: sharded_contrastive_step(
        *own_rows(P.arrays, ranks.rank, 3), temperature=0.5, ranks=ranks
    ),
    "info_nce": lambda ranks: info_nce(*own_rows(P.arrays[:2], ranks.rank, 3), temperature=0.5, ranks=ranks),
    "pair_loss": lambda ranks: pair_loss(*own_rows(P.arrays[:2], ranks.rank, 3), temperature=0.5, ranks=ranks),
}


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels_that_decline_the_batch_of_one_rank_are_an_error_on_all_where_values_are_read(
    kernels: DenseBlocks, function: str, mode: str
) -> None:
    def call(ranks: Any) -> str:
        kernels.on_rank(ranks.rank, REASON if ranks.rank == 1 else None)
        with fused_kernels(mode), pytest.raises(ValueError) as caught:
            FUNCTIONS[function](ranks)
        return str(caught.value)

    (message,) = set(ThreadRanks.run(3, call))
    expected = {
        "auto": "must be the same on all ranks, got DenseBlocks in the mode auto on ranks 0, 2 and none on rank 1",
        "always": f"must be 'never' or 'auto' here, because {REASON}, got 'always'",
    }
    before = "rank 1 refuses its arguments: " if mode == "always" else ""
    assert message == f"{before}fused_kernels {expected[mode]}"
    assert not kernels.ranks_with_blocks


WITHOUT_KERNELS: dict[str, Callable[[Any], Any]] = {
    "sigmoid_loss": lambda ranks: sigmoid_loss(
        *own_rows(P.arrays[:2], ranks.rank, 3), scale=2.0, bias=-1.0, ranks=ranks
    ),
    "unimodal_contrastive_step": lambda ranks: unimodal_contrastive_step(
        *own_rows(P.arrays, ranks.rank, 3), temperature=0.5, ranks=ranks
    ),
    "InnerEstimator": lambda ranks: InnerEstimator(9, like=np.zeros(1), ranks=ranks).gather(
        np.arange(3 * ranks.rank, 3 * ranks.rank + 3)
    ),
}


@pytest.mark.parametrize("function", WITHOUT_KERNELS)
def test_ranks_of_which_one_lacks_kernels_agree_on_a_call_that_uses_none(kernels: DenseBlocks, function: str) -> None:
    def call(ranks: Any, mode: str) -> list[Any]:
        kernels.on_rank(ranks.rank, None)
        with fused_kernels(mode):
            return [np.asarray(x).tolist() for x in WITHOUT_KERNELS[function](ranks) if not isinstance(x, tuple)]

    mixed = ThreadRanks.run(3, lambda ranks: call(ranks, "never" if ranks.rank == 1 else "auto"))
    assert mixed == ThreadRanks.run(3, lambda ranks: call(ranks, "never"))


CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": None},
    "everything": {"r": 3, "gamma": "pair", "mask": "empty", "radius": 0.3, "eps": 0.01, "reference_weight": 0.7},
    "temperatures": {"r": 3, "per_anchor_temperature": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["reduce", "ring"])
def test_ranks_with_and_without_kernels_give_the_step_of_one_rank_where_values_are_not_read(
    kernels: DenseBlocks, monkeypatch: pytest.MonkeyPatch, case: str, form: str
) -> None:
    p = problems.draw(6, b=12, **CASES[case])
    expected = contrastive_step(*p.arrays, **p.options)
    narrow = p.mapped(lambda x: x.astype("float32"), float)
    for module in (_array_api, _validate):
        monkeypatch.setattr(module, "all_on_host", lambda *_: False)

    def step(*arrays: Any, ranks: Any, **options: Any) -> Any:
        kernels.on_rank(ranks.rank, REASON if ranks.rank == 1 else None)
        return sharded_contrastive_step(*arrays, ranks=ranks, form=form, **options)

    result = joined(on_ranks(step, 3, narrow.arrays, narrow.options), np)
    assert kernels.ranks_with_blocks == {0, 2}
    for field, value in expected._asdict().items():
        np.testing.assert_allclose(getattr(result, field), value, rtol=1e-5, atol=1e-6, err_msg=field)
