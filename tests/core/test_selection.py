"""RHO and JEST selection against loops over single samples, at the scale of CLIP's logits, jitted and compiled."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import select_jest, select_top_excess


def thin(space: Any) -> None:
    """JAX compiles every operation that is not jitted, and does the same."""
    if space.name == "jax" and space.jit is None:
        pytest.skip("JAX is met jitted")


def best(score: list[float], k: int) -> list[int]:
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:k]


def log_sum(values: list[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(x - top) for x in values))


def jest(L: Any, R: Any, k: int, num_chunks: int, noise: Any = None) -> list[int]:
    """The score of every sample anew for every chunk, as docs/theory writes it."""
    n, chosen = len(L), []
    for chunk in range(num_chunks):
        scores = []
        for i in range(n):
            score = -(L[i][i] - R[i][i])
            if chosen:
                score += (
                    log_sum([L[i][j] for j in chosen]) - log_sum([R[i][j] for j in chosen])
                    + log_sum([L[j][i] for j in chosen]) - log_sum([R[j][i] for j in chosen])
                ) / 2  # fmt: skip
            if noise is not None:
                score += noise[chunk][i]
            scores.append(-math.inf if i in chosen else score)
        chosen += best(scores, k // num_chunks + (1 if chunk < k % num_chunks else 0))
    return chosen


def draw(seed: int, n: int, num_chunks: int, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [scale * rng.normal(size=(n, n)), scale * rng.normal(size=(n, n)), rng.gumbel(size=(num_chunks, n))]


# ---------------------------------------------------------------------------------------------------------------------
# RHO
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_largest_excess_losses_ties_to_the_lower_index(space: Any, k: int) -> None:
    loss = np.array([1.0, 2.0, 0.5, 3.0, 2.0, -1.0, 0.5, 3.0, 2.0])
    reference = np.array([0.5, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 3.0, 0.0])
    chosen = space.run(select_top_excess, space.asarray(loss), space.asarray(reference), k=k)
    assert space.xp.isdtype(chosen.dtype, "integral")
    assert space.to_numpy(chosen).tolist() == best(list(loss - reference), k)


def test_the_weight_of_the_reference_model() -> None:
    loss, reference = np.array([3.0, 2.0, 1.0]), np.array([3.0, 0.5, -2.0])
    assert select_top_excess(loss, reference, k=3).tolist() == [2, 1, 0]
    assert select_top_excess(loss, reference, k=3, reference_weight=0.0).tolist() == [0, 1, 2]
    assert select_top_excess(loss, reference, k=1, reference_weight=np.asarray(0.5)).tolist() == [2]


def test_half_types_make_no_ties() -> None:
    # 1000 - 0.1 and 1000 - 0.2 are 1000 in float16.
    loss, reference = np.full(3, 1000.0, dtype=np.float16), np.array([0.2, 0.1, 0.3], dtype=np.float16)
    assert select_top_excess(loss, reference, k=3).tolist() == [1, 0, 2]


def test_where_nobody_looks_nan_comes_last() -> None:
    import jax

    chosen = jax.jit(functools.partial(select_top_excess, k=3))
    loss = jax.numpy.asarray([jax.numpy.nan, 1.0, 2.0])
    assert chosen(loss, jax.numpy.zeros(3, dtype=loss.dtype)).tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ((np.ones(3), np.ones(3)), {"k": 0}, ValueError, "k must be at least 1, got 0"),
        ((np.ones(3), np.ones(3)), {"k": 4}, ValueError, "k must be at most the number of samples 3, got 4"),
        ((np.ones(0), np.ones(0)), {"k": 1}, ValueError, "k must be at most the number of samples 0, got 1"),
        ((np.ones(3), np.ones(3)), {"k": 1.0}, TypeError, r"k must be an integer, got 1\.0"),
        ((np.ones((3, 1)), np.ones((3, 1))), {"k": 1}, ValueError, r"loss must have 1 axes \(num_samples,\)"),
        ((np.ones(3), np.ones(1)), {"k": 1}, ValueError, "reference_loss must have shape"),
        ((np.array([1.0, np.nan]), np.ones(2)), {"k": 1}, ValueError, "loss must be finite, got nan at position 1"),
        ((np.ones(2), np.array([np.inf, 1])), {"k": 1}, ValueError, "reference_loss must be finite, got inf"),
        ((np.ones(2), np.ones(2)), {"k": 1, "reference_weight": -1}, ValueError, "reference_weight must be >= 0"),
        ((np.ones(2), np.ones(2, dtype=np.float32)), {"k": 1}, TypeError, "reference_loss must have the dtype of loss"),
        (([1.0], np.ones(1)), {"k": 1}, TypeError, "loss must be an array, got list"),
    ],
)
def test_bad_losses_get_one_clear_error(arrays: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        select_top_excess(*arrays, **options)


# ---------------------------------------------------------------------------------------------------------------------
# JEST
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("top_k", [False, True])
def test_jest_is_the_loops(space: Any, top_k: bool, scale: float) -> None:
    thin(space)
    L, R, noise = draw(5, 9, 3, scale)
    arrays = [space.asarray(L), space.asarray(R)]
    if top_k:
        chosen = space.run(select_jest, *arrays, k=7, num_chunks=3, top_k=True)
    else:
        chosen = space.run(
            lambda a, b, g: select_jest(a, b, k=7, num_chunks=3, gumbel=g), *arrays, space.asarray(noise)
        )
    assert space.xp.isdtype(chosen.dtype, "integral")
    wanted = jest(*(space.rounded(x).tolist() for x in (L, R)), 7, 3, None if top_k else space.rounded(noise).tolist())
    assert space.to_numpy(chosen).tolist() == wanted


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 8), data=st.data())
@settings(max_examples=25)
def test_jest_is_the_loops_for_all_sizes(seed: int, n: int, data: Any) -> None:
    k, num_chunks = data.draw(st.integers(1, n)), data.draw(st.integers(1, 5))
    L, R, noise = draw(seed, n, num_chunks, data.draw(st.sampled_from([0.0, 1.0, 30.0])))
    chosen = select_jest(L, R, k=k, num_chunks=num_chunks, gumbel=noise).tolist()
    assert chosen == jest(L.tolist(), R.tolist(), k, num_chunks, noise.tolist())
    assert len(set(chosen)) == k
    assert select_jest(L, R, k=k, num_chunks=num_chunks, top_k=True).tolist() == jest(
        L.tolist(), R.tolist(), k, num_chunks
    )


def test_jest_top_k_of_ties_takes_the_lower_index() -> None:
    zeros = np.zeros((6, 6))
    assert select_jest(zeros, zeros, k=5, num_chunks=2, top_k=True).tolist() == [0, 1, 2, 3, 4]


def test_jest_survives_logits_that_no_exponential_does() -> None:
    L, R, noise = draw(7, 12, 4, 1e4)
    for dtype in (np.float64, np.float32, np.float16):
        arrays = [x.clip(-6e4, 6e4).astype(dtype) for x in (L, R, noise)]
        chosen = select_jest(*arrays[:2], k=8, num_chunks=4, gumbel=arrays[2]).tolist()
        assert chosen == jest(*(x.astype(np.float64).tolist() for x in arrays[:2]), 8, 4, arrays[2].tolist())


def test_a_batch_grows_around_what_is_hard_together() -> None:
    # Samples 0 and 2 are confused with each other by the learner only; 1 is as hard by itself.
    L, R = np.zeros((4, 4)), np.zeros((4, 4))
    L[0, 2] = L[2, 0] = 5.0
    R[0, 0] = 1.0
    R[1, 1] = 0.5
    assert select_jest(L, R, k=2, num_chunks=1, top_k=True).tolist() == [0, 1]
    assert select_jest(L, R, k=2, num_chunks=2, top_k=True).tolist() == [0, 2]


def test_noise_that_is_not_given_draws_from_the_softmax_of_the_scores() -> None:
    random.seed(0)
    R = np.diag(np.log([0.5, 0.3, 0.2]))
    draws = [int(select_jest(np.zeros((3, 3)), R, k=1, num_chunks=1)[0]) for _ in range(600)]
    shares = np.bincount(draws, minlength=3) / 600
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.06)  # three standard deviations


def test_noise_that_is_not_given_has_its_long_tail_on_the_side_of_large_scores() -> None:
    # The first is as likely as the nine others together. With noise of the other sign it would win three times in four.
    random.seed(0)
    R = np.diag(np.log([0.5] + [0.5 / 9] * 9))
    draws = [int(select_jest(np.zeros((10, 10)), R, k=1, num_chunks=1)[0]) for _ in range(600)]
    assert abs(draws.count(0) / 600 - 0.5) <= 0.06  # three standard deviations


def test_the_rarest_draw_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "expovariate", lambda _: 0.0)
    assert select_jest(np.zeros((3, 3)), np.zeros((3, 3)), k=3, num_chunks=2).tolist() == [0, 1, 2]


def test_tracing_asks_for_the_noise() -> None:
    import jax

    with pytest.raises(ValueError, match="gumbel must be given if code is traced"):
        jax.jit(lambda a: select_jest(a, a, k=1, num_chunks=1))(jax.numpy.zeros((2, 2)))


def test_torch_compiles_both_whole() -> None:
    import array_api_compat.torch as xp
    import torch

    def both(a: Any, b: Any, g: Any) -> Any:
        first = select_jest(a, b, k=4, num_chunks=2, gumbel=g, xp=xp)
        return first, select_jest(a, b, k=4, num_chunks=2, top_k=True, xp=xp), select_top_excess(a[0], b[0], k=2, xp=xp)

    arrays = [torch.asarray(x) for x in draw(9, 6, 2)]
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)(*arrays)
    assert [x.tolist() for x in compiled] == [x.tolist() for x in both(*arrays)]


SQUARE = np.zeros((3, 3))


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ((SQUARE, SQUARE), {"k": 4}, ValueError, "k must be at most the number of samples 3, got 4"),
        ((SQUARE, SQUARE), {"k": 0}, ValueError, "k must be at least 1, got 0"),
        ((SQUARE, SQUARE), {"num_chunks": 0}, ValueError, "num_chunks must be at least 1, got 0"),
        ((SQUARE, SQUARE), {"num_chunks": 1.5}, TypeError, r"num_chunks must be an integer, got 1\.5"),
        ((SQUARE, SQUARE), {"top_k": 1}, TypeError, "top_k must be True or False, got 1"),
        ((SQUARE, SQUARE), {"top_k": True, "gumbel": np.zeros((1, 3))}, ValueError, "gumbel must be None if top_k"),
        ((SQUARE, SQUARE), {"gumbel": np.zeros((2, 3))}, ValueError, r"gumbel must have shape .* = \(1, 3\)"),
        ((SQUARE, SQUARE), {"gumbel": np.zeros(3)}, ValueError, r"gumbel must have 2 axes \(num_chunks, num_samples\)"),
        ((SQUARE, SQUARE), {"gumbel": np.full((1, 3), np.inf)}, ValueError, "gumbel must be finite, got inf"),
        ((SQUARE, SQUARE), {"gumbel": np.zeros((1, 3), int)}, TypeError, "gumbel must have a real floating dtype"),
        ((SQUARE[:2], SQUARE), {}, ValueError, r"learner_logits must have shape .* = \(2, 2\), got \(2, 3\)"),
        ((SQUARE, SQUARE[:2]), {}, ValueError, r"reference_logits must have shape .* = \(3, 3\), got \(2, 3\)"),
        ((SQUARE, SQUARE[0]), {}, ValueError, "reference_logits must have 2 axes"),
        ((SQUARE + np.nan, SQUARE), {}, ValueError, r"learner_logits must be finite, got nan at position \(0, 0\)"),
        ((SQUARE, SQUARE.astype(np.float32)), {}, TypeError, "reference_logits must have the dtype of learner_logits"),
        ((SQUARE, None), {}, TypeError, "reference_logits must be an array, got NoneType"),
    ],
)
def test_bad_logits_get_one_clear_error(arrays: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        select_jest(*arrays, **{"k": 2, "num_chunks": 1, **options})


@pytest.mark.parametrize("weight", [1.0, 3.0, 1e30])
def test_the_order_is_right_where_excess_losses_are_too_large_for_their_dtype(eager_space: Any, weight: float) -> None:
    largest = float(np.finfo(eager_space.dtype_name).max)
    loss = largest * np.asarray([0.5, 1.0, -1.0, 0.75, 0.25])
    reference = largest / weight * np.asarray([-0.75, -1.0, 1.0, -1.0, -1.0])
    got = select_top_excess(eager_space.asarray(loss), eager_space.asarray(reference), k=5, reference_weight=weight)
    assert eager_space.to_numpy(got).tolist() == [1, 3, 0, 4, 2]  # at equal excess losses the lower index comes first


def test_jest_takes_the_largest_logits(eager_space: Any) -> None:
    largest = float(np.finfo(eager_space.dtype_name).max)
    learner = largest * np.asarray([[1.0, 0.5, -1.0], [1.0, 0.9, 1.0], [-1.0, 0.25, -1.0]])
    reference = largest * np.asarray([[-1.0, 1.0, 1.0], [-1.0, -0.95, -1.0], [1.0, -0.5, 0.9]])
    with np.errstate(over="ignore"):  # NumPy says so where a difference of two logits is -inf, whose exponential is 0
        got = select_jest(eager_space.asarray(learner), eager_space.asarray(reference), k=3, num_chunks=3, top_k=True)
    # own: -2, -1.85, 1.9; given 2: 0: -2 + (-2 - 2) / 2 = -4, 1: -1.85 + (2 + .75) / 2 = -.475
    assert eager_space.to_numpy(got).tolist() == [2, 1, 0]
