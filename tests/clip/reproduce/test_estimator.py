"""The estimator of SogCLR on linear heads: exact gradients, errors that vanish where they must, and a tiny run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.reproduce.claims.estimator import ESTIMATOR
from drrho_clip.reproduce.estimator.errors import ERRORS, errors_of, measure_errors
from drrho_clip.reproduce.estimator.heads import embed, pull_back, start_heads
from drrho_clip.reproduce.estimator.pairs import draw_pairs
from drrho_clip.reproduce.estimator.rules import COSINE, HALF, NO_MEMORY, RELEASED, RULES, SCENT, Moment
from drrho_clip.reproduce.estimator.training import CLIP, Problem, Training, measure_heads, recall_of
from drrho_clip.reproduce.experiment import CHOICE_SEED, Experiment
from drrho_clip.reproduce.grid import TRIED, chosen_rate
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Metrics, Row
from drrho_core import InnerEstimator
from helpers.claims import row_of, row_with

MODEL = {"width": 4, "temperature": 0.2, "batch": 8, "epochs": 2, "rate": 0.01}


def problem(num: int = 32) -> Problem:
    return Problem(draw_pairs(num, num_reference=8, swapped=0.25, rng=np.random.default_rng(0)), None)


def filled(num: int, image: np.ndarray, text: np.ndarray) -> InnerEstimator:
    estimator = InnerEstimator(num, like=np.zeros(1), dtype=np.float64)
    return estimator.scatter(np.arange(num), image, text)


def test_gradients_of_the_heads_are_the_slopes_of_the_loss() -> None:
    pairs = draw_pairs(6, num_reference=2, swapped=0.0, rng=np.random.default_rng(1)).train
    heads = start_heads(3, np.random.default_rng(2))
    weights = np.random.default_rng(3).normal(size=(2, 6, 3))

    def loss(heads: dict[str, np.ndarray]) -> float:
        return sum(float(np.sum(w * e)) for w, e in zip(weights, embed(heads, pairs), strict=True))

    slopes = pull_back(heads, pairs, (weights[0], weights[1]))
    for name, place in (("image", (0, 0)), ("image", (47, 2)), ("text", (5, 1)), ("text", (20, 0))):
        ends = []
        for sign in (1, -1):
            moved = {key: matrix.copy() for key, matrix in heads.items()}
            moved[name][place] += sign * 1e-6
            ends.append(loss(moved))
        assert slopes[name][place] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8), (name, place)


def test_exactly_the_share_of_the_training_captions_belongs_to_another_image() -> None:
    sets = [draw_pairs(40, num_reference=8, swapped=share, rng=np.random.default_rng(4)) for share in (0.0, 0.25)]
    right, swapped = (each.train.texts for each in sets)
    moved = np.any(right != swapped, axis=1)
    assert np.count_nonzero(moved) == 10
    # The same captions are there, in another order.
    assert {row.tobytes() for row in right} == {row.tobytes() for row in swapped}
    assert np.array_equal(sets[0].train.images, sets[1].train.images)


def test_a_batch_of_all_pairs_without_memory_has_no_error() -> None:
    training = Training(problem(), MODEL, NO_MEMORY, seed=(0, 1))
    everything = np.stack([np.arange(32), np.arange(32)[::-1]])[:, None]
    stale = filled(32, np.full(32, -3.0), np.full(32, 2.0))
    assert errors_of(training, NO_MEMORY, stale, Moment(1.0, 2), everything) == pytest.approx([0.0] * 3, abs=1e-12)
    # Stale estimates are an error of every rule with memory.
    assert all(error > 0.1 for error in errors_of(training, "0.5", stale, Moment(1.0, 2), everything))


def test_right_estimates_of_the_past_make_the_error_of_a_small_batch_smaller() -> None:
    training = Training(problem(), MODEL, NO_MEMORY, seed=(0, 1))
    rng, moment = np.random.default_rng(6), Moment(1.0, 2)
    batches = np.stack([rng.permutation(32).reshape(4, 8) for _ in range(40)])
    unseen = InnerEstimator(32, like=np.zeros(1), dtype=np.float64)
    truth = training.estimate(NO_MEMORY, unseen, moment, np.arange(32))
    exact = filled(32, np.asarray(truth.log_inner_image), np.asarray(truth.log_inner_text))
    memory, none = (errors_of(training, rule, exact, moment, batches) for rule in ("0.2", NO_MEMORY))
    assert memory[0] < 0.5 * none[0]
    # Weights of a batch that sum to 1 have a bias; divided by the right u they have none.
    assert memory[1] < 0.5 * none[1]
    # By definition: the root mean square over the anchors of both kinds.
    squares = []
    for rows in batches[0]:
        step = training.estimate(NO_MEMORY, unseen, moment, rows)
        squares.append((step.log_inner_image - truth.log_inner_image[rows]) ** 2)
        squares.append((step.log_inner_text - truth.log_inner_text[rows]) ** 2)
    first = errors_of(training, NO_MEMORY, exact, moment, np.stack([batches[0], batches[0]]))
    assert first[0] == pytest.approx(np.sqrt(np.mean(squares)))


def test_rules_for_gamma() -> None:
    log_inner = np.asarray([-np.inf, -10.0]), np.asarray([-20.0, 0.0])
    middle = Moment(4.5, 8)
    assert {rule: RULES[rule](middle, log_inner) for rule in (NO_MEMORY, "0.8", "0.5", "0.2")} == {
        NO_MEMORY: 1.0, "0.8": 0.8, "0.5": 0.5, "0.2": 0.2,
    }  # fmt: skip
    # The rule by epoch does not change within an epoch; both end at 0.2.
    assert RULES[COSINE](middle, log_inner) == RULES[COSINE](Moment(4.0, 8), log_inner) == pytest.approx(0.6)
    assert RULES["cosine by step"](middle, log_inner) < 0.6
    for rule in (COSINE, "cosine by step"):
        assert RULES[rule](Moment(8.0, 8), log_inner) == pytest.approx(0.2)
    # FastCLIP's code reaches 0.2 after half of the epochs; the last value of DRRho's code depends on their number.
    assert RULES[HALF](Moment(2.9, 8), log_inner) == pytest.approx(0.6)
    assert [RULES[HALF](Moment(epoch, 8), log_inner) for epoch in (4.0, 7.0)] == pytest.approx([0.2, 0.2])
    assert RULES[RELEASED](Moment(16.0, 16), log_inner) == pytest.approx(4.177 * 16**-0.7265)
    assert RULES[RELEASED](Moment(3.5, 7), log_inner) == 1.0
    image, text = RULES[SCENT](middle, log_inner)
    np.testing.assert_allclose(image, [1.0, 0.5])
    np.testing.assert_allclose(text, [1e-3, 1.0], rtol=1e-4)


@pytest.mark.parametrize("rule", [CLIP, NO_MEMORY, COSINE, SCENT])
def test_training_learns_to_retrieve(rule: str) -> None:
    pairs = Problem(draw_pairs(256, num_reference=8, swapped=0.1, rng=np.random.default_rng(5)), None)
    training = Training(pairs, {**MODEL, "width": 12, "batch": 32, "epochs": 6}, rule, seed=(0, 1))
    before = recall_of(training.heads, pairs.sets.test)
    for moment, rows in training.batches():
        training.advance(moment, rows)
    assert recall_of(training.heads, pairs.sets.test) > before + 0.1


def test_a_tiny_experiment(tmp_path: Path) -> None:
    settings = {
        "data": {"num": 32, "num_reference": 16, "swapped": 0.25},
        "model": {name: value for name, value in MODEL.items() if name != "rate"},
        "rule": COSINE,
        "steering": MODEL,
        "trials": [0.01, 0.1],
    }
    choice = Experiment("estimator", "linear-heads", "pairs-32", "drrho", "weak", CHOICE_SEED, settings, quick=True)
    tried = measure_heads(choice, tmp_path).metrics["validation"]
    assert isinstance(tried, list)
    assert len(tried) == 2
    single = replace(choice, seed=0, settings={**settings, "trials": [0.01]})
    assert set(measure_heads(single, tmp_path).metrics) == {"retrieval_r1"}
    errors = replace(single, task="estimator", settings={**single.settings, "measured": [1, 2]})
    first, again = (measure_errors(errors, tmp_path).metrics for _ in range(2))
    assert first == again
    assert set(first) == {f"{error} {rule}" for error in ERRORS for rule in RULES}
    assert {len(curve) for curve in first.values() if isinstance(curve, list)} == {2}
    # Without a reference model the training is another one, and so are the errors.
    plain = replace(errors, method="sogclr", reference=None, settings={**errors.settings, "steering": None})
    assert measure_errors(plain, tmp_path).metrics != first


def test_rates_beyond_the_end_are_tried_if_the_best_rate_is_at_the_end() -> None:
    experiment = Experiment("estimator", "linear-heads", "pairs-512", "clip", None, 0, {}, quick=False)
    rates, lower, higher = (0.1, 0.2, 0.4), (0.025, 0.05), (0.8, 1.6)

    def chosen(*figures: float, further: Sequence[float]) -> tuple[float | None, list[list[float]]]:
        """Return the choice, and the lists of rates that were tried."""
        rows: dict[str, Row] = {}
        for values in (figures, further):
            plan = Plan(rows, [], seeds=(0,), quick=False)
            assert chosen_rate(plan, experiment, rates, lower, higher) is None or not plan.missing()
            for each in plan.missing():
                rows[each.config_hash()] = replace(row_of(each), metrics={TRIED: [*values]})
        plan = Plan(rows, [], seeds=(0,), quick=False)
        best = chosen_rate(plan, experiment, rates, lower, higher)
        assert not plan.missing()
        return best, [each.settings["trials"] for each in plan.experiments.values()]

    assert chosen(0.1, 0.3, 0.2, further=()) == (0.2, [[*rates]])
    assert chosen(0.3, 0.2, 0.1, further=(0.4, 0.35)) == (0.025, [[*rates], [*lower]])
    assert chosen(0.1, 0.2, 0.3, further=(0.4, 0.35)) == (0.8, [[*rates], [*higher]])
    # The end of the grid stays the choice if nothing beyond it is better.
    assert chosen(0.1, 0.2, 0.3, further=(0.3, 0.0)) == (0.4, [[*rates], [*higher]])


def test_a_rate_at_the_end_of_both_experiments_is_marked_in_the_table() -> None:
    model = {**MODEL, "batch": 16}
    experiment = Experiment(
        "estimator", "linear-heads", "pairs-512", "clip", None, 0, {"rule": CLIP, "model": model, "data": {"num": 512}},
        quick=False, label="B = 16",
    )  # fmt: skip

    def row(seed: int, trials: Sequence[float], metrics: Metrics) -> Row:
        settings = {**experiment.settings, "trials": [*trials]}
        return row_with(replace(experiment, seed=seed, settings=settings), metrics)

    def cell(rate: float, *choices: Row) -> str:
        seeds = [row(seed, [rate], {"retrieval_r1": 0.5}) for seed in range(2)]
        *_, recalls = ESTIMATOR.tables([*choices, *seeds])
        ((*_, chosen),) = recalls.lines
        return chosen

    first = row(CHOICE_SEED, [0.001, 0.003, 0.01], {TRIED: [0.1, 0.2, 0.3]})
    second = row(CHOICE_SEED, [0.03, 0.1], {TRIED: [0.2, 0.4]})
    assert cell(0.01, first) == "0.01 (end)"
    assert cell(0.003, first) == "0.003"
    assert cell(0.01, first, second) == "0.01"
    assert cell(0.1, first, second) == "0.1 (end)"
