"""The standing of a claim: former rows and unfinished worlds do not count, and no verdict is given too early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from drrho_clip.reproduce.claim import Claim, Figure, Judgement
from drrho_clip.reproduce.claims import CLAIMS
from drrho_clip.reproduce.experiment import CHOICE_SEED, Experiment
from drrho_clip.reproduce.pages import write_pages
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Results, Row
from drrho_clip.reproduce.standing import standing_of
from drrho_clip.reproduce.statistics import HOLDS, NOT_SHOWN, Interval
from drrho_clip.reproduce.worlds import WORLDS
from helpers.claims import invented, row_of, row_with

COMMITTED = Path(__file__).parents[3] / "docs" / "claims"


def _experiment(world: str, seed: int, size: int = 1, backend: str | None = None) -> Experiment:
    experiment = Experiment("invented", "invented", world, "drrho", "weak", seed, {"size": size}, quick=False)
    return experiment if backend is None else replace(experiment, backend=backend)


def _plan(plan: Plan) -> None:
    # The second world is planned only when the choice on the first world is known, as a learning rate is.
    choice = _experiment("first", CHOICE_SEED)
    plan.add(choice)
    for seed in plan.seeds:
        plan.add(_experiment("first", seed))
        if choice.config_hash() in plan.rows:
            plan.add(_experiment("second", seed))


def _judge(rows: list[Row]) -> Judgement:
    worlds = sorted({row.dataset for row in rows})
    return Judgement([Figure(" and ".join(worlds), Interval(1.0, 1.0, 1.0, 0.0, len(rows), 0.0))], HOLDS, "It holds.")


INVENTED = Claim("invented", 1, "Invented", "A statement.", "A setup.", _plan, _judge, lambda rows: {})  # type: ignore[arg-type]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path, quick=False)


def _add(results: Results, *experiments: Experiment) -> None:
    for experiment in experiments:
        results.append(row_with(experiment, {"figure": 1.0}))


def test_a_claim_does_not_hold_before_every_world_is_complete(results: Results) -> None:
    _add(results, _experiment("first", CHOICE_SEED), _experiment("first", 0), _experiment("first", 1))
    # One row of the second world has no part in the verdict.
    _add(results, _experiment("second", 0))
    standing = standing_of(INVENTED, results)
    assert standing.judgement is not None
    assert standing.judgement.figures[0].label == "first"
    assert standing.judgement.verdict == NOT_SHOWN
    assert standing.judgement.sentence == ("Not measured yet: second. In the measured worlds: It holds.")
    assert standing.missing == {"second": 1}
    _add(results, _experiment("second", 1))
    complete = standing_of(INVENTED, results)
    assert complete.judgement is not None
    assert (complete.judgement.verdict, complete.judgement.sentence) == (HOLDS, "It holds.")
    assert complete.judgement.figures[0].label == "first and second"


def test_rows_of_a_former_plan_do_not_count(results: Results) -> None:
    _add(results, *(_experiment("first", seed, size=2) for seed in (0, 1, 2)))
    standing = standing_of(INVENTED, results)
    assert standing.judgement is None
    assert (list(standing.rows), standing.num_outdated) == ([], 3)
    _add(results, _experiment("first", CHOICE_SEED), *(_experiment("first", seed) for seed in (0, 1, 2)))
    counted = standing_of(INVENTED, results)
    assert [row.settings for row in counted.rows if row.seed < CHOICE_SEED] == [{"size": 1}] * 3
    assert counted.num_outdated == 3


def test_rows_count_on_a_machine_with_another_array_library(results: Results) -> None:
    seeds = (CHOICE_SEED, 0, 1)
    _add(results, *(_experiment(world, seed, backend="elsewhere") for world in ("first", "second") for seed in seeds))
    judgement = standing_of(INVENTED, results).judgement
    assert judgement is not None
    assert judgement.verdict == HOLDS


def test_a_claim_that_has_only_its_choices_is_judged_with_their_seeds(tmp_path: Path) -> None:
    # The quick form of this claim has one world, on which it chooses, and no world that confirms.
    results = Results(tmp_path, quick=True)
    while True:
        plan = Plan(results.rows, list(WORLDS.values()), seeds=range(2), quick=True)
        CLAIMS["beyond"].experiments(plan)
        if not plan.missing():
            break
        results.rows |= {each.config_hash(): row_of(each) for each in plan.missing()}
    assert all(row.seed >= CHOICE_SEED for row in results.rows.values())
    standing = standing_of(CLAIMS["beyond"], results)
    assert not standing.missing
    assert standing.judgement is not None


@pytest.mark.parametrize("name", list(CLAIMS))
def test_an_interrupted_command_leaves_rows_that_can_be_judged(name: str, tmp_path: Path) -> None:
    rows = invented(name, tmp_path, 0.2).rows.values()
    claim = CLAIMS[name]
    for number, share in enumerate((0.6, 0.1, 0.99)):
        part = Results(tmp_path, quick=False)
        part.rows = {row.config_hash: row for row in list(rows)[: round(share * len(rows))]}
        standing = standing_of(claim, part)
        assert standing.missing
        assert standing.judgement is None or standing.judgement.verdict != HOLDS
        # Pictures take most of the time, so one part has pages.
        if number == 0:
            write_pages([claim], part)


def test_committed_rows_are_those_of_the_plan_of_today() -> None:
    results = Results(COMMITTED, quick=False)
    assert {name: standing_of(claim, results).num_outdated for name, claim in CLAIMS.items()} == dict.fromkeys(
        CLAIMS, 0
    )
