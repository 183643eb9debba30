"""Retrieval and zero-shot accuracy against ranks by hand and by loops; ties, equal captions and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drrho_clip.errors import BadInput
from drrho_clip.evaluate import nearest, retrieval, zero_shot_accuracy


def from_similarity(similarity: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features whose inner products are exactly the given matrix [images, texts]."""
    similarity = np.asarray(similarity, dtype=np.float64)
    return similarity, np.eye(len(similarity))


def ranks_by_loops(similarity: np.ndarray, query_captions: list[str], answer_captions: list[str]) -> list[int]:
    """R@k by definition, with loops over queries and answers."""
    ranks = []
    for q, own in enumerate(query_captions):
        best = max(similarity[q, a] for a, caption in enumerate(answer_captions) if caption == own)
        rank = 1
        for a, caption in enumerate(answer_captions):
            if caption != own and similarity[q, a] >= best:
                rank += 1
        ranks.append(rank)
    return ranks


class TestRetrievalByHand:
    def test_ranks_of_a_three_by_three_table(self) -> None:
        # image 0: own .9 is first. image 1: own .2 is behind .8 and .5. image 2: own .6 is behind .7.
        # text 0 (column .9 .8 .1): first. text 1 (.3 .2 .7): third. text 2 (.1 .5 .6): first.
        similarity = [[0.9, 0.3, 0.1], [0.8, 0.2, 0.5], [0.1, 0.7, 0.6]]
        measured = retrieval(*from_similarity(similarity), ["a", "b", "c"])
        assert measured.image_to_text == (1 / 3, 1.0, 1.0)
        assert measured.text_to_image == (2 / 3, 1.0, 1.0)
        assert measured.retrieval_r1 == 0.5
        assert measured.metrics() == {"retrieval_r1": 0.5, "retrieval_r5": 1.0, "retrieval_r10": 1.0}
        assert (measured.num_galleries, measured.num_pairs) == (1, 3)

    def test_k_counts_the_ranks_1_5_and_10(self) -> None:
        # Twelve pairs, image i has rank i + 1: i wrong texts are above its own.
        similarity = np.zeros((12, 12))
        for i in range(12):
            similarity[i, i] = 0.5
            similarity[i, [j for j in range(12) if j != i][:i]] = 1.0
        measured = retrieval(*from_similarity(similarity), [f"caption {i}" for i in range(12)])
        assert measured.image_to_text == (1 / 12, 5 / 12, 10 / 12)

    def test_equal_captions_are_correct_in_both_directions(self) -> None:
        # Without equal captions nobody is right: each image prefers the other's text, and each text the other's image.
        similarity = [[0.1, 0.9, 0.0], [0.8, 0.2, 0.0], [0.7, 0.6, 0.3]]
        features = from_similarity(similarity)
        apart = retrieval(*features, ["a", "b", "c"])
        assert (apart.image_to_text.r1, apart.text_to_image.r1) == (0.0, 1 / 3)
        together = retrieval(*features, ["a", "a", "c"])
        assert (together.image_to_text.r1, together.text_to_image.r1) == (2 / 3, 1.0)

    def test_a_wrong_answer_above_the_best_correct_one_counts_once_however_many_are_correct(self) -> None:
        # Image 0 has correct texts 0 and 1 (.4, .6) and one wrong text at .7: rank 2, not 3.
        similarity = np.array([[0.4, 0.6, 0.7], [0.9, 0.9, 0.0], [0.0, 0.0, 0.9]])
        measured = retrieval(*from_similarity(similarity), ["a", "a", "c"])
        assert measured.image_to_text == (2 / 3, 1.0, 1.0)

    def test_a_tie_with_a_wrong_answer_counts_against(self) -> None:
        assert retrieval(*from_similarity([[0.5, 0.5], [0.0, 0.5]]), ["a", "b"]).image_to_text.r1 == 0.5

    def test_a_tie_with_another_correct_answer_costs_nothing(self) -> None:
        assert retrieval(*from_similarity([[0.5, 0.5], [0.5, 0.5]]), ["a", "a"]).retrieval_r1 == 1.0

    @pytest.mark.parametrize("n", [11, 65, 201])
    @pytest.mark.parametrize("d", [1, 8, 17, 64, 129])
    def test_collapsed_features_score_zero(self, d: int, n: int) -> None:
        # A BLAS rounds equal products by their place; a lucky rounding must not look like retrieval.
        for seed in range(8):
            row = np.random.default_rng(seed).normal(size=(1, d))
            features = np.repeat(row / np.linalg.norm(row), n, axis=0)
            measured = retrieval(features, features.copy(), [str(i) for i in range(n)], gallery_size=n)
            assert set(measured.metrics().values()) == {0.0}


class TestGalleries:
    def test_consecutive_pairs_and_no_remainder(self) -> None:
        # Pairs 0-1 are right, 2-3 confuse each other, pair 4 fills no gallery and would be right.
        images = np.eye(5)
        texts = np.eye(5)[[0, 1, 3, 2, 4]]
        measured = retrieval(images, texts, list("abcde"), gallery_size=2)
        assert (measured.num_galleries, measured.num_pairs) == (2, 4)
        assert measured.image_to_text.r1 == measured.text_to_image.r1 == 0.5

    def test_galleries_do_not_see_each_other(self) -> None:
        # All pairs together tie with their equals; every gallery of two is easy.
        images = np.tile(np.eye(2), (3, 1))
        captions = list("abcdef")
        assert retrieval(images, images, captions, gallery_size=2).retrieval_r1 == 1.0
        assert retrieval(images, images, captions, gallery_size=6).retrieval_r1 == 0.0

    def test_fewer_pairs_than_a_gallery_form_one(self) -> None:
        measured = retrieval(np.eye(3), np.eye(3), list("abc"))
        assert (measured.retrieval_r1, measured.num_galleries, measured.num_pairs) == (1.0, 1, 3)

    def test_the_usual_gallery_holds_200(self) -> None:
        features = np.random.default_rng(0).normal(size=(450, 4))
        measured = retrieval(features, features, [str(i) for i in range(450)])
        assert (measured.num_galleries, measured.num_pairs) == (2, 400)

    def test_the_inputs_are_not_written_to(self) -> None:
        images, texts = np.eye(3), np.eye(3)[::-1].copy()
        images.flags.writeable = texts.flags.writeable = False  # writing would raise an error
        assert retrieval(images, texts, list("abc")).num_pairs == 3
        assert np.array_equal(images, texts[::-1])


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 23),
    gallery_size=st.integers(2, 25),
    num_captions=st.integers(1, 23),
    levels=st.integers(1, 6),
)
def test_retrieval_matches_plain_loops(seed: int, n: int, gallery_size: int, num_captions: int, levels: int) -> None:
    # Small integers as features: inner products are exact, ties are many.
    generator = np.random.default_rng(seed)
    images, texts = generator.integers(0, levels, size=(2, n, 3))
    captions = [f"caption {number}" for number in generator.integers(0, num_captions, size=n)]
    measured = retrieval(images, texts, captions, gallery_size=gallery_size)

    size = min(gallery_size, n)
    image_ranks: list[int] = []
    text_ranks: list[int] = []
    for start in range(0, n - size + 1, size):
        part = captions[start : start + size]
        similarity = images[start : start + size] @ texts[start : start + size].T
        image_ranks += ranks_by_loops(similarity, part, part)
        text_ranks += ranks_by_loops(similarity.T, part, part)
    for recall, ranks in ((measured.image_to_text, image_ranks), (measured.text_to_image, text_ranks)):
        assert recall == tuple(sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10))
    for k, mean in zip((1, 5, 10), (measured.retrieval_r1, measured.retrieval_r5, measured.retrieval_r10), strict=True):
        both = sum(rank <= k for rank in image_ranks + text_ranks) / (2 * len(image_ranks))
        assert mean == pytest.approx(both, abs=1e-15)


class TestZeroShot:
    def test_by_hand(self) -> None:
        images = [[1.0, 0.0, 0.0], [0.5, 0.6, 0.0], [0.0, 0.0, 1.0], [0.9, 0.1, 0.2]]
        # Nearest prompts: 0, 1, 2, 0. Labels 0, 0, 2, 1: two of four right.
        assert zero_shot_accuracy(images, np.eye(3), [0, 0, 2, 1]) == 0.5

    def test_a_tie_counts_as_wrong(self) -> None:
        assert zero_shot_accuracy([[1.0, 1.0], [1.0, 0.0]], np.eye(2), [0, 0]) == 0.5

    def test_a_collapsed_encoder_scores_zero(self) -> None:
        row = np.random.default_rng(0).normal(size=(1, 33)).astype(np.float32)
        assert zero_shot_accuracy(np.repeat(row, 50, axis=0), np.repeat(row, 10, axis=0), np.arange(50) % 10) == 0.0

    @given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), num_classes=st.integers(2, 5))
    def test_equals_the_loops(self, seed: int, n: int, num_classes: int) -> None:
        generator = np.random.default_rng(seed)
        images = generator.integers(-2, 3, size=(n, 3))
        prompts = generator.integers(-2, 3, size=(num_classes, 3))
        labels = generator.integers(0, num_classes, size=n)
        right = 0
        for image, label in zip(images, labels, strict=True):
            scores = [int(image @ prompt) for prompt in prompts]
            right += all(scores[label] > score for c, score in enumerate(scores) if c != label)
        assert zero_shot_accuracy(images, prompts, labels) == right / n


class TestNearest:
    def test_best_first_and_ties_to_the_lower_index(self) -> None:
        gallery = [[0.0], [2.0], [1.0], [2.0]]
        assert nearest([[1.0], [-1.0]], gallery, k=3).tolist() == [[1, 3, 2], [0, 2, 1]]


NAN = [[1.0, 0.0], [float("nan"), 1.0]]
PAIR = np.eye(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval(NAN, PAIR, ["a", "b"]), "image_features must be finite, got nan in row 1"),
        (
            lambda: retrieval(PAIR, [[np.inf, 0.0], [0.0, 1.0]], ["a", "b"]),
            "text_features must be finite, got inf in row 0",
        ),
        (lambda: retrieval([[1.0]], [[1.0]], ["a"]), r"image_features must have shape .* n >= 2 .*, got \(1, 1\)"),
        (lambda: retrieval([1.0, 2.0], PAIR, ["a", "b"]), r"image_features must have shape .*, got \(2,\)"),
        (lambda: retrieval(np.ones((2, 0)), PAIR, ["a", "b"]), r"image_features must have shape .*, got \(2, 0\)"),
        (lambda: retrieval(PAIR, np.eye(3), ["a", "b"]), r"shape of image_features, \(2, 2\), got \(3, 3\)"),
        (lambda: retrieval(PAIR + 1j, PAIR, ["a", "b"]), "image_features must be real numbers, got complex128"),
        (lambda: retrieval(PAIR > 0, PAIR, ["a", "b"]), "image_features must be real numbers, got bool"),
        (lambda: retrieval(PAIR, PAIR, ["a"]), "captions must have one entry per pair, 2, got 1"),
        (lambda: retrieval(PAIR, PAIR, "ab"), "captions must be a sequence of str, got 'ab'"),
        (lambda: retrieval(PAIR, PAIR, [1, 2]), r"captions must be a sequence of str, got \[1, 2\]"),  # type: ignore[list-item]
        (lambda: retrieval(PAIR, PAIR, ["a", "b"], gallery_size=1), "gallery_size must be an integer .* 2, got 1"),
        (lambda: retrieval(PAIR, PAIR, ["a", "b"], gallery_size=2.0), "gallery_size must be .*, got 2.0"),  # type: ignore[arg-type]
        (lambda: retrieval(PAIR, PAIR, ["a", "b"], gallery_size=True), "gallery_size must be .*, got True"),
        (lambda: zero_shot_accuracy(NAN, PAIR, [0, 1]), "image_features must be finite"),
        (lambda: zero_shot_accuracy(PAIR, NAN, [0, 1]), "prompt_features must be finite"),
        (lambda: zero_shot_accuracy(PAIR, np.eye(3), [0, 1]), "prompt_features must have as many columns .* 2, got 3"),
        (lambda: zero_shot_accuracy(PAIR, PAIR[:1], [0, 0]), r"prompt_features must have shape .* n >= 2"),
        (lambda: zero_shot_accuracy(np.ones((0, 2)), PAIR, []), r"image_features must have shape .* n >= 1"),
        (lambda: zero_shot_accuracy(PAIR, PAIR, [0, 2]), r"labels must lie in \[0, 2\), got 0 to 2"),
        (lambda: zero_shot_accuracy(PAIR, PAIR, [-1, 0]), r"labels must lie in \[0, 2\), got -1 to 0"),
        (lambda: zero_shot_accuracy(PAIR, PAIR, [0.0, 1.0]), r"labels must be integers of shape \(2,\)"),
        (lambda: zero_shot_accuracy(PAIR, PAIR, [0]), r"labels must be integers of shape \(2,\)"),
        (lambda: nearest(PAIR, np.eye(3)), "gallery_features must have as many columns as query_features, 2, got 3"),
        (lambda: nearest(PAIR, PAIR, k=3), "k must be an integer from 1 to the gallery's size, 2, got 3"),
        (lambda: nearest(PAIR, PAIR, k=0), "k must be an integer from 1"),
        (lambda: nearest(PAIR, PAIR, k=True), "k must be an integer from 1 .*, got True"),
    ],
)
def test_bad_input_names_argument_rule_and_value(call: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
