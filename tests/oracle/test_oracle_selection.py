"""Selection of the oracle: worked by hand, brute force, and the chances of a draw."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from drrho_reference import chunk_sizes, contrastive_objective, joint_scores, select_jest, select_top_excess


def logits(seed: int, n: int = 6, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    both = np.random.default_rng(seed).normal(size=(2, n, n)) * scale
    return both[0], both[1]


def test_top_excess_by_hand() -> None:
    # Excess 1, -1, 3, 1, 0.
    loss, reference = [1.0, 5.0, 2.0, 0.0, 2.0], [0.0, 6.0, -1.0, -1.0, 2.0]
    assert select_top_excess(loss, reference, k=1).tolist() == [2]
    assert select_top_excess(loss, reference, k=2).tolist() == [2, 0]  # 0 and 3 are equal: the lower one
    assert select_top_excess(loss, reference, k=5).tolist() == [2, 0, 3, 4, 1]
    assert select_top_excess([0.0] * 4, [0.0] * 4, k=3).tolist() == [0, 1, 2]
    assert select_top_excess([3.0, 2.0, 1.0], [2.0, 0.0, -1.0], k=3).tolist() == [1, 2, 0]  # 1, 2, 2
    assert select_top_excess([3.0, 2.0, 1.0], [2.0, 0.0, -1.0], k=3, reference_weight=0.25).tolist() == [0, 1, 2]
    assert select_top_excess([3.0, 2.0, 1.0], [2.0, 0.0, -1.0], k=3, reference_weight=2.0).tolist() == [2, 1, 0]


def test_top_excess_keeps_the_largest() -> None:
    rng = np.random.default_rng(1)
    loss, reference = rng.normal(size=(2, 30))
    kept = select_top_excess(loss, reference, k=7)
    excess = loss - reference
    assert len(set(kept.tolist())) == 7
    assert excess[kept].min() > np.delete(excess, kept).max()
    assert np.all(np.diff(excess[kept]) < 0.0)


@pytest.mark.parametrize(("k", "num_chunks", "sizes"), [
    (8, 3, [3, 3, 2]), (9, 3, [3, 3, 3]), (7, 3, [3, 2, 2]), (3, 3, [1, 1, 1]), (5, 1, [5]),
])  # fmt: skip
def test_chunks_share_k(k: int, num_chunks: int, sizes: list[int]) -> None:
    assert chunk_sizes(k, num_chunks) == sizes


def test_joint_scores_by_hand() -> None:
    # exp(L) and exp(R) are tables of whole numbers; C = {1, 2} scores pair 0 alone:
    # own = -(log 2 - log 3); rows log(1 + 4) - log(2 + 2); columns log(3 + 7) - log(5 + 1).
    L = np.log([[2.0, 1.0, 4.0], [3.0, 6.0, 2.0], [7.0, 5.0, 1.0]])
    R = np.log([[3.0, 2.0, 2.0], [5.0, 1.0, 1.0], [1.0, 2.0, 8.0]])
    log = math.log
    scores = joint_scores(L, R, [1, 2])
    assert scores[0] == pytest.approx(log(3 / 2) + (log(5 / 4) + log(10 / 6)) / 2, abs=1e-15)
    assert scores[1:] == [-math.inf, -math.inf]
    assert joint_scores(L, R, []) == pytest.approx([log(3 / 2), log(1 / 6), log(8)], abs=1e-15)
    # Pair 2 is the hardest; beside it pair 0: log(3/2) + (log(4/2) + log(7/1)) / 2 against pair 1:
    # log(1/6) + (log(2/1) + log(5/2)) / 2.
    scores = joint_scores(L, R, [2])
    expected = [log(3 / 2) + log(14) / 2, log(1 / 6) + log(5) / 2]
    assert scores[:2] == pytest.approx(expected, abs=1e-15)
    assert select_jest(L, R, k=2, num_chunks=2, top_k=True).tolist() == [2, 0]


def test_scores_are_excess_losses_beside_the_chosen() -> None:
    L, R = logits(2)
    chosen = [4, 1, 3]

    def anchor_loss(table: np.ndarray, i: int) -> float:
        """log mean over j in C of exp(table_ij - table_ii); the log of |C| cancels in the excess."""
        mask = np.zeros((6, 6), dtype=bool)
        mask[i, chosen] = True
        everything = 2 * 6 * contrastive_objective(table, np.eye(6), temperature=1.0, pair_mask=mask)
        # The mask makes each text of C an anchor too, whose one negative is image i.
        return everything - sum(table[i, j] - table[j, j] for j in chosen)

    for i in (0, 2, 5):
        model, reference = ((anchor_loss(table, i) + anchor_loss(table.T, i)) / 2 for table in (L, R))
        assert joint_scores(L, R, chosen)[i] == pytest.approx(model - reference, abs=1e-12)


@pytest.mark.parametrize(("k", "num_chunks"), [(4, 2), (5, 3), (6, 6), (3, 1)])
def test_top_k_agrees_with_a_search_over_all_orders(k: int, num_chunks: int) -> None:
    # An order is right if every pair has the largest score, among all that are left, that its chunk gives.
    L, R = logits(3)
    sizes = [len(part) for part in np.array_split(np.arange(k), num_chunks)]
    right = []
    for order in permutations(range(6), k):
        start, fits = 0, True
        for size in sizes:
            C, chunk = list(order[:start]), list(order[start : start + size])
            score = -np.diag(L) + np.diag(R)
            if C:
                for table, sign in ((L, 0.5), (R, -0.5)):
                    score = score + sign * np.log(np.exp(table[:, C]).sum(axis=1))
                    score = score + sign * np.log(np.exp(table[C, :]).sum(axis=0))
            rest = [i for i in range(6) if i not in C]
            fits = fits and chunk == sorted(rest, key=lambda i: -score[i])[:size]
            start += size
        if fits:
            right.append(list(order))
    assert right == [select_jest(L, R, k=k, num_chunks=num_chunks, top_k=True).tolist()]


def test_noise_of_zeros_is_top_k_and_noise_decides_otherwise() -> None:
    L, R = logits(4)
    best = select_jest(L, R, k=4, num_chunks=2, top_k=True).tolist()
    noise = np.zeros((2, 6))
    assert select_jest(L, R, k=4, num_chunks=2, gumbel=noise).tolist() == best
    worst = best[-1]
    noise[0, worst] = 1e6  # the first row of the noise belongs to the first chunk
    assert select_jest(L, R, k=4, num_chunks=2, gumbel=noise).tolist()[0] == worst
    left_out = next(i for i in range(6) if i not in best)
    noise = np.zeros((2, 6))
    noise[1, left_out] = 1e6
    noise[1, best[0]] = 1e9  # what is chosen stays chosen: -inf and any noise
    drawn = select_jest(L, R, k=4, num_chunks=2, gumbel=noise).tolist()
    assert (drawn[:2], drawn[2]) == (best[:2], left_out)
    assert len(set(drawn)) == 4


def test_draws_have_the_chances_of_a_softmax() -> None:
    # One draw from three pairs of own scores log 1, log 3, log 6: chances 1/10, 3/10, 6/10.
    L = np.diag(-np.log([1.0, 3.0, 6.0]))
    noise = np.random.default_rng(5).gumbel(size=(2000, 1, 3))
    drawn = [int(select_jest(L, np.zeros((3, 3)), k=1, num_chunks=1, gumbel=row)[0]) for row in noise]
    share = np.bincount(drawn, minlength=3) / 2000
    # Standard error at most 0.011: four of them.
    np.testing.assert_allclose(share, [0.1, 0.3, 0.6], atol=0.044)


def test_ties_go_to_the_lower_position() -> None:
    L = np.zeros((5, 5))
    assert select_jest(L, L, k=4, num_chunks=2, top_k=True).tolist() == [0, 1, 2, 3]


def test_scale_100_is_no_problem_and_where_it_ends_it_says_so() -> None:
    L, R = logits(6, scale=100.0)
    assert len(set(select_jest(L, R, k=6, num_chunks=3, top_k=True).tolist())) == 6
    for sign in (1e3, -1e3):
        with pytest.raises(FloatingPointError, match=f"learner_logits must keep the linear domain .*, got {sign}"):
            select_jest(np.full((3, 3), sign), np.zeros((3, 3)), k=2, num_chunks=2, top_k=True)
        with pytest.raises(FloatingPointError, match="reference_logits must keep the linear domain"):
            select_jest(np.zeros((3, 3)), np.full((3, 3), sign), k=2, num_chunks=2, top_k=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"learner": np.ones((2, 3))}, ValueError, r"learner_logits must be square, got the shape \(2, 3\)"),
        ({"learner": np.full((3, 3), np.nan)}, ValueError, "learner_logits must be finite, got nan"),
        ({"reference": np.ones((2, 2))}, ValueError, r"reference_logits must have the shape \(3, 3\), got \(2, 2\)"),
        ({"k": 0}, ValueError, r"k must lie in \[1, 3\], got 0"),
        ({"k": 4}, ValueError, r"k must lie in \[1, 3\], got 4"),
        ({"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
        ({"k": True}, TypeError, "k must be an integer, got True"),
        ({"num_chunks": 3}, ValueError, r"num_chunks must lie in \[1, 2\], got 3"),
        ({"top_k": 1}, TypeError, "top_k must be True or False, got 1"),
        ({"top_k": False}, ValueError, "gumbel must be given if and only if top_k is False, got None with top_k=False"),
        ({"gumbel": np.zeros((2, 3))}, ValueError, "gumbel must be given if and only if top_k is False"),
        ({"top_k": False, "gumbel": np.zeros(3)}, ValueError, r"gumbel must have the shape \(2, 3\), got \(3,\)"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], error: Any, message: str) -> None:
    tables = [changes.get(name, np.ones((3, 3))) for name in ("learner", "reference")]
    options = {"k": 2, "num_chunks": 2, "top_k": True, **changes}
    options = {name: value for name, value in options.items() if name not in ("learner", "reference")}
    with pytest.raises(error, match=message):
        select_jest(*tables, **options)


@pytest.mark.parametrize(
    ("arguments", "k", "error", "message"),
    [
        (([[1.0]], [[1.0]]), 1, ValueError, r"loss must have one axis, got the shape \(1, 1\)"),
        (([1.0, 2.0], [1.0]), 1, ValueError, r"reference_loss must have the shape \(2,\)"),
        (([1.0, np.nan], [1.0, 1.0]), 1, ValueError, "loss must be finite, got nan"),
        (([1.0], [1.0]), 2, ValueError, r"k must lie in \[1, 1\], got 2"),
    ],
)
def test_top_excess_refuses_bad_input(arguments: Any, k: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        select_top_excess(*arguments, k=k)
