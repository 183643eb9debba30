"""Retrieval and zero-shot accuracy against ranks by hand and by loops; ties, equal captions and bad input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drrho_clip.data import ArrayDataset, WordTokenizer
from drrho_clip.encode import Encoder, build_model
from drrho_clip.errors import BadInput
from drrho_clip.evaluate import evaluate, nearest, retrieval, zero_shot_accuracy
from drrho_clip.measure.similarity import SimilarityTile, similarities
from drrho_clip.models import ModelSpec, initial_parameters
from drrho_core.backend import get_backend


def from_similarity(similarity: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features whose inner products are exactly the given matrix [images, texts]."""
    similarity = np.asarray(similarity, dtype=np.float64)
    return similarity, np.eye(len(similarity))


def rank_by_loops(scores: Mapping[int, Any], correct: set[int]) -> int:
    """The rank of one query by its definition: 1 + wrong answers at least as similar as the best correct answer."""
    best = max(score for answer, score in scores.items() if answer in correct)
    return 1 + sum(answer not in correct and score >= best for answer, score in scores.items())


class TestRetrievalByHand:
    def test_ranks_of_a_three_by_three_table(self) -> None:
        # image 0: own .9 is first. image 1: own .2 is behind .8 and .5. image 2: own .6 is behind .7.
        # text 0 (column .9 .8 .1): first. text 1 (.3 .2 .7): third. text 2 (.1 .5 .6): first.
        similarity = [[0.9, 0.3, 0.1], [0.8, 0.2, 0.5], [0.1, 0.7, 0.6]]
        measured = retrieval(*from_similarity(similarity), ["a", "b", "c"])
        assert measured.image_to_text == (1 / 3, 1.0, 1.0)
        assert measured.text_to_image == (2 / 3, 1.0, 1.0)
        assert measured.retrieval_r1 == 0.5
        # Without pair 0, 1 or 2, R@1 is 1/4, 1 or 1/2. The squared error is 2/3 of (1/3)^2 + (5/12)^2 + (1/12)^2.
        assert measured.metrics() == {
            "retrieval_r1": 0.5,
            "retrieval_r5": 1.0,
            "retrieval_r10": 1.0,
            "retrieval_r1_full": 0.5,
            "num_pairs": 3,
            "num_pairs_full": 3,
            "num_queries": 6,
            "gallery_size": 3,
            "retrieval_r1_standard_error": pytest.approx((7 / 36) ** 0.5),
        }
        assert measured.num_galleries == 1

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
            assert {value for name, value in measured.metrics().items() if name.startswith("retrieval")} == {0.0}


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


class TestSeveralCaptionsPerImage:
    IDS = np.repeat(np.arange(40), 5)
    CAPTIONS: ClassVar = [f"picture {image}, wording {number}" for image in range(40) for number in range(5)]

    def test_a_perfect_model_scores_one_and_an_image_is_one_query(self) -> None:
        # The five rows of an image hold equal features; they must not compete with each other.
        images = np.repeat(np.eye(40), 5, axis=0)
        texts = images + 0.01 * np.random.default_rng(0).normal(size=images.shape)
        measured = retrieval(images, texts, self.CAPTIONS, image_ids=self.IDS)
        assert measured.image_to_text.r1 == measured.text_to_image.r1 == measured.retrieval_r1_full == 1.0
        assert (measured.num_pairs, measured.num_queries, measured.gallery_size) == (200, 240, 40)

    def test_a_collapsed_model_scores_zero(self) -> None:
        ones = np.ones((200, 4))
        measured = retrieval(ones, ones, self.CAPTIONS, image_ids=self.IDS)
        assert (measured.retrieval_r10, measured.retrieval_r1_full) == (0.0, 0.0)

    def test_equal_features_of_different_images_are_never_correct(self) -> None:
        # Without numbers every row is an image of its own, so copies of one picture compete.
        images = np.repeat(np.eye(40), 5, axis=0)
        assert retrieval(images, images, self.CAPTIONS).retrieval_r1 == 0.0

    def test_galleries_hold_whole_images_in_the_order_of_their_first_row(self) -> None:
        # Images 9, 4, 9, 4, 7: galleries of two images are {9, 4} with four captions, and 7 is left out.
        ids = [9, 4, 9, 4, 7]
        images = np.eye(3)[[0, 1, 0, 1, 2]]
        texts = np.eye(3)[[0, 1, 1, 1, 2]]
        measured = retrieval(images, texts, list("abcde"), image_ids=ids, gallery_size=2)
        assert (measured.num_galleries, measured.num_pairs, measured.num_queries) == (1, 4, 6)
        # Caption c (row 2) belongs to image 9 and is nearest to image 4. Both images find a caption of their own, but
        # caption c ties with the captions of image 4.
        assert (measured.image_to_text.r1, measured.text_to_image.r1) == (0.5, 0.75)
        assert measured.num_pairs_full == 5

    def test_captions_with_equal_keys_count_as_equal(self) -> None:
        images, texts = np.eye(2), np.eye(2)[::-1]
        captions = ["A ball.", "a ball"]
        assert retrieval(images, texts, captions).retrieval_r1 == 0.0
        assert retrieval(images, texts, captions, same_text=lambda text: text.lower().strip(".")).retrieval_r1 == 1.0

    def test_tiles_of_a_large_gallery_change_no_figure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = np.random.default_rng(3)
        images, texts = generator.integers(0, 3, size=(2, 60, 3))
        captions = [f"caption {number}" for number in generator.integers(0, 30, size=60)]
        ids = generator.integers(0, 25, size=60)
        whole = retrieval(images, texts, captions, image_ids=ids, gallery_size=7)
        monkeypatch.setattr("drrho_clip.measure.retrieval.TILE", 4)
        assert retrieval(images, texts, captions, image_ids=ids, gallery_size=7) == whole


def ranks_by_loops(
    galleries: list[list[int]], ids: list[int], captions: list[str], images: np.ndarray, texts: np.ndarray
) -> tuple[list[int], list[int]]:
    """The ranks of all images and of all captions in galleries, which are lists of numbers of images."""
    image_ranks, text_ranks = [], []
    for gallery in galleries:
        rows = [row for row in range(len(ids)) if ids[row] in gallery]
        for image in gallery:
            feature = images[ids.index(image)]
            own_captions = {captions[row] for row in rows if ids[row] == image}
            own = {row for row in rows if captions[row] in own_captions}
            image_ranks.append(rank_by_loops({row: feature @ texts[row] for row in rows}, own))
            for row in rows:
                if ids[row] != image:
                    continue
                right = {ids[other] for other in rows if captions[other] == captions[row]}
                scores = {other: images[ids.index(other)] @ texts[row] for other in gallery}
                text_ranks.append(rank_by_loops(scores, right))
    return image_ranks, text_ranks


def r1_of(ranks_of_directions: tuple[list[int], list[int]]) -> float:
    return sum(sum(rank == 1 for rank in ranks) / len(ranks) for ranks in ranks_of_directions) / 2


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 23),
    gallery_size=st.integers(2, 25),
    num_captions=st.integers(1, 23),
    num_images=st.integers(2, 40),
    levels=st.integers(1, 6),
    tile=st.sampled_from([1, 3, 256]),
)
def test_retrieval_matches_plain_loops(
    seed: int, n: int, gallery_size: int, num_captions: int, num_images: int, levels: int, tile: int
) -> None:
    # Small integers as features: inner products are exact, ties are many.
    generator = np.random.default_rng(seed)
    images, texts = generator.integers(0, levels, size=(2, n, 3))
    captions = [f"caption {number}" for number in generator.integers(0, num_captions, size=n)]
    # The first two rows show different images; with 40 numbers most rows show an image of their own.
    ids = [0, 1, *generator.integers(0, num_images, size=n - 2).tolist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drrho_clip.measure.retrieval.TILE", tile)
        measured = retrieval(images, texts, captions, image_ids=ids, gallery_size=gallery_size)

    order = list(dict.fromkeys(ids))
    size = min(gallery_size, len(order))
    galleries = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    image_ranks, text_ranks = ranks_by_loops(galleries, ids, captions, images, texts)
    for recall, ranks in ((measured.image_to_text, image_ranks), (measured.text_to_image, text_ranks)):
        assert recall == tuple(sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10))
    means = (measured.retrieval_r1, measured.retrieval_r5, measured.retrieval_r10)
    assert means == tuple((a + b) / 2 for a, b in zip(measured.image_to_text, measured.text_to_image, strict=True))
    assert measured.retrieval_r1_full == r1_of(ranks_by_loops([order], ids, captions, images, texts))
    assert (measured.num_pairs, measured.num_pairs_full) == (len(text_ranks), n)
    assert measured.num_queries == len(text_ranks) + len(image_ranks)


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 16),
    gallery_size=st.integers(2, 12),
    num_images=st.integers(2, 30),
    tile=st.sampled_from([2, 256]),
)
def test_standard_error_is_that_of_leaving_out_each_image(
    seed: int, n: int, gallery_size: int, num_images: int, tile: int
) -> None:
    generator = np.random.default_rng(seed)
    images, texts = generator.integers(0, 4, size=(2, n, 3))
    captions = [f"caption {row}" for row in range(n)]
    ids = [0, 1, *generator.integers(0, num_images, size=n - 2).tolist()]
    order = list(dict.fromkeys(ids))
    size = min(gallery_size, len(order))
    galleries = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    used = [image for gallery in galleries for image in gallery]
    without = [
        r1_of(ranks_by_loops([[i for i in part if i != left_out] for part in galleries], ids, captions, images, texts))
        for left_out in used
    ]
    error = ((len(used) - 1) / len(used) * sum((r1 - sum(without) / len(used)) ** 2 for r1 in without)) ** 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drrho_clip.measure.retrieval.TILE", tile)
        measured = retrieval(images, texts, captions, image_ids=ids, gallery_size=gallery_size)
    assert measured.retrieval_r1_standard_error == pytest.approx(error, abs=1e-12)


def test_standard_error_is_the_spread_over_other_images() -> None:
    # 60 images with two captions each, drawn 200 times: the spread of R@1 is what the error estimates.
    generator = np.random.default_rng(0)
    figures = []
    for _ in range(200):
        images = np.repeat(generator.normal(size=(60, 8)), 2, axis=0)
        texts = images + generator.normal(size=images.shape)
        names = [str(row) for row in range(120)]
        figures.append(retrieval(images, texts, names, image_ids=np.arange(120) // 2, gallery_size=30))
    spread = np.std([figure.retrieval_r1 for figure in figures])
    error = np.mean([figure.retrieval_r1_standard_error for figure in figures])
    # The jackknife errs on the large side. An error that counts images only as queries would be too small.
    assert spread < error < 1.5 * spread


class TestEvaluate:
    """`evaluate` with encoders that were never trained."""

    @staticmethod
    def measure(captions: list[str]) -> dict[str, float]:
        tokenizer = WordTokenizer.fit(["a red dog", "a blue cat"])
        spec = ModelSpec(
            "mlp",
            image_size=8,
            channels=1,
            vocabulary_size=tokenizer.vocabulary_size,
            context_length=tokenizer.context_length,
            width=8,
        )
        backend = get_backend("numpy")
        parameters = {name: backend.asarray(array) for name, array in initial_parameters(spec, seed=0).items()}
        encoder = Encoder(backend, build_model(backend, spec), parameters, spec, tokenizer)
        images = np.random.default_rng(0).integers(0, 256, size=(len(captions), 8, 8, 1), dtype=np.uint8)
        return evaluate(encoder, ArrayDataset("noise", images, captions))

    def test_captions_of_equal_words_count_as_equal(self) -> None:
        assert self.measure(["a red dog.", "A Red DOG.", "a  red dog ."])["retrieval_r1"] == 1.0

    def test_captions_of_unknown_words_never_count_as_equal(self) -> None:
        # Both captions have the same tokens, so the text encoder gives them the same features, and the images tie.
        figures = self.measure(["a zebra", "a yak"])
        assert figures["retrieval_r1"] == 0.25

    def test_figures_come_with_their_sample_sizes(self) -> None:
        figures = self.measure([f"a red dog number {row}" for row in range(250)])
        sizes = {name: figures[name] for name in ("num_pairs", "num_queries", "gallery_size", "num_pairs_full")}
        assert sizes == {"num_pairs": 200, "num_queries": 400, "gallery_size": 200, "num_pairs_full": 250}


class TestSimilarities:
    @pytest.mark.parametrize("d", [1, 2, 3, 7, 8, 17, 64, 129, 1000])
    def test_a_few_places_have_the_bits_of_the_whole_matrix(self, d: int) -> None:
        # `SimilarityTile` computes few places alone and many places as a whole matrix; these must tie with each other.
        rng = np.random.default_rng(d)
        for shape in ((1, 1), (3, 5), (1, 40), (40, 1), (60, 70)):
            queries, answers = (rng.normal(size=(count, d)) for count in shape)
            whole = similarities(queries, answers)
            places = rng.integers(0, shape[0], size=3), rng.integers(0, shape[1], size=3)
            tile = SimilarityTile(queries, answers)
            assert np.array_equal(tile.at(*places), whole[places])
            assert tile.at_least(whole).all()
            assert not tile.at_least(np.nextafter(whole, np.inf)).any()

    def test_a_collapsed_model_with_enormous_features_scores_zero(self) -> None:
        # The products overflow to infinity, and infinities tie.
        huge = np.full((30, 4), 1e200)
        assert retrieval(huge, huge, [str(row) for row in range(30)]).retrieval_r10 == 0.0


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
MASKED = np.ma.masked_array([[0, 1], [2, 3]], mask=[[True, False], [False, True]])


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
        (lambda: retrieval(PAIR, PAIR, ["a", "b"], image_ids=[0]), r"image_ids must be integers of shape \(2,\), got"),
        (
            lambda: retrieval(PAIR, PAIR, ["a", "b"], image_ids=["a", "b"]),
            r"image_ids must be integers of shape \(2,\)",
        ),
        (lambda: retrieval(PAIR, PAIR, ["a", "b"], image_ids=[7, 7]), "image_ids must name at least 2 images, got 7"),
        (lambda: retrieval(PAIR, PAIR, None), "captions must be a sequence of str, got None"),  # type: ignore[arg-type]
        (lambda: retrieval(PAIR, PAIR, ["a", "b"], same_text="no"), "same_text must be a function .*, got 'no'"),  # type: ignore[arg-type]
        (
            lambda: retrieval(PAIR, PAIR, ["a", "b"], same_text=list),
            r"same_text must return hashable keys, got \['a'\]",
        ),  # type: ignore[arg-type]
        (lambda: retrieval(MASKED, PAIR, ["a", "b"]), r"image_features must be an array without a mask, .* \(2, 2\)"),
        (lambda: retrieval(PAIR, PAIR, ["a", "b"], image_ids=MASKED[0]), "image_ids must be an array without a mask"),
        (lambda: zero_shot_accuracy(PAIR, PAIR, MASKED[0]), "labels must be an array without a mask"),
        (lambda: retrieval([[1.0], [1.0, 2.0]], PAIR, ["a", "b"]), "image_features must be an array, got rows of diff"),
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
