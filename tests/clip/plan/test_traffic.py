"""The traffic model: the exchanges that it lists are those of the steps, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.many_devices.counted_ranks import CountedRanks
from drrho_clip.plan.exchanges import Message, received_by_purpose
from drrho_clip.plan.traffic import SharedStep, messages, received_bytes
from drrho_core import InnerEstimator, ThreadRanks, sharded_contrastive_step
from helpers import problems
from helpers.ranks import own_rows

LOCAL, WIDTH = 3, 5

# Each case: options of the problem, and the sizes that differ from those of the plain step.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"r": None}, {}),
    "reference": ({"r": 3}, {"reference_dim": 3}),
    "mask": ({"r": None, "mask": "empty"}, {"masked": True}),
    "temperatures": ({"r": None, "per_anchor_temperature": True}, {"per_anchor": True}),
    "all": (
        {"r": 3, "mask": "empty", "per_anchor_temperature": True},
        {"reference_dim": 3, "masked": True, "per_anchor": True},
    ),
}


def counted(world_size: int, form: str, options: dict[str, Any], dtype: str, estimates: str) -> list[CountedRanks]:
    """Take the own part of a step on each rank, and return the ranks with their counts.

    If `dtype` is float16, it is that of the learner's features, and all other arrays are float32.
    """
    wide = "float32" if dtype == "float16" else dtype
    total = world_size * LOCAL
    p = problems.draw(0, b=total, d=WIDTH, **options)

    def cast(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(cast, value))
        return value.astype(wide) if getattr(value, "dtype", None) == np.float64 else value

    ids = np.random.default_rng(1).permutation(2 * total)[:total]

    def step(ranks: ThreadRanks) -> CountedRanks:
        messenger = CountedRanks(ranks)
        images, texts, *state = (own_rows(cast(x), ranks.rank, world_size) for x in p.arrays)
        chosen = {name: own_rows(cast(value), ranks.rank, world_size) for name, value in p.options.items()}
        index = own_rows(ids, ranks.rank, world_size)
        table = InnerEstimator(2 * total, like=images, ranks=messenger) if estimates == "split" else None
        if table is not None:
            state = list(table.gather(index))
        else:
            chosen["sample_index"] = index
        images, texts = (x.astype(dtype, copy=False) for x in (images, texts))
        result = sharded_contrastive_step(images, texts, *state, ranks=messenger, form=form, **chosen)
        new = result.log_inner_image, result.log_inner_text
        if table is not None:
            table.scatter(index, *new)
        elif estimates == "all":
            messenger.all_gather((index, *new))
        messenger.all_sum((np.zeros(7, wide),))
        return messenger

    return ThreadRanks.run(world_size, step)


@pytest.mark.parametrize("estimates", ["none", "all", "split"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["reduce", "ring"])
def test_a_step_receives_exactly_the_bytes_of_the_model(form: str, name: str, dtype: str, estimates: str) -> None:
    options, sizes = CASES[name]
    feature_size = np.dtype(dtype).itemsize
    size = max(feature_size, 4)
    for world_size in (1, 2, 3, 4):
        step = SharedStep(
            world_size, LOCAL, WIDTH, feature_size, size, size, form, reference_bytes=size,
            with_ids=estimates != "split", estimates=estimates, num_parameters=7, parameter_bytes=size, **sizes,
        )  # fmt: skip
        if world_size == 1:
            # A single rank compares nothing and receives nothing.
            assert received_bytes(step) == 0.0
            continue
        by_operation: dict[str, list[float]] = {}
        for message in messages(step):
            entry = by_operation.setdefault(message.operation, [0, 0.0])
            entry[0] += message.times
            entry[1] += message.received(world_size)
        for messenger in counted(world_size, form, options, dtype, estimates):
            seen = {key: [messenger.calls[key], messenger.received[key]] for key in messenger.calls}
            assert seen == {key: pytest.approx(value) for key, value in by_operation.items()}


def test_the_formulas_of_the_docstring_are_those_of_large_batches() -> None:
    plain = SharedStep(num_ranks=4, num_local=10_000, feature_dim=512, checked=False)
    per_pair = lambda step: received_bytes(step) / step.num_local / (step.num_ranks - 1)  # noqa: E731
    assert per_pair(plain) == pytest.approx(4 * (2 * 512 + 4), rel=1e-4)
    masked = replace(plain, masked=True, per_anchor=True, reference_dim=100)
    assert per_pair(masked) == pytest.approx(4 * (2 * 512 + 100 + 1 + 5), rel=1e-4)
    # One hop home is shared by the other ranks.
    ring = replace(plain, form="ring")
    assert per_pair(ring) == pytest.approx(4 * (3 * 512 + 6 + (512 + 3) / 3), rel=1e-4)
    # Half types are sent as they are; sums and gradients are wide.
    assert per_pair(replace(plain, feature_bytes=2)) == pytest.approx(2 * 512 + 4 * (512 + 4), rel=1e-4)


def test_hops_and_purposes() -> None:
    step = SharedStep(num_ranks=4, num_local=8, feature_dim=16, num_parameters=100, checked=False)
    assert sum(m.hops(4) for m in messages(step)) == 3 + 3 + 3 + 6 + 3 + 3 + 6
    assert sum(m.hops(4) for m in messages(replace(step, form="ring"))) == 4 + 3 + 6 + 4 + 6
    assert received_by_purpose([Message("a", "shift", 5), Message("b", "shift", 1), Message("a", "shift", 2)], 2) == {
        "a": 7.0,
        "b": 1.0,
    }
