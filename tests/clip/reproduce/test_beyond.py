"""Claim 9: the features that steer, the choice of the setting, and a temperature of its own for the reference model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from drrho_clip.reproduce.claims.beyond import BEYOND
from drrho_clip.reproduce.claims.candidates import CANDIDATES, PLAIN, WITHOUT
from drrho_clip.reproduce.experiment import CHOICE_SEED, Experiment
from drrho_clip.reproduce.measuring.guided import blended, folds_of, in_own_columns
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.statistics import HOLDS, NOT_SHOWN
from drrho_clip.reproduce.worlds import HEAD_WORLDS, SCENES, WORLDS, World
from drrho_core import contrastive_step
from helpers.claims import row_of

RNG = np.random.default_rng(1)


def unit(*shape: int) -> np.ndarray:
    rows = RNG.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_a_temperature_of_the_reference_is_a_weight() -> None:
    images, texts, reference_images, reference_texts = unit(4, 6, 5)
    unseen = np.full(6, -np.inf)
    t, t_reference = 0.1, 0.25
    weighted = contrastive_step(
        images,
        texts,
        unseen,
        unseen,
        temperature=t,
        reference_features=(reference_images, reference_texts),
        reference_weight=t / t_reference,
    )
    # By the definition: the mean of exp(s_ij / t - s_ii / t - (r_ij / t_reference - r_ii / t_reference)), j != i.
    excess = images @ texts.T / t - reference_images @ reference_texts.T / t_reference
    difference = np.exp(excess - np.diag(excess)[:, None])
    np.fill_diagonal(difference, 0.0)
    assert np.allclose(weighted.log_inner_image, np.log(difference.sum(axis=1) / 5))


def test_products_of_blended_features_are_blended_similarities() -> None:
    images, texts, others, other_texts = unit(2, 7, 3)[0], unit(7, 3), unit(7, 4), unit(7, 4)
    both = blended(images, others, 0.3) @ blended(texts, other_texts, 0.3).T
    assert np.allclose(both, 0.7 * images @ texts.T + 0.3 * others @ other_texts.T)


def test_an_image_is_judged_by_the_model_of_its_part() -> None:
    part_of = np.asarray([0, 1, 1, 0, 1])
    images, texts = unit(2, 5, 3), unit(2, 5, 3)
    similarities = in_own_columns(images, part_of) @ np.concatenate(list(texts), axis=1).T
    expected = np.where(part_of[:, None] == 0, images[0] @ texts[0].T, images[1] @ texts[1].T)
    assert np.allclose(similarities, expected)


def test_rows_of_an_image_are_in_one_part_and_the_parts_are_equally_large() -> None:
    ids = np.repeat(np.arange(50), 3)
    parts = folds_of(ids, 2, seed=4)
    assert all(len(set(parts[ids == image])) == 1 for image in range(50))
    assert np.bincount(parts).tolist() == [75, 75]


def finished(row: Callable[[Experiment], Row], worlds: Sequence[World] = HEAD_WORLDS) -> list[Row]:
    """Return all rows of the claim, one for each experiment that a plan misses."""
    rows: dict[str, Row] = {}
    while True:
        plan = Plan(rows, worlds, seeds=range(5), quick=False)
        BEYOND.experiments(plan)
        if not plan.missing():
            return list(rows.values())
        rows |= {experiment.config_hash(): row(experiment) for experiment in plan.missing()}


def measured(best: str, confirmed: bool) -> list[Row]:
    """Return all rows of the claim; the candidate `best` leads on validation, and on the other worlds if confirmed."""
    rng = np.random.default_rng(2)

    def value(experiment: Experiment) -> float:
        return 0.5 + 0.1 * (best in experiment.label) + rng.normal(0, 0.002)

    def row(experiment: Experiment) -> Row:
        leads = confirmed or experiment.seed >= CHOICE_SEED
        test = value(experiment) if leads else 0.5 + rng.normal(0, 0.002)
        return row_of(experiment, value(experiment), retrieval_r1=test)

    return finished(row)


@pytest.mark.parametrize(("confirmed", "verdict"), [(True, HOLDS), (False, NOT_SHOWN)])
def test_the_best_setting_of_one_world_is_confirmed_on_the_others(confirmed: bool, verdict: str) -> None:
    rows = [row for row in measured("gamma_min 0.8", confirmed) if row.claim == "beyond"]
    judgement = BEYOND.judge(rows)
    assert judgement is not None
    assert judgement.verdict == verdict
    assert "gamma_min 0.8" in judgement.sentence
    first, *others = [world.name for world in HEAD_WORLDS]
    # The first world is for the choice only.
    assert {row.seed for row in rows if row.dataset == first} == {100, 101, 102}
    for other in others:
        assert {row.seed for row in rows if row.dataset == other} == set(range(5))
    tried = [figure for figure in judgement.figures if figure.label.startswith(f"{first}, validation")]
    # Every candidate, sogclr without a reference and the combination are on the page; the combination has the label of
    # both parts, one of which is the best candidate.
    assert len(tried) == len(CANDIDATES) + 2
    assert sum("gamma_min 0.8" in figure.label for figure in tried) == 2


@pytest.mark.parametrize("worlds", [(), SCENES, HEAD_WORLDS[1:]])
def test_without_the_world_of_the_choice_nothing_is_measured(worlds: Sequence[World]) -> None:
    plan = Plan({}, worlds, seeds=range(5), quick=False)
    BEYOND.experiments(plan)
    assert not plan.experiments


def test_pictures_with_more_wrong_captions_confirm_too() -> None:
    rows = finished(lambda each: row_of(each, 0.5, retrieval_r1=0.5), tuple(WORLDS.values()))
    worlds = {row.dataset for row in rows if row.claim == "beyond" and row.seed < CHOICE_SEED}
    assert worlds == {"fashion-heads", "openclipart-heads", "fashion-50", "scenes-60"}


def test_a_combination_changes_what_each_of_both_candidates_does_not_change() -> None:
    best = "own halves + anchor_weights posterior"
    gains = {best: 0.3, "anchor_weights posterior": 0.2, "gamma 1": 0.1}
    rows = finished(lambda each: row_of(each, 0.5 + gains.get(each.label, 0.0), retrieval_r1=0.5))
    assert f"{best} + gamma 1" in {row.label for row in rows}


def test_rows_of_another_world_with_the_same_seeds_do_not_count_in_the_choice() -> None:
    rows = measured("gamma_min 0.8", confirmed=True)
    of_claim = [row for row in rows if row.claim == "beyond"]
    judgement = BEYOND.judge(of_claim)
    # In another world the trials would choose another setting.
    others = [
        row_of(replace(row.experiment, dataset=HEAD_WORLDS[1].name), 0.5 + 0.4 * (row.label == "gamma_min 0.2"))
        for row in of_claim
        if row.seed >= CHOICE_SEED
    ]
    assert len(others) > len(CANDIDATES)
    plan = Plan({row.config_hash: row for row in (*rows, *others)}, HEAD_WORLDS, seeds=range(5), quick=False)
    BEYOND.experiments(plan)
    assert not plan.missing()
    assert BEYOND.judge([*of_claim, *others]) == judgement


def test_rows_of_a_former_plan_do_not_count_in_the_choice() -> None:
    rows = measured("gamma_min 0.8", confirmed=True)
    # A former plan had another batch size, and its trials would choose another setting.
    former = []
    for row in rows:
        if row.claim == "beyond" and row.seed >= CHOICE_SEED:
            settings = {**row.settings, "target": {**row.settings["target"], "batch_size": 7}}
            value = 0.5 + 0.4 * (row.label == "gamma_min 0.2")
            former.append(row_of(replace(row.experiment, settings=settings), value))
    plan = Plan({row.config_hash: row for row in (*rows, *former)}, HEAD_WORLDS, seeds=range(5), quick=False)
    BEYOND.experiments(plan)
    assert not plan.missing()
    assert {row.config_hash for row in rows} == plan.experiments.keys()


def test_of_settings_with_equal_gains_the_plan_and_the_page_choose_the_same_setting() -> None:
    equal = ("gamma_min 0.8", "gamma_min 0.2")
    rows = finished(lambda each: row_of(each, 0.5 + 0.1 * (each.label in equal), retrieval_r1=0.5))
    confirmed = {row.label for row in rows if row.claim == "beyond" and row.seed < CHOICE_SEED}
    assert equal[0] in confirmed
    assert equal[1] not in confirmed
    # The rows stand in the order in which the experiments ended.
    for order in (1, -1):
        judgement = BEYOND.judge([row for row in rows if row.claim == "beyond"][::order])
        assert judgement is not None
        assert equal[0] in judgement.sentence
        tried = [figure.label for figure in judgement.figures if ", validation: " in figure.label]
        assert equal[0] in tried[0]


def test_without_trials_of_a_candidate_there_is_no_judgement_yet() -> None:
    rows = measured("gamma_min 0.8", confirmed=True)
    keys = (PLAIN.key, WITHOUT.key)
    assert BEYOND.judge([row for row in rows if row.claim == "beyond" and (row.method, row.label) in keys]) is None


def test_the_setup_says_which_validation_captions_are_right() -> None:
    worlds = [world.name for world in HEAD_WORLDS if world.recipe.swapped_fraction and not world.noisy_validation]
    assert f"The validation captions of {' and '.join(f'`{name}`' for name in worlds)} are right." in BEYOND.setup


def test_candidates_have_different_names() -> None:
    keys = [candidate.key for candidate in (PLAIN, WITHOUT, *CANDIDATES)]
    assert len(set(keys)) == len(keys)


def test_refused_runs_are_named() -> None:
    rows = [
        replace(row, metrics={**row.metrics, "refused": 1.0}) if row.label == "drop_suspects auto" else row
        for row in measured("gamma_min 0.8", confirmed=True)
        if row.claim == "beyond"
    ]
    judgement = BEYOND.judge(rows)
    assert judgement is not None
    refused = [figure.label for figure in judgement.figures if "refused" in figure.label]
    assert refused
    assert all("drop_suspects auto - plain drrho, 3 refused" in label for label in refused)
