"""Ranks whose arrays lie on a device: the host does not read them in a step, because reading would wait for the device.

The tests imitate such a device: they use arrays on the host, and let the library believe that reading is not free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest
import torch
from drrho_torch import HostEstimator, step_function
from drrho_torch.adapter import EstimatorAdapter
from drrho_torch.step_function import StepSettings, evaluate

from drrho_core import (
    InnerEstimator,
    ThreadRanks,
    _array_api,
    _validate,
    sharded_contrastive_step,
    unimodal_contrastive_step,
)
from drrho_core.contrastive.step import wide_contrastive_step
from helpers import problems

NUM_RANKS, NUM_SAMPLES, LOCAL, WIDTH = 2, 5, 2, 7
FEATURES = [torch.from_numpy(x) for x in problems.draw(2, b=NUM_RANKS * LOCAL, d=WIDTH).arrays[:2]]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every array be one whose values the host does not read at no cost."""
    for module in (_array_api, _validate):
        monkeypatch.setattr(module, "all_on_host", lambda *_: False)


def settings(ranks: Any, table: Any, **options: Any) -> StepSettings:
    """Return the settings of a training call."""
    defaults: dict[str, Any] = {
        "training": True, "update": True, "gamma": 0.5, "eps": 0.0, "reference_weight": 1.0, "radius": 0.0,
        "tile_size": None, "memory_budget": None, "repeated": None, "pairs": (False, False, False),
    }  # fmt: skip
    return StepSettings(**defaults | options, table=table, ranks=ranks)


def loss_of(call: StepSettings, index: Any, buffers: Any = (None, None), temperature: Any = 0.5) -> float:
    """Return the loss of one call with the own pairs of a rank, after a test that it is nan if its gradients are."""
    own = FEATURES
    if call.ranks is not None:
        start = LOCAL * call.ranks.rank
        own = [x[start : start + LOCAL] for x in FEATURES]
    constants = (None, None, None, None, None, temperature, None)
    with torch.no_grad():
        loss, *gradients = evaluate(call, *own, torch.as_tensor(index), *buffers, *constants)
    assert [bool(torch.isnan(x).all()) for x in gradients[:2]] == [bool(torch.isnan(loss))] * 2
    return loss.item()


@pytest.mark.parametrize("wrong", [-1, 5, 6])
def test_a_split_table_has_no_numbers_for_an_index_out_of_range(wrong: int) -> None:
    def visit(ranks: Any) -> None:
        made = InnerEstimator(NUM_SAMPLES, like=np.zeros(1), ranks=ranks)
        index = np.asarray([ranks.rank, wrong if ranks.rank else 3])
        first, _ = made.gather(index)
        assert np.isnan(first).tolist() == [False, ranks.rank == 1]
        made = made.scatter(index, np.ones(2), np.ones(2))
        # The rows of the other ids are written, and no other row is.
        stored = [1.0, 1.0, -np.inf] if ranks.rank == 0 else [1.0, -np.inf]
        assert made.log_inner_image.tolist() == stored

    ThreadRanks.run(NUM_RANKS, visit)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("wrong", [-1, 5, 6])
@pytest.mark.parametrize("home", ["split", "whole"])
def test_a_step_with_a_table_and_an_index_out_of_range_is_nan_and_changes_nothing(
    home: str, wrong: int, gamma: float
) -> None:
    def visit(ranks: Any) -> None:
        made = InnerEstimator(NUM_SAMPLES, like=FEATURES[0], ranks=ranks if home == "split" else None)
        call = settings(ranks, EstimatorAdapter(made), gamma=gamma)
        assert np.isfinite(loss_of(call, [ranks.rank, 2 + ranks.rank]))
        before = made.log_inner_image.clone()
        assert np.isnan(loss_of(call, [ranks.rank, wrong if ranks.rank else 2]))
        assert torch.equal(made.log_inner_image, before)
        assert not torch.isnan(before).any()

    ThreadRanks.run(NUM_RANKS, visit)


def buffers() -> tuple[Any, Any]:
    """Return the estimates of a loss that keeps all rows."""
    return torch.full((NUM_SAMPLES,), -np.inf), torch.full((NUM_SAMPLES,), -np.inf)


ON_HOST: dict[str, Callable[[], Any]] = {
    "torch": lambda: HostEstimator(NUM_SAMPLES, device="cpu"),
    "numpy": lambda: InnerEstimator(NUM_SAMPLES, like=np.zeros(1, dtype="float32")),
}


@pytest.fixture
def estimators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return an estimator per rank whose memory the host reads at no cost, although it does not read the features."""
    made = [ON_HOST[request.param]() for _ in range(NUM_RANKS)]
    memory = {x.log_inner_image.untyped_storage().data_ptr() for x in made if isinstance(x, HostEstimator)}

    def is_readable(array: Any) -> bool:
        return isinstance(array, np.ndarray) or array.untyped_storage().data_ptr() in memory

    for module in (_array_api, _validate):
        monkeypatch.setattr(module, "all_on_host", lambda arrays, _: any(map(is_readable, arrays)))
    return made


REPEATED = "sample_index must not repeat an index within a batch, got"
OUT_OF_RANGE = "sample_index must hold row ids from 0 to 4 "


@pytest.mark.parametrize("estimators", ON_HOST, indirect=True)
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize(
    ("wrong", "message"), [([2, 2], f"{REPEATED} 2 twice"), ([-1, 2], OUT_OF_RANGE), ([5, 2], OUT_OF_RANGE)]
)
def test_a_wrong_id_of_one_rank_is_an_error_on_all_ranks_if_the_estimates_are_on_the_host(
    estimators: list[Any], wrong: list[int], message: str, update: bool
) -> None:
    def visit(ranks: Any) -> str:
        made = estimators[ranks.rank]
        call = settings(ranks, EstimatorAdapter(made), update=update)
        assert np.isfinite(loss_of(call, [ranks.rank, 2 + ranks.rank]))
        before = made.log_inner_image + 0.0
        with pytest.raises(ValueError) as caught:
            loss_of(call, wrong if ranks.rank else [0, 1])
        assert np.array_equal(made.log_inner_image, before)
        return str(caught.value)

    (received,) = set(ThreadRanks.run(NUM_RANKS, visit))
    assert received.startswith(f"rank 1 refuses its arguments: {message}")


@pytest.mark.parametrize("estimators", ON_HOST, indirect=True)
def test_an_id_on_two_ranks_is_an_error_on_both_if_the_estimates_are_on_the_host(estimators: list[Any]) -> None:
    def visit(ranks: Any) -> None:
        made = estimators[ranks.rank]
        with pytest.raises(ValueError, match=f"{REPEATED} 3 twice"):
            loss_of(settings(ranks, EstimatorAdapter(made)), [ranks.rank, 3])
        assert np.array_equal(made.log_inner_image, np.full(NUM_SAMPLES, -np.inf))

    ThreadRanks.run(NUM_RANKS, visit)


@pytest.mark.parametrize("estimators", ON_HOST, indirect=True)
def test_one_process_with_estimates_on_the_host_refuses_wrong_ids_and_sends_no_ids_to_the_device(
    estimators: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = settings(None, EstimatorAdapter(estimators[0]))
    for wrong, message in (([4, 0, 3, 4], f"{REPEATED} 4 twice"), ([4, 0, 3, 5], OUT_OF_RANGE)):
        with pytest.raises(ValueError, match=message):
            loss_of(call, wrong)

    def step(*arrays: Any, **options: Any) -> Any:
        assert options["sample_index"] is None
        assert options["in_range"] is None
        return wide_contrastive_step(*arrays, **options)

    monkeypatch.setattr(step_function, "wide_contrastive_step", step)
    assert np.isfinite(loss_of(call, [4, 0, 3, 1]))


@pytest.mark.parametrize("estimators", ["torch"], indirect=True)
def test_the_first_call_refuses_estimates_on_the_host_of_one_rank_only(estimators: list[Any]) -> None:
    def visit(ranks: Any) -> str:
        table = EstimatorAdapter(estimators[0]) if ranks.rank else None
        with pytest.raises(ValueError) as caught:
            loss_of(
                settings(ranks, table, wait=True), [ranks.rank, 2 + ranks.rank], (None, None) if table else buffers()
            )
        return str(caught.value)

    message = "estimator_on_host must be the same on all ranks, got False on rank 0 and True on rank 1"
    assert ThreadRanks.run(NUM_RANKS, visit) == [message] * NUM_RANKS


@pytest.mark.parametrize("argument", ["eps", "radius", "temperature", "tensor"])
def test_the_first_call_compares_the_options_of_all_ranks(argument: str) -> None:
    def visit(ranks: Any) -> str:
        options = {} if argument in ("temperature", "tensor") else {argument: 0.25 + ranks.rank}
        temperature = 0.5 if options else 0.25 + ranks.rank
        temperature = torch.tensor(temperature) if argument == "tensor" else temperature
        with pytest.raises(ValueError) as caught:
            loss_of(
                settings(ranks, None, wait=True, **options),
                [2 * ranks.rank, 1 + 2 * ranks.rank],
                buffers(),
                temperature,
            )
        return str(caught.value)

    name, kind = ("temperature", " (float32)") if argument == "tensor" else (argument, "")
    message = f"{name} must be the same on all ranks, got 0.25{kind} on rank 0 and 1.25{kind} on rank 1"
    assert ThreadRanks.run(NUM_RANKS, visit) == [message] * NUM_RANKS


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("home", ["buffers", "split", "whole"])
def test_an_id_on_two_ranks_makes_the_loss_nan_and_changes_nothing(home: str, gamma: float) -> None:
    def visit(ranks: Any) -> None:
        kept, table = (None, None), None
        if home == "buffers":
            kept = buffers()
        else:
            table = InnerEstimator(NUM_SAMPLES, like=FEATURES[0], ranks=ranks if home == "split" else None)
        call = settings(ranks, None if table is None else EstimatorAdapter(table), gamma=gamma)
        assert np.isfinite(loss_of(call, [ranks.rank, 2 + ranks.rank], kept))
        state = kept[0] if table is None else table.log_inner_image
        before = state.clone()
        assert np.isnan(loss_of(call, [ranks.rank, 3], kept))
        assert torch.equal(state, before)

    ThreadRanks.run(NUM_RANKS, visit)


STEPS: dict[str, Callable[..., Any]] = {
    "two sides": sharded_contrastive_step, "two views": unimodal_contrastive_step,
}  # fmt: skip


def check_step(kind: str, ranks: Any, index: Any, *, valid: bool) -> None:
    """Take a step of the own pairs with these row ids; all results are numbers, or nan beside the old estimates."""
    own = slice(None) if ranks is None else slice(LOCAL * ranks.rank, LOCAL * ranks.rank + LOCAL)
    arrays, old = [x.numpy()[own] for x in FEATURES], np.linspace(0.1, 0.9, 4)[own]
    how = {} if ranks is None else {"ranks": ranks}
    *numbers, first, second = STEPS[kind](*arrays, old, old, temperature=0.5, sample_index=np.asarray(index), **how)
    assert [bool(np.all(np.isnan(x))) for x in numbers] == [not valid] * 5
    assert [np.array_equal(x, old) for x in (first, second)] == [not valid] * 2


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_of_ranks_is_nan_and_keeps_the_estimates_if_an_id_occurs_twice(kind: str) -> None:
    def visit(ranks: Any) -> None:
        check_step(kind, ranks, [ranks.rank, 2 + ranks.rank], valid=True)
        check_step(kind, ranks, [ranks.rank, 3], valid=False)

    ThreadRanks.run(NUM_RANKS, visit)


def test_a_step_of_one_rank_is_nan_and_keeps_the_estimates_if_an_id_occurs_twice() -> None:
    check_step("two views", None, [4, 0, 3, 1], valid=True)
    check_step("two views", None, [4, 0, 3, 4], valid=False)


@pytest.mark.parametrize("kind", STEPS)
def test_the_mark_of_a_valid_batch_takes_no_array_as_large_as_the_features(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: set[tuple[int, ...]] = set()

    def where(condition: Any, first: Any, second: Any) -> Any:
        made = np.where(condition, first, second)
        shapes.add(made.shape)
        return made

    monkeypatch.setattr(array_api_compat.numpy, "where", where)
    ThreadRanks.run(NUM_RANKS, lambda ranks: check_step(kind, ranks, [ranks.rank, 3], valid=False))
    assert (LOCAL,) in shapes
    assert (LOCAL, WIDTH) not in shapes


@pytest.mark.parametrize("home", ["buffers", "object"])
def test_one_process_treats_an_id_that_occurs_twice_as_many_do(home: str) -> None:
    kept = buffers() if home == "buffers" else (None, None)
    table = None if home == "buffers" else InnerEstimator(NUM_SAMPLES, like=FEATURES[0])
    call = settings(None, None if table is None else EstimatorAdapter(table))
    state = kept[0] if table is None else table.log_inner_image
    assert np.isfinite(loss_of(call, [4, 0, 3, 1], kept))
    before = state.clone()
    assert np.isnan(loss_of(call, [4, 0, 3, 4], kept))
    assert torch.equal(state, before)
