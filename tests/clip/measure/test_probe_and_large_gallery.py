"""The linear probe, and ranks in galleries that are computed in tiles."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.data import ArrayDataset, ZeroShot, open_data, pair_splits
from drrho_clip.encoders import FixedFeatures, PairEncoder
from drrho_clip.errors import BadInput
from drrho_clip.features import encode_pairs
from drrho_clip.measure.large_gallery import ranks_in_gallery
from drrho_clip.measure.linear_probe import LinearProbe, linear_probe
from drrho_clip.measure.probing import probe_figures
from drrho_clip.measure.retrieval import Retrieval, retrieval
from drrho_clip.measure.sampled_retrieval import sampled_retrieval
from helpers.small_pairs import write_two_colours


def test_ranks_equal_those_of_the_whole_matrix_and_ties_count_against_the_query() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.integers(-2, 3, (5000, 4)).astype(np.float64)
    queries, correct = rng.normal(size=(600, 4)), rng.integers(0, 5000, 600)
    scores = np.einsum("qd,ad->qa", queries, gallery, optimize=False)
    expected = np.sum(scores >= scores[np.arange(600), correct][:, None], axis=1)
    assert np.array_equal(ranks_in_gallery(queries, gallery, correct), expected)
    with pytest.raises(BadInput, match="correct must lie in"):
        ranks_in_gallery(queries, gallery, correct + 5000)


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_of_all_queries_gives_the_figures_of_a_single_gallery(seed: int) -> None:
    """With many ties, several captions per image, and equal captions of different images."""
    rng = np.random.default_rng(seed)
    images, texts = rng.integers(-1, 2, size=(2, 80, 3))
    captions = [f"Caption {number}" for number in rng.integers(0, 40, size=80)]
    ids = rng.integers(0, 50, size=80)
    for shown in (ids, np.arange(80)):
        whole = retrieval(images, texts, captions, image_ids=shown, same_text=str.lower, gallery_size=80)
        found = sampled_retrieval(images, texts, captions, num_queries=80, image_ids=shown, same_text=str.lower)
        assert 0 < whole.retrieval_r5 < 1
        assert found == {name: whole.metrics()[name] for name in found}


def test_a_sample_of_the_queries_estimates_the_figures_of_all() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3000, 8))
    texts = images + 0.6 * rng.normal(size=(3000, 8))
    captions = [str(row) for row in range(3000)]
    whole = retrieval(images, texts, captions, gallery_size=3000)
    found = [sampled_retrieval(images, texts, captions, num_queries=400, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert (found[0]["num_pairs"], found[0]["num_queries"], found[0]["gallery_size"]) == (3000, 800, 3000)
    # Four standard errors of 800 independent queries.
    bound = 4 * np.sqrt(whole.retrieval_r1 * (1 - whole.retrieval_r1) / 800)
    assert abs(found[0]["retrieval_r1"] - whole.retrieval_r1) < bound
    with pytest.raises(BadInput, match="num_queries must be an integer of at least 1, got 0"):
        sampled_retrieval(images, texts, captions, num_queries=0)


def test_the_command_measures_a_sample_of_the_queries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_two_colours(tmp_path / "pictures", 40, swapped_fraction=0.0)
    table = tmp_path / "pictures" / "pairs.csv"
    rng = np.random.default_rng(0)
    model = FixedFeatures("random", rng.normal(size=(40, 4)), rng.normal(size=(40, 4)))
    encode_pairs(model, open_data(table), tmp_path / "cache")
    command = ["evaluate", str(tmp_path / "cache"), "--data", str(table), "--queries", "9"]
    assert main(command) == 2
    assert "queries must be left out without --gallery all, got 9" in capsys.readouterr().err
    assert main([*command, "--gallery", "all"]) == 0
    assert "R@1, R@5, R@10: 40 pairs, 18 queries, galleries of 40 images" in capsys.readouterr().out


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


def _labelled_table(folder: Path, num_images: int, seed: int = 0) -> Path:
    """Write pictures of two colours, in two rows each, whose labels are the left colours."""
    write_two_colours(folder, num_images, swapped_fraction=0.0, seed=seed)
    lines = (folder / "pairs.csv").read_text().splitlines()[1:]
    rows = [f"{line},{line.split(',')[1].split()[0]}" for line in lines]
    again = [row.replace(" beside ", " next to ") for row in rows]
    (folder / "labelled.csv").write_text("\n".join(["image,caption,label", *rows, *again]))
    return folder / "labelled.csv"


def test_the_command_measures_a_probe_on_images_that_did_not_train_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = _labelled_table(tmp_path, 240)
    run, file = tmp_path / "run", tmp_path / "figures.json"
    words = ["--backend", "numpy", "--method", "clip", "--epochs", "1", "--width", "8"]
    assert main(["train", "--data", str(table), *words, "--out", str(run)]) == 0
    splits = pair_splits(table)
    images = [len(np.unique(part.image_ids)) for part in splits]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--probe", "--json", str(file)]) == 0
    (metrics,) = (row["metrics"] for row in json.loads(file.read_text()))
    # An image with two captions counts once, in the probe and in zero-shot classification.
    assert (metrics["num_probe_training"], metrics["num_probe_test"]) == (images[0], images[2])
    assert metrics["num_zero_shot_images"] == images[2]
    assert metrics["linear_probe_accuracy"] > 0.5
    sizes = f"linear probe: {images[0]} images for training, {images[2]} for the test, 8 classes, C = "
    assert sizes in capsys.readouterr().out
    # Another table has no part for training, so a fifth of each class is for the test.
    other = _labelled_table(tmp_path / "other", 120, seed=1)
    assert main(["evaluate", str(run), "--data", str(other), "--probe", "--json", str(file)]) == 0
    (metrics,) = (row["metrics"] for row in json.loads(file.read_text()))
    labels = open_data(other).labelled_images()
    assert labels is not None
    expected = sum(count // 5 for count in np.bincount(labels.labels))
    assert (metrics["num_probe_test"], metrics["num_probe_training"]) == (expected, 120 - expected)
    assert main(["evaluate", str(run), "--data", str(tmp_path / "pairs.csv"), "--probe"]) == 2
    assert "at least two different labels" in capsys.readouterr().err


def test_a_probe_that_cannot_be_measured_is_refused_before_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = _labelled_table(tmp_path, 40)
    model = FixedFeatures("random", *np.random.default_rng(0).normal(size=(2, 80, 4)))
    encode_pairs(model, open_data(table), tmp_path / "cache")

    def evaluate(*words: object, **names: object) -> None:
        raise AssertionError("the evaluation began")

    monkeypatch.setattr("drrho_clip.evaluate.evaluate", evaluate)
    command = ["evaluate", str(tmp_path / "cache"), "--probe", "--data"]
    assert main([*command, str(tmp_path / "pairs.csv")]) == 2
    assert "at least two different labels" in capsys.readouterr().err
    # Each of the eight colours labels about five pictures, of which four fifths are for training.
    assert main([*command, str(table)]) == 2
    assert "at least 2 classes of at least 5 features" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main([*command, str(table)]) == 2
    assert "scikit-learn" in capsys.readouterr().err


def test_the_images_that_test_a_probe_are_not_the_darkest(monkeypatch: pytest.MonkeyPatch) -> None:
    shades = np.arange(200, dtype=np.uint8)
    images = np.broadcast_to(shades[:, None, None, None], (200, 32, 32, 3)).copy()
    task = ZeroShot(("even", "odd"), ("even", "odd"), images, np.arange(200) % 2)
    dataset = ArrayDataset("shades", images, ["a shade"] * 200, zero_shot=lambda _: task)

    def features_of(images: np.ndarray) -> np.ndarray:
        return np.stack([images[:, 0, 0, 0].astype(np.float64), np.ones(len(images))], axis=1)

    encoder = SimpleNamespace(images=features_of, reads_new_pairs=True, image_size=32, resize_mode="crop")
    tests: list[np.ndarray] = []

    def probe(features: np.ndarray, labels: np.ndarray, tested: np.ndarray, test_labels: np.ndarray) -> LinearProbe:
        tests.append(tested[:, 0])
        return LinearProbe(1.0, 1.0)

    monkeypatch.setattr("drrho_clip.measure.probing.linear_probe", probe)
    probe_figures(cast(PairEncoder, encoder), dataset)
    assert len(tests[0]) == 40
    # The mean of 40 of the shades 0 to 199 has a standard error of 9.
    assert abs(tests[0].mean() - 99.5) < 36


def test_a_gallery_of_all_images_needs_no_matrix_of_all_similarities() -> None:
    rng = np.random.default_rng(0)

    def peak_of(num_images: int) -> tuple[int, Retrieval]:
        # Every image has two captions, and every second image shares a caption with its neighbour.
        ids = np.repeat(np.arange(num_images), 2)
        captions = [f"{row // 4 if row % 2 else row}-{row % 2}" for row in range(2 * num_images)]
        images = rng.normal(size=(num_images, 8))[ids]
        texts = images + rng.normal(size=images.shape)
        tracemalloc.start()
        measured = retrieval(images, texts, captions, image_ids=ids, gallery_size=num_images)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The figures are those of the whole matrix.
        scores = np.einsum("qd,ad->qa", images[::2], texts, optimize=False)
        keys = np.unique(captions, return_inverse=True)[1]
        correct = (keys[::2, None] == keys) | (keys[1::2, None] == keys)
        for answers, table, right in (
            (measured.image_to_text, scores, correct),
            (measured.text_to_image, scores.T, correct.T),
        ):
            best = np.where(right, table, -np.inf).max(axis=1)
            ranks = 1 + np.sum((table >= best[:, None]) & ~right, axis=1)
            assert answers == tuple(np.mean(ranks <= k) for k in (1, 5, 10))
        return peak, measured

    (small, _), (large, measured) = peak_of(300), peak_of(1200)
    assert (measured.num_galleries, measured.gallery_size, measured.num_queries) == (1, 1200, 3600)
    # The matrix of all similarities would have 23 MB; it would grow by a factor of 16.
    assert large < 2 * small + 4_000_000
