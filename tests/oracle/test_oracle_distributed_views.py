"""Two views: W ranks = 1 rank on the whole batch, and what a rank may know."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from drrho_reference import UnimodalStep, sharded_unimodal_step, unimodal_contrastive_step

NEVER = -math.inf


def problem(seed: int, n: int, d: int = 4, r: int = 3) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two views without symmetry: states, some never visited, options per anchor, a reference model."""
    rng = np.random.default_rng(seed)
    features = [rng.normal(size=(n, width)) for width in (d, d, r, r)]
    features = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in features]
    log_inner = rng.normal(size=(2, n))
    log_inner[0, 1] = log_inner[1, n - 1] = NEVER
    options = {
        "temperature": tuple(rng.uniform(0.2, 0.9, size=(2, n))),
        "gamma": tuple(rng.uniform(0.1, 0.9, size=(2, n))),
        "anchor_weight": tuple(rng.uniform(0.0, 2.0, size=(2, n))),
        "reference_features": (features[2], features[3]),
        "reference_weight": 1.5,
        "radius": 0.4,
        "eps": 0.02,
    }
    return (features[0], features[1], *log_inner), options


def assert_ranks_are_one_rank(ranks: list[UnimodalStep], one: UnimodalStep) -> None:
    for field, right in zip(UnimodalStep._fields, one, strict=True):
        parts = [getattr(rank, field) for rank in ranks]
        if isinstance(right, float):
            assert len(set(parts)) == 1, field
            got: Any = parts[0]
        elif isinstance(right, tuple):
            got = tuple(np.concatenate(side) for side in zip(*parts, strict=True))
        else:
            got = np.concatenate(parts)
        np.testing.assert_allclose(got, right, rtol=1e-13, atol=1e-14, err_msg=field)


@pytest.mark.parametrize(("num_shards", "n"), [(1, 3), (2, 2), (2, 6), (3, 6), (4, 8)])
def test_ranks_together_are_one_rank(num_shards: int, n: int) -> None:
    batch, options = problem(n, n)
    ranks = sharded_unimodal_step(*batch, num_shards=num_shards, **options)
    assert [rank.view2_gradient.shape for rank in ranks] == [(n // num_shards, 4)] * num_shards
    assert_ranks_are_one_rank(ranks, unimodal_contrastive_step(*batch, **options))


def test_ranks_together_are_one_rank_without_reference_or_memory() -> None:
    batch, _ = problem(30, 6)
    for num_shards in (2, 3):
        ranks = sharded_unimodal_step(*batch, num_shards=num_shards, temperature=0.1)
        assert_ranks_are_one_rank(ranks, unimodal_contrastive_step(*batch, temperature=0.1))


def test_phase_2_uses_the_updated_estimates_of_other_ranks() -> None:
    # Both views of a sample on rank 0 are negatives of an anchor on rank 1, whose state changes.
    batch, options = problem(40, 4)
    before = sharded_unimodal_step(*batch, num_shards=2, **options)[0]
    batch[2][3] = batch[2][3] + 2.0
    after = sharded_unimodal_step(*batch, num_shards=2, **options)[0]
    np.testing.assert_array_equal(after.log_inner_view1, before.log_inner_view1)
    for name in ("view1_gradient", "view2_gradient"):
        assert np.all(np.abs(getattr(after, name) - getattr(before, name)).max(axis=1) > 1e-5)
