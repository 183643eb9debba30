"""The plan of a claim: settings of the claim's own, reference models of the claim's own, and the choice of rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from drrho_clip.reproduce.experiment import LEARNING_RATES, Experiment
from drrho_clip.reproduce.plan import Plan, Reference, best_rate
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.worlds import WORLDS, World
from helpers.claims import row_of

WORLD = WORLDS["scenes-30"]


def finished(
    add: Callable[[Plan, World], None], *, quick: bool = False, best: float = WORLD.rates[1]
) -> list[Experiment]:
    """Return all experiments of a plan, after rounds in which a figure is larger the nearer the rate is to the best."""
    rows: dict[str, Row] = {}
    while True:
        plan = Plan(rows, [WORLD], seeds=(0, 1), quick=quick)
        add(plan, plan.worlds[0])
        if not plan.missing():
            return list(plan.experiments.values())
        for experiment in plan.missing():
            figure = math.exp(-abs(math.log(rate_of(experiment) / best)))
            rows[experiment.config_hash()] = row_of(experiment, figure)


def rate_of(experiment: Experiment) -> float:
    group = "reference" if experiment.method == "reference" else "target"
    return float(experiment.settings[group]["learning_rate"])


def trials_and_others(experiments: list[Experiment]) -> tuple[list[Experiment], list[Experiment]]:
    trials = [experiment for experiment in experiments if experiment.claim == LEARNING_RATES]
    return trials, [experiment for experiment in experiments if experiment.claim != LEARNING_RATES]


def test_settings_of_a_claim_share_the_rate_of_the_method_unless_the_claim_asks_for_a_choice() -> None:
    def add(plan: Plan, world: World) -> None:
        plan.add_target("data-efficiency", world, "sogclr")
        plan.add_target("data-efficiency", world, "sogclr", label="half", data={"train_size": 10})
        plan.add_target("data-efficiency", world, "sogclr", label="long", settings={"epochs": 99}, choose=True)

    trials, others = trials_and_others(finished(add))
    # The first two share a choice, the third has one.
    assert [trial.label for trial in trials] == [""] * len(WORLD.rates) + ["long"] * len(WORLD.rates)
    by_label = {experiment.label: experiment.settings for experiment in others}
    assert by_label["half"]["data"] == {**WORLD.data, "train_size": 10}
    assert by_label["half"]["target"] == by_label[""]["target"]
    assert by_label["long"]["target"] == {**by_label[""]["target"], "epochs": 99}
    assert len(others) == 6


def test_a_steered_method_has_the_rate_of_the_first_reference_model_with_every_reference_model() -> None:
    def add(plan: Plan, world: World) -> None:
        for reference in world.references:
            plan.add_target("weak-to-strong", world, "drrho", reference)

    trials, others = trials_and_others(finished(add))
    assert {trial.reference for trial in trials if trial.method == "drrho"} == {next(iter(WORLD.references))}
    assert {experiment.reference for experiment in others} == set(WORLD.references)


def test_a_reference_model_of_a_claim_has_the_rate_of_the_base_and_serves_all_targets() -> None:
    long = Reference("long", "weak", {"epochs": 50, "swapped_fraction": 0.9})
    free = Reference("free", "weak", {"epochs": 51}, choose=True)
    fixed = Reference("fixed", "weak", {"learning_rate": 0.5})

    def add(plan: Plan, world: World) -> None:
        for reference in (long, free, fixed):
            plan.add_reference("good-reference", world, reference)
            plan.add_target("good-reference", world, "drrho", reference)
            plan.add_target("good-reference", world, "drrho", reference, label="half", data={"train_size": 10})

    trials, others = trials_and_others(finished(add))
    assert {trial.reference for trial in trials if trial.method == "reference"} == {"weak", "free"}
    recipes = {experiment.reference: experiment.settings["reference"] for experiment in others}
    assert {name: recipes["long"][name] for name in long.settings} == long.settings
    assert recipes["fixed"]["learning_rate"] == 0.5
    for name in recipes:
        # The model itself, the target and the target with other data need one reference model per seed.
        hashes = {experiment.reference_hash() for experiment in others if experiment.reference == name}
        assert len(hashes) == 2


def test_a_quick_plan_has_no_larger_sizes_than_the_quick_world() -> None:
    def add(plan: Plan, world: World) -> None:
        reference = Reference("long", "weak", {"epochs": 50})
        plan.add_target(
            "a", world, "drrho", reference, settings={"epochs": 99, "gamma_min": 0.3}, data={"train_size": 9_999}
        )

    for experiment in finished(add, quick=True):
        assert experiment.quick
        for group in experiment.settings.values():
            assert all(group[name] <= WORLD.largest[name] for name in WORLD.largest.keys() & group.keys())
    assert experiment.settings["target"]["gamma_min"] == 0.3


def test_a_rate_that_diverges_is_taken_only_if_all_rates_diverge() -> None:
    trial = Experiment(LEARNING_RATES, "training", "scenes-30", "clip", None, 100, {}, quick=False)
    rows = {rate: row_of(trial, value) for rate, value in ((0.1, 0.3), (0.2, 0.5), (0.4, 0.5))}
    assert best_rate(rows) == 0.2
    diverged = {rate: row_of(trial, 0.9, diverged=1.0) for rate in (0.2, 0.4)}
    assert best_rate(rows | diverged) == 0.1
    assert best_rate(diverged) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("best", "further"),
    [
        (WORLD.rates[1], []),
        # The best rate is one factor of 2 beyond the grid, and a neighbour shows that it is the best.
        (WORLD.rates[0] / 2, [0.002, 0.001]),
        (WORLD.rates[-1] * 2, [0.032, 0.064]),
        # The grid does not grow forever.
        (1e-9, [0.002, 0.001]),
        (1e9, [0.032, 0.064]),
    ],
)
@pytest.mark.parametrize("reference", [None, "weak"])
def test_a_grid_grows_while_its_best_rate_is_at_an_end(
    best: float, further: list[float], reference: str | None
) -> None:
    def add(plan: Plan, world: World) -> None:
        if reference is None:
            plan.add_target("table", world, "clip")
        else:
            plan.add_reference("table", world, reference)

    trials, others = trials_and_others(finished(add, best=best))
    tried = [rate_of(trial) for trial in trials]
    assert tried == [*WORLD.rates, *further]
    chosen = min(tried, key=lambda rate: abs(math.log(rate / best)))
    assert {rate_of(other) for other in others} == {chosen}


def test_a_grid_of_one_rate_does_not_grow() -> None:
    trials, _ = trials_and_others(finished(lambda plan, world: plan.add_target("table", world, "clip"), quick=True))
    assert [rate_of(trial) for trial in trials] == [WORLD.rates[0]]
