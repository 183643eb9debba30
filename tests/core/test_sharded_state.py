"""State that ranks share by sample id: the same rows, training runs and errors as one table that holds everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import (
    InnerEstimator,
    PerSampleTemperature,
    ThreadRanks,
    contrastive_step,
    sharded_contrastive_step,
)
from helpers.ranks import own_rows
from helpers.spaces import build

NEVER = -np.inf
NUM_STEPS = 20


class CountingRanks(ThreadRanks):
    """Ranks that count what they receive from every other rank, in numbers by item size."""

    received: dict[int, int]

    def count(self, arrays: tuple[Any, ...], share: int) -> None:
        for x in arrays:
            counts = self.__dict__.setdefault("received", {})
            counts[x.dtype.itemsize] = counts.get(x.dtype.itemsize, 0) + x.size // share

    def all_gather(self, arrays: tuple[Any, ...], /) -> tuple[Any, ...]:
        self.count(arrays, 1)
        return super().all_gather(arrays)

    def all_to_all(self, arrays: tuple[Any, ...], /) -> tuple[Any, ...]:
        self.count(arrays, self.size)
        return super().all_to_all(arrays)


def distinct_ids(seed: int, num_samples: int, batch_size: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num_samples)[:batch_size]


def whole(space: Any, parts: list[Any]) -> np.ndarray:
    """Join the own rows of all ranks."""
    return np.concatenate([space.to_numpy(part) for part in parts])


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_ranks_read_and_write_the_rows_of_one_table(eager_space: Any, data: Any, seed: int) -> None:
    if eager_space.name == "jax":
        pytest.skip("eager JAX compiles each operation for each shape; the training runs below use it")
    num_ranks, local = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    num_samples = data.draw(st.integers(num_ranks * local, 17))
    batches = [distinct_ids(seed + t, num_samples, num_ranks * local) for t in range(3)]
    new = np.random.default_rng(seed).standard_normal((3, 2, num_ranks * local))

    def visit(ranks: Any) -> Any:
        made = InnerEstimator(num_samples, like=eager_space.asarray(np.zeros(1)), ranks=ranks)
        seen = []
        for batch, rows in zip(batches, new, strict=True):
            own = eager_space.asarray(own_rows(batch, ranks.rank, num_ranks))
            seen.append(made.gather(own))
            made = made.scatter(own, *(eager_space.asarray(own_rows(x, ranks.rank, num_ranks)) for x in rows))
        return seen, (made.log_inner_image, made.log_inner_text)

    results = ThreadRanks.run(num_ranks, visit)
    expected = InnerEstimator(num_samples, like=eager_space.asarray(np.zeros(1)))
    for t, (batch, rows) in enumerate(zip(batches, new, strict=True)):
        for side, right in enumerate(expected.gather(eager_space.asarray(batch))):
            got = whole(eager_space, [seen[t][side] for seen, _ in results])
            np.testing.assert_array_equal(got, eager_space.to_numpy(right))
        expected = expected.scatter(eager_space.asarray(batch), *(eager_space.asarray(x) for x in rows))
    for side, right in enumerate((expected.log_inner_image, expected.log_inner_text)):
        got = whole(eager_space, [state[side] for _, state in results])
        np.testing.assert_array_equal(got, eager_space.to_numpy(right))


def test_a_scatter_of_other_ids_than_the_last_gather_sends_them() -> None:
    def visit(ranks: Any) -> Any:
        made, own = InnerEstimator(4, like=np.zeros(1), ranks=ranks), np.asarray([ranks.rank])
        made.gather(own)
        # Only rank 0 asks for other ids, but no rank may rely on the ids of the last gather then.
        own = np.asarray([3]) if ranks.rank == 0 else own
        made = made.scatter(own, own + 0.5, own + 0.25)
        # The array of ids is used again for the next batch, as data loaders do.
        own[...] = 2 * ranks.rank
        made.gather(own)
        own[...] = 1 + ranks.rank
        return made.scatter(own, own * 10.0, own * 10.0).log_inner_image.tolist()

    assert ThreadRanks.run(2, visit) == [[NEVER, 10.0], [20.0, 3.5]]


def test_rows_that_were_returned_may_be_overwritten() -> None:
    def visit(ranks: Any) -> Any:
        learned, own = PerSampleTemperature(2, 0.5, like=np.zeros(1), ranks=ranks), np.asarray([ranks.rank])
        learned.gather(own)[0][...] = 0.9
        return learned.update(own, (np.zeros(1), np.zeros(1)), learning_rate=0.1).temperature_image.tolist()

    assert ThreadRanks.run(2, visit) == [[0.5], [0.5]]


def test_two_updates_of_the_same_samples_are_those_of_one_table() -> None:
    def visit(own: np.ndarray, ranks: Any) -> np.ndarray:
        learned = PerSampleTemperature(4, 0.5, like=np.zeros(1), ranks=ranks)
        learned.gather(own)
        for _ in range(2):
            slope = np.full(own.shape, 0.05)
            learned = learned.update(own, (slope, -slope), learning_rate=0.1)
        return np.stack([learned.temperature_image, learned.temperature_text, learned.momentum_image])

    right = visit(np.asarray([2, 1]), None)
    got = ThreadRanks.run(2, lambda ranks: visit(np.asarray([2 - ranks.rank]), ranks))
    np.testing.assert_allclose(np.concatenate(got, axis=1), right, rtol=1e-14)


@pytest.mark.parametrize(("num_ranks", "num_samples", "more"), [(1, 3, 4), (2, 3, 9), (3, 7, 7), (4, 5, 21)])
def test_a_table_grows_by_rows_that_were_never_written(
    num_ranks: int, num_samples: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drrho_core.state.sharded_table.BLOCK", 2)  # several messages

    def visit(ranks: Any) -> Any:
        made = InnerEstimator(num_samples, like=np.zeros(1), ranks=ranks)
        made.load_state_dict({"log_inner_image": np.arange(num_samples) + 0.5, "log_inner_text": np.zeros(num_samples)})
        grown = made.grow(more)
        return made.log_inner_image, grown.log_inner_image, grown.num_samples

    old, new, sizes = zip(*ThreadRanks.run(num_ranks, visit), strict=True)
    right = [number + 0.5 for number in range(num_samples)]
    assert np.concatenate(old).tolist() == right
    assert np.concatenate(new).tolist() == right + [NEVER] * (more - num_samples)
    assert sizes == (more,) * num_ranks


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_step_receives_8_bytes_and_4_numbers_per_pair_and_other_rank(dtype: str) -> None:
    local = 5

    def visit(ranks: Any) -> Any:
        own = np.arange(local) * ranks.size + ranks.rank
        made = InnerEstimator(40, like=np.zeros(1, dtype), ranks=ranks)
        made.scatter(own, *made.gather(own))
        estimates, ranks.received = ranks.received, {}
        learned = PerSampleTemperature(40, 0.5, like=np.zeros(1, dtype), ranks=ranks)
        learned.update(own, learned.gather(own), learning_rate=0.1)
        return estimates, ranks.received

    size = np.dtype(dtype).itemsize
    for estimates, temperatures in CountingRanks.run(4, visit):
        for received, columns in ((estimates, 2), (temperatures, 4)):
            # Two digests of 36 bytes are exchanged for the checks, and a vote of one byte if known ids come again.
            assert received.pop(1) == 2 * 36 + columns // 2
            assert sum(item * number for item, number in received.items()) == local * (8 + 2 * columns * size)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(space: Any, ranks: Any, state: str, num_samples: int, batch: int) -> tuple[np.ndarray, ...]:
    """Train linear encoders and temperatures per sample, and return weights, estimates and temperatures of all ids."""
    rng, xp = np.random.default_rng(5), space.xp
    inputs = [space.asarray(rng.standard_normal((num_samples, 6))) for _ in range(2)]
    weights = [space.asarray(rng.standard_normal((6, 4)) / 3) for _ in range(2)]
    like, shared = space.asarray(np.zeros(1)), ranks if state == "sharded" else None
    estimator = InnerEstimator(num_samples, like=like, ranks=shared)
    learned = PerSampleTemperature(num_samples, 0.3, like=like, minimum=0.1, ranks=shared)
    for t in range(NUM_STEPS):
        ids = distinct_ids(t, num_samples, batch)
        mine = ids if ranks is None else own_rows(ids, ranks.rank, ranks.size)
        own = space.asarray(mine)
        taken = [xp.take(x, own, axis=0) for x in inputs]
        features = [x @ w for x, w in zip(taken, weights, strict=True)]
        arguments = (*features, *estimator.gather(own))
        options = {"temperature": learned.gather(own), "gamma": 0.7, "eps": 1e-3, "radius": 0.2}
        if ranks is None:
            step = contrastive_step(*arguments, **options)
        else:
            step = sharded_contrastive_step(*arguments, ranks=ranks, **options)
        new, slopes = (step.log_inner_image, step.log_inner_text), step.temperature_gradient
        pulls = tuple(x.T @ g for x, g in zip(taken, (step.image_gradient, step.text_gradient), strict=True))
        if ranks is not None:
            pulls = ranks.all_sum(pulls)
        if state == "replicated":
            # Every rank stores all rows, so it needs the new rows of all ranks.
            own = space.asarray(ids)
            new, slopes = (tuple(xp.reshape(x, (-1,)) for x in ranks.all_gather(pair)) for pair in (new, slopes))
        estimator = estimator.scatter(own, *new)
        learned = learned.update(own, slopes, learning_rate=0.05)
        weights = [w - 0.1 * pull for w, pull in zip(weights, pulls, strict=True)]
    rows = (estimator.log_inner_image, estimator.log_inner_text, learned.temperature_image, learned.momentum_text)
    return tuple(space.to_numpy(x) for x in (*weights, *rows))


@pytest.mark.parametrize(("name", "num_ranks"), [("numpy", 3), ("numpy", 4), ("torch", 2), ("jax", 2)])
def test_training_with_sharded_state_is_training_with_replicated_state_and_on_one_rank(
    name: str, num_ranks: int
) -> None:
    space, num_samples, batch = build(name, "float64"), 29, 12
    right = train(space, None, "own", num_samples, batch)
    sharded = ThreadRanks.run(num_ranks, lambda ranks: train(space, ranks, "sharded", num_samples, batch))
    # Eager JAX takes a second per step on two ranks, so its replicated run is left out.
    replicated = ThreadRanks.run(
        num_ranks, lambda ranks: name != "jax" and train(space, ranks, "replicated", num_samples, batch)
    )
    assert not np.array_equal(right[4], np.full(num_samples, 0.3))  # temperatures have moved
    for place, expected in enumerate(right):
        got = sharded[0][place] if place < 2 else np.concatenate([rank[place] for rank in sharded])
        for rank in filter(None, replicated):
            np.testing.assert_array_equal(got, rank[place])
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Errors, and states of a rank
# ---------------------------------------------------------------------------------------------------------------------


def errors(num_ranks: int, call: Any) -> list[str]:
    """Return the message that each rank raises; the table must not change."""

    def visit(ranks: Any) -> str:
        made = InnerEstimator(6, like=np.zeros(1), ranks=ranks)
        own = np.asarray([ranks.rank])
        made = made.scatter(own, own + 1.0, own + 1.0)
        before = made.state_dict()
        with pytest.raises((TypeError, ValueError)) as caught:
            call(made, ranks)
        for column, array in made.state_dict().items():
            np.testing.assert_array_equal(array, before[column])
        return str(caught.value)

    return ThreadRanks.run(num_ranks, visit)


def ids(ranks: Any, on_rank_1: Any, dtype: str = "int64") -> np.ndarray:
    return np.asarray(on_rank_1 if ranks.rank == 1 else [ranks.rank], dtype=dtype)


def test_an_id_on_two_ranks_is_one_error_on_all_ranks() -> None:
    message = (
        "sample_index must not repeat an index within a batch, got 2 on rank 1 and on rank 2 (torch's "
        "DistributedSampler repeats samples unless drop_last=True)"
    )
    assert errors(3, lambda made, ranks: made.gather(ids(ranks, [2]))) == [message] * 3
    one = np.ones(1)
    assert errors(3, lambda made, ranks: made.scatter(ids(ranks, [2]), one, one)) == [message] * 3


def test_an_error_of_one_rank_is_raised_on_all_ranks() -> None:
    for wrong, words in (
        ([6], "hold row ids from 0 to 5"),
        ([1, 1], "must not repeat an index within a batch, got 1 twice"),
        ([1, 2], r"must be the same on all ranks, got shape (1,)"),
        ([[1]], "must have shape (batch_size,)"),
    ):
        every = errors(3, lambda made, ranks, wrong=wrong: made.gather(ids(ranks, wrong)))
        for rank, message in enumerate(every):
            assert words in message, (rank, message)
    nan = errors(
        2,
        lambda made, ranks: made.scatter(ids(ranks, [1]), np.full(1, np.nan if ranks.rank else 0.0), np.zeros(1)),
    )
    assert all("log_inner_image" in message for message in nan)
    rate = errors(
        2,
        lambda _, ranks: PerSampleTemperature(4, 0.5, like=np.zeros(1), ranks=ranks).update(
            ids(ranks, [1]), (np.zeros(1), np.zeros(1)), learning_rate=0.1 * (1 + ranks.rank)
        ),
    )
    wrong_state = {"log_inner_image": np.zeros(6)}
    for call in (
        lambda made, ranks: made.load_state_dict(wrong_state if ranks.rank else made.state_dict()),
        lambda _, ranks: PerSampleTemperature(4, 0.5, like=np.zeros(1), ranks=ranks).load_state_dict(wrong_state),
        lambda made, ranks: made.grow(6 - ranks.rank),
        lambda made, ranks: made.grow(6 + ranks.rank),
    ):
        assert len(set(errors(2, call))) == 1
    assert rate == ["learning_rate must be the same on all ranks, got 0.1 on rank 0 and 0.2 on rank 1"] * 2


def test_the_state_of_a_rank_is_taken_by_this_rank_only_and_the_whole_state_by_all() -> None:
    def visit(ranks: Any) -> Any:
        like = np.zeros(1)
        made = InnerEstimator(5, like=like, ranks=ranks)
        state = {name: np.arange(5.0) + ranks.size for name in ("log_inner_image", "log_inner_text")}
        made.load_state_dict(state)
        again = InnerEstimator(5, like=like, ranks=ranks)
        again.load_state_dict(made.state_dict())
        assert again.log_inner_text.tolist() == made.log_inner_text.tolist()
        learned = PerSampleTemperature(5, 0.25, like=like, ranks=ranks)
        learned.load_state_dict(learned.state_dict())
        (other,) = ranks.shift((made.state_dict()["rows"],))
        if ranks.size > 1:
            own = {name: x for name, x in made.state_dict().items() if name != "rows"}
            with pytest.raises(ValueError, match=r"must have shape \(num_samples,\) in a state without rows = \(5,\)"):
                again.load_state_dict(own)
            with pytest.raises(ValueError, match=r"rows must be \[.*, got \["):
                again.load_state_dict(made.state_dict() | {"rows": other})
        return made.log_inner_image

    for num_ranks in (1, 2, 4):
        got = np.concatenate(ThreadRanks.run(num_ranks, visit))
        assert got.tolist() == (np.arange(5.0) + num_ranks).tolist()
