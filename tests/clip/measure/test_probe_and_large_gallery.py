"""The linear probe, and ranks in galleries that are computed in tiles."""

from __future__ import annotations

import numpy as np
import pytest

from drrho_clip.errors import BadInput
from drrho_clip.measure.large_gallery import ranks_in_gallery
from drrho_clip.measure.linear_probe import linear_probe


def test_ranks_equal_those_of_the_whole_matrix_and_ties_count_against_the_query() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.integers(-2, 3, (5000, 4)).astype(np.float64)
    queries, correct = rng.normal(size=(600, 4)), rng.integers(0, 5000, 600)
    scores = np.einsum("qd,ad->qa", queries, gallery, optimize=False)
    expected = np.sum(scores >= scores[np.arange(600), correct][:, None], axis=1)
    assert np.array_equal(ranks_in_gallery(queries, gallery, correct), expected)
    with pytest.raises(BadInput, match="correct must lie in"):
        ranks_in_gallery(queries, gallery, correct + 5000)


def test_the_probe_chooses_its_strength_and_finds_separable_classes_only() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    features = np.eye(4)[labels] * 3 + rng.normal(size=(200, 4)) * 0.3
    probe = linear_probe(features[:150], labels[:150], features[150:], labels[150:])
    assert probe.accuracy == 1.0
    noise = rng.normal(size=(200, 4))
    assert linear_probe(noise[:150], labels[:150], noise[150:], labels[150:]).accuracy < 0.5
    with pytest.raises(BadInput, match="at least 2 classes"):
        linear_probe(features, np.zeros(200, dtype=int), features, labels)
