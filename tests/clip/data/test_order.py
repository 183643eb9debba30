"""The order of an epoch is a bijection, looks uniform, and stays what it is."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drrho_clip.data.order import LARGEST, rows_at
from drrho_clip.errors import BadInput

_MASK = 2**64 - 1


def _split_mix(seed: int, position: int) -> int:
    """Output `position` of SplitMix64, one step at a time and in Python's integers."""
    state = seed
    for _ in range(position + 1):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _row(position: int, n: int, seed: int, epoch: int) -> int:
    """The row at a position, written from the definition in the module's docstring."""
    digest = hashlib.sha256(f"drrho order 1 {seed} {epoch}".encode()).digest()
    keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(4)]
    a = next(side for side in itertools.count(1) if side * side >= n)
    b = next(side for side in itertools.count(1) if side * a >= n)
    while True:
        left, right = position // b, position % b
        left = (left + _split_mix(keys[0], right) % a) % a
        right = (right + _split_mix(keys[1], left) % b) % b
        left = (left + _split_mix(keys[2], right) % a) % a
        right = (right + _split_mix(keys[3], left) % b) % b
        position = left * b + right
        if position < n:
            return position


def test_generator_of_the_rounds_is_split_mix() -> None:
    # The first outputs for the seed 1234567 stand in public test vectors of SplitMix64.
    first = [_split_mix(1234567, position) for position in range(3)]
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 10, 17, 64, 97, 100])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 11), (2**80, 3)])
def test_rows_follow_the_definition(n: int, seed: int, epoch: int) -> None:
    expected = [_row(position, n, seed, epoch) for position in range(n)]
    assert rows_at(0, n, n, seed=seed, epoch=epoch).tolist() == expected


# Written down once: runs that are resumed, and programs in another language, depend on these numbers.
@pytest.mark.parametrize(
    ("n", "seed", "epoch", "start", "rows"),
    [
        (10, 3, 2, 0, [3, 7, 9, 6, 5, 0, 1, 8, 2, 4]),
        (1797, 7, 11, 0, [1651, 977, 1380, 346, 483, 968]),
        (10**9, 0, 0, 10**9 - 3, [262947511, 447719340, 268687073]),
        (2**62, 2**70, 0, 2**62 - 3, [4111921372944713117, 2099094383078543487, 4190530512893501209]),
    ],
)
def test_vectors_stay_the_same(n: int, seed: int, epoch: int, start: int, rows: list[int]) -> None:
    found = rows_at(start, start + len(rows), n, seed=seed, epoch=epoch)
    assert found.dtype == np.int64
    assert found.tolist() == rows


_SIZES = sorted(
    {
        *range(1, 70),
        *(2**k + d for k in range(7, 17) for d in (-1, 0, 1)),
        *(side * side + d for side in (10, 37, 251) for d in (-1, 0, 1)),
        *(101, 997, 1797, 7919, 65521, 65537, 100_003),
    }
)


def test_order_is_a_bijection_for_sizes_of_every_kind() -> None:
    for n in _SIZES:
        for seed, epoch in ((0, 0), (12345, n)):
            rows = rows_at(0, n, n, seed=seed, epoch=epoch)
            assert np.array_equal(np.sort(rows), np.arange(n)), (n, seed, epoch)


@given(st.data())
def test_any_part_is_a_part_of_the_whole(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 3000))
    seed, epoch = data.draw(st.integers(0, 2**70)), data.draw(st.integers(0, 2**40))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    whole = rows_at(0, n, n, seed=seed, epoch=epoch)
    np.testing.assert_array_equal(rows_at(start, stop, n, seed=seed, epoch=epoch), whole[start:stop])


@pytest.mark.parametrize("n", [10**9, 10**9 + 7, 2**40 + 1, LARGEST - 1, LARGEST])
def test_part_of_a_huge_order_has_distinct_rows_in_range(n: int) -> None:
    parts = [rows_at(start, start + 30_000, n, seed=1, epoch=2) for start in (0, n // 2, n - 30_000)]
    rows = np.concatenate(parts)
    assert np.unique(rows).size == rows.size
    assert rows.min() >= 0
    assert rows.max() < n


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {rows_at(0, 500, 500, seed=s, epoch=e).tobytes() for s in range(20) for e in range(20)}
    assert len(orders) == 400
    # Two uniform orders agree at a position with probability 1/n. The number of agreements of all 79,800 pairs of
    # orders has mean 79,800 and, since the pairs are nearly independent, a standard deviation near sqrt(79,800) = 282.
    tables = [rows_at(0, 500, 500, seed=s, epoch=e) for s in range(20) for e in range(20)]
    agreements = sum(int(np.sum(left == right)) for left, right in itertools.combinations(tables, 2))
    assert abs(agreements - 79_800) < 5 * math.sqrt(79_800)


def test_every_row_is_equally_likely_at_every_position() -> None:
    # A table of counts with fixed sums of rows and columns: for uniform orders the chi-square statistic has about
    # (n - 1)^2 degrees of freedom, so mean (n - 1)^2 and variance 2 (n - 1)^2. The bound is 5 standard deviations.
    n, epochs = 60, 3000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), rows_at(0, n, n, seed=4, epoch=epoch)] += 1
    expected = epochs / n
    statistic = float(np.sum((counts - expected) ** 2 / expected))
    assert abs(statistic - (n - 1) ** 2) < 5 * math.sqrt(2 * (n - 1) ** 2)


@pytest.mark.parametrize(("n", "batch_size"), [(120, 12), (1000, 50)])
def test_every_two_rows_share_a_batch_equally_often(n: int, batch_size: int) -> None:
    # Two rows share a batch with probability p = (B - 1) / (n - 1). The count of a pair over T epochs is binomial. The
    # bound for a single pair is that of Bernstein's inequality at a total probability of error of 1e-6 over all pairs.
    epochs = 240_000 // n
    together = np.zeros((n, n))
    for epoch in range(epochs):
        batch = np.empty(n, dtype=np.int64)
        batch[rows_at(0, n, n, seed=9, epoch=epoch)] = np.arange(n) // batch_size
        together += batch[:, None] == batch[None, :]
    above = np.triu_indices(n, 1)
    counts, p = together[above], (batch_size - 1) / (n - 1)
    log_error = math.log(2 * counts.size / 1e-6)
    variance = epochs * p * (1 - p)
    bound = log_error / 3 + math.sqrt((log_error / 3) ** 2 + 2 * variance * log_error)
    assert np.max(np.abs(counts - epochs * p)) < bound
    # Neighbours in the table, which often show the same image, and rows whose numbers differ by the width of the grid.
    for distance in (1, -(-n // math.ceil(math.sqrt(n)))):
        pairs = np.diagonal(together, distance)
        # The counts of the n - distance pairs are nearly independent, so their sum has this variance; 5 deviations.
        assert abs(pairs.sum() - pairs.size * epochs * p) < 5 * math.sqrt(2 * pairs.size * variance)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": -1}, BadInput, "start must be at least 0, got -1"),
        ({"stop": 1}, BadInput, "stop must be at least 2, got 1"),
        ({"stop": 11}, BadInput, r"stop must be at most the number of samples \(10\), got 11"),
        ({"num_samples": 2**62 + 1}, BadInput, f"num_samples must be at most {2**62}, got {2**62 + 1}"),
        ({"seed": -1}, BadInput, "seed must be at least 0, got -1"),
        ({"epoch": -1}, BadInput, "epoch must be at least 0, got -1"),
        ({"epoch": 1.0}, TypeError, "epoch must be a whole number, got 1.0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rows_at(**{"start": 2, "stop": 4, "num_samples": 10, "seed": 0, "epoch": 0, **options})


def test_empty_part_has_no_rows() -> None:
    assert rows_at(0, 0, 0, seed=0, epoch=0).tolist() == []
    assert rows_at(5, 5, 10, seed=0, epoch=0).tolist() == []
