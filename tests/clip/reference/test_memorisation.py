"""The rule that tells whether a reference model has learnt wrong captions by heart, on curves and features by hand."""

from __future__ import annotations

import numpy as np
import pytest

from drrho_clip.reference.memorisation import (
    PairFeatures,
    Shares,
    groups,
    hopeless_share,
    pair_losses,
    rows_for_shares,
    serves_better,
    shares_of,
    suspect_share,
    swapped_pair_losses,
)

# R@1 on held-out pairs, and the shares of hopeless training and held-out pairs, epoch by epoch: R@1 still rises while
# the model learns the wrong captions by heart.
CURVE = [
    (0.10, 0.30, 0.30),
    (0.40, 0.28, 0.29),
    (0.55, 0.20, 0.28),
    (0.65, 0.13, 0.28),
    (0.70, 0.05, 0.28),
    (0.72, 0.00, 0.28),
]


def kept_epoch(curve: list[tuple[float, float, float]]) -> int | None:
    best: tuple[float, int] | None = None
    for epoch, (r1, train, validation) in enumerate(curve):
        if serves_better(r1, Shares(train, validation), None if best is None else best[0]):
            best = r1, epoch
    return None if best is None else best[1]


def test_the_best_epoch_before_memorisation_is_kept() -> None:
    assert kept_epoch(CURVE) == 2


def test_the_earliest_of_equally_good_epochs_is_kept() -> None:
    assert kept_epoch([(0.4, 0.3, 0.3), (0.4, 0.3, 0.3)]) == 0


def test_with_clean_held_out_pairs_the_best_epoch_is_kept() -> None:
    assert kept_epoch([(r1, train, 0.04) for r1, train, _ in CURVE]) == 5


def test_no_epoch_is_kept_if_all_have_memorised() -> None:
    assert kept_epoch([(r1, 0.0, 0.3) for r1, _, _ in CURVE]) is None


def test_training_of_a_reference_model_ends_below_a_quarter() -> None:
    assert [Shares(train, validation).past_hope for _, train, validation in CURVE] == [False] * 4 + [True] * 2
    assert not Shares(0.07, 0.28).past_hope


@pytest.mark.parametrize(
    ("train", "validation", "memorised"), [(0.1, 0.2, False), (0.099, 0.2, True), (0.0, 0.04, False)]
)
def test_the_rule_at_its_borders(train: float, validation: float, memorised: bool) -> None:
    assert Shares(train, validation).memorised is memorised


def test_a_pair_loss_of_0_is_not_hopeless() -> None:
    assert hopeless_share(np.asarray([0.0, -1.0])) == 0.0


def test_the_share_of_suspects_stays_a_share() -> None:
    assert suspect_share(Shares(0.9, 0.9)) == 1.0
    assert suspect_share(Shares(0.2, 0.24)) == pytest.approx(0.3)


def test_both_parts_have_equally_many_distinct_rows() -> None:
    train, validation = rows_for_shares(5000, 300)
    assert len(train) == len(validation) == len(set(train.tolist())) == 300
    assert train.max() < 5000
    assert validation.max() < 300
    again, _ = rows_for_shares(5000, 300)
    assert train.tolist() == again.tolist()
    assert [len(rows) for rows in rows_for_shares(9000, 8000)] == [2000, 2000]


def test_swapped_captions_are_hopeless_and_the_others_are_not() -> None:
    images = np.eye(20)
    texts = images.copy()
    texts[[3, 7, 11]] = images[[7, 11, 3]]
    losses = pair_losses(PairFeatures(images, texts), temperature=0.1)
    assert np.flatnonzero(losses > 0).tolist() == [3, 7, 11]
    right, wrong = PairFeatures(images, images), PairFeatures(images, texts)
    assert shares_of(right, wrong, temperature=0.1) == Shares(0.0, 0.15)


def test_another_caption_of_the_image_does_not_make_a_pair_hopeless() -> None:
    # Four images with four captions each; the fourth caption of each image is right but vague.
    images = np.repeat(np.eye(5)[:4], 4, axis=0)
    texts = images.copy()
    texts[3::4] = 0.6 * images[3::4] + 0.8 * np.eye(5)[4]
    image_ids = np.repeat(np.arange(4), 4)
    with_siblings = pair_losses(PairFeatures(images, texts), temperature=0.1)
    assert np.flatnonzero(with_siblings > 0).tolist() == [3, 7, 11, 15]
    pairs = PairFeatures(images, texts, image_ids)
    losses = pair_losses(pairs, temperature=0.1)
    # A vague caption is 0.6 better than the captions of another image, a precise one 1.0 better than most of them.
    assert losses[3::4] == pytest.approx(-6.0)
    assert losses[0::4] == pytest.approx(-10.0)
    assert shares_of(pairs, pairs, temperature=0.1) == Shares(0.0, 0.0)


def test_pairs_of_a_single_image_are_not_hopeless() -> None:
    losses = pair_losses(PairFeatures(np.eye(3), np.eye(3)[[1, 2, 0]], np.zeros(3, dtype=np.int64)), temperature=0.1)
    assert losses.tolist() == [0.0, 0.0, 0.0]


def test_large_tables_are_compared_in_groups_that_hold_every_row_once() -> None:
    parts = groups(40_000)
    assert max(len(part) for part in parts) <= 16_384
    assert sorted(np.concatenate(parts).tolist()) == list(range(40_000))


def test_the_losses_of_groups_are_about_those_of_all_pairs() -> None:
    # With 17,000 pairs there are two groups. A pair is wrong if its caption is that of the next pair.
    rng = np.random.default_rng(0)
    images = rng.normal(size=(17_000, 8)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    wrong = rng.random(17_000) < 0.2
    texts = np.where(wrong[:, None], np.roll(images, 1, axis=0), images)
    losses = pair_losses(PairFeatures(images, texts), temperature=0.2)
    assert losses[~wrong].max() < 0.0
    assert np.mean(losses[wrong] > 0) > 0.5


def test_swapped_pairs_have_a_caption_of_another_image() -> None:
    # Rows 0 and 1 show the same image, and so do rows 2 and 3; all captions of an image fit perfectly.
    features = np.eye(2)[[0, 0, 1, 1]]
    pairs = PairFeatures(features, features, np.asarray([0, 0, 1, 1]))
    losses = swapped_pair_losses(pairs, temperature=0.5)
    assert len(losses) > 1000
    # Each image is compared with the own caption, which fits, and with a caption that does not fit.
    assert np.unique(losses) == pytest.approx([np.log((np.exp(1.0 / 0.5) + 1.0) / 2.0)])
    one_image = PairFeatures(features, features, np.zeros(4, dtype=np.int64))
    assert len(swapped_pair_losses(one_image, temperature=0.5)) == 0


def test_swapped_pairs_are_random_pairs() -> None:
    # Neighbours resemble each other: the features of the rows run once around the circle.
    angle = np.linspace(0.0, 2.0 * np.pi, 1000, endpoint=False)
    features = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    losses = swapped_pair_losses(PairFeatures(features, features), temperature=0.5)
    assert losses.shape == (5000,)
    # The mean similarity of random pairs is 0 and that of a pair is 1.
    own = pair_losses(PairFeatures(features, features), temperature=0.5)
    assert np.mean(losses) - np.mean(own) == pytest.approx(1 / 0.5, abs=0.05)
