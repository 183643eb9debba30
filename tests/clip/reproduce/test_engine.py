"""`drrho reproduce`: experiments are run once, continue after an interruption, and their rows are trustworthy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from drrho_clip.cli import main
from drrho_clip.commands.reproduce import NAMES
from drrho_clip.errors import BadInput
from drrho_clip.reproduce.claims import CLAIMS
from drrho_clip.reproduce.engine import reproduce
from drrho_clip.reproduce.experiment import CHOICE_SEED, LEARNING_RATES, Experiment
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Results, Row, read_rows
from drrho_clip.reproduce.worlds import WORLDS
from helpers.claims import row_of

EXPERIMENT = Experiment(
    "variance", "variances", "scenes-30", "drrho", "weak", 0, {"a": {"b": 1.0}}, quick=False, backend="numpy"
)


def test_the_command_knows_every_claim_in_the_order_of_the_numbers() -> None:
    assert tuple(CLAIMS) == NAMES
    assert [claim.number for claim in CLAIMS.values()] == sorted(claim.number for claim in CLAIMS.values())


def test_a_hash_is_the_same_on_every_machine_and_changes_with_every_field() -> None:
    first = EXPERIMENT.config_hash()
    assert first == "91b1162c7b2f79adb6731ac42f9c3a2f66962f04f283317ce71757de858fe3c5"
    changes = [
        {"claim": "other"},
        {"task": "training"},
        {"dataset": "scenes-60"},
        {"method": "clip"},
        {"reference": "strong"},
        {"seed": 1},
        {"settings": {"a": {"b": 2.0}}},
        {"quick": True},
        {"label": "share 0.5"},
        # The figures of a library do not stand for those of another library.
        {"backend": "jax"},
        {"scale": 2},
    ]
    hashes = {replace(EXPERIMENT, **change).config_hash() for change in changes}  # type: ignore[arg-type]
    assert len(hashes | {first}) == len(changes) + 1


def test_seeds_follow_after_the_trials_and_use_the_rate_with_the_best_validation() -> None:
    # Both best rates are inside this grid, so it does not grow.
    world = replace(WORLDS["scenes-30"], rates=(4e-3, 8e-3, 16e-3, 32e-3))
    results: dict[str, Row] = {}

    def planned() -> list[Experiment]:
        plan = Plan(results, [world], seeds=(0, 1), quick=False)
        plan.add_target("weak-to-strong", world, "drrho", "weak")
        return plan.missing()

    rates = {"reference": world.rates[1], "target": world.rates[2]}
    # First the reference model's rate is chosen, then the target's.
    for group, best in rates.items():
        trials = planned()
        assert {(trial.claim, trial.seed) for trial in trials} == {(LEARNING_RATES, CHOICE_SEED)}
        assert sorted(trial.settings[group]["learning_rate"] for trial in trials) == sorted(world.rates)
        for trial in trials:
            value = 0.7 if trial.settings[group]["learning_rate"] == best else 0.6
            results[trial.config_hash()] = row_of(trial, value)
    experiments = planned()
    assert [(experiment.claim, experiment.seed) for experiment in experiments] == [
        ("weak-to-strong", 0),
        ("weak-to-strong", 1),
    ]
    for experiment in experiments:
        assert {group: experiment.settings[group]["learning_rate"] for group in rates} == rates


def test_every_row_is_kept_once_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    results = Results(tmp_path, quick=False)
    results.append(row_of(EXPERIMENT))
    results.append(row_of(EXPERIMENT))
    path = tmp_path / "variance.jsonl"
    with path.open("a") as file:
        file.write('{"claim": "varia')
    again = Results(tmp_path, quick=False)
    other = row_of(replace(EXPERIMENT, seed=1))
    again.append(other)
    assert read_rows(path) == [row_of(EXPERIMENT), other]
    assert again.of("variance") == [row_of(EXPERIMENT), other]


def test_rows_that_were_changed_and_rows_of_the_quick_form_are_refused(tmp_path: Path) -> None:
    Results(tmp_path, quick=False).append(row_of(EXPERIMENT))
    with pytest.raises(BadInput, match=r"^out must be a folder of its own, got .* without --quick$"):
        Results(tmp_path, quick=True)
    other = tmp_path / "other"
    Results(other, quick=False, scale=2).append(row_of(replace(EXPERIMENT, scale=2)))
    with pytest.raises(BadInput, match=r"^out must be a folder of its own, got .* of --scale 2$"):
        Results(other, quick=False, scale=4)
    path = tmp_path / "variance.jsonl"
    row = json.loads(path.read_text())
    for change, flaw in (({"seed": 3}, "a hash that does not belong"), ({"colour": 1}, "line 1: .*colour")):
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(BadInput, match=flaw):
            read_rows(path)
    path.write_text((json.dumps(row) + "\n") * 2)
    with pytest.raises(BadInput, match="line 2 a hash for the second time"):
        read_rows(path)


def test_a_claim_is_measured_once_continues_and_has_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, runs = tmp_path / "out", tmp_path / "runs"
    world = replace(WORLDS["scenes-30"], references={"weak": {}})
    # The verdict needs all worlds of the plan; here this is the only world, and other claims need other worlds.
    monkeypatch.setattr("drrho_clip.reproduce.standing.WORLDS", {world.name: world})
    claim = CLAIMS["variance"]
    monkeypatch.setattr("drrho_clip.reproduce.claims.CLAIMS", {claim.name: claim})

    def rows(**changes: int) -> Results:
        given = {"seeds": range(2), "jobs": 0, "worlds": [world], "quick": True, "quiet": True} | changes
        return reproduce([claim], out, runs, **given)  # type: ignore[arg-type]

    first = rows()
    # A trial of the reference model, a trial of the target, and two seeds.
    assert len(first.rows) == 4
    assert not list((runs / "targets").iterdir())
    path = out / "variance.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    # The process was killed while it wrote the last row.
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    again = rows(jobs=2)
    assert again.rows.keys() == first.rows.keys()
    last = json.loads(lines[-1])["config_hash"]
    # The same experiment gives the same figures, also in another process; nothing else was measured again.
    for name, curve in first.rows[last].metrics.items():
        assert again.rows[last].metrics[name] == pytest.approx(curve, rel=1e-3), name
    assert [row for row in again.rows.values() if row.config_hash != last] == list(first.rows.values())[:-1]
    judgement = claim.judge(again.of("variance"))
    assert judgement is not None
    assert main(["reproduce", "--quick", "--report", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert judgement.verdict in shown
    assert f"wrote {out}" in shown
    assert f"**Verdict: {judgement.verdict}.**" in (out / "variance.md").read_text(encoding="utf-8")


def test_mistakes_have_one_line(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "claims must be left out with --all, got variance" in fails("reproduce", "variance", "--all")
    assert "scale must be 1 with --quick, got 2" in fails("reproduce", "variance", "--quick", "--scale", "2")
    assert "scale must be 1 for the claim estimator, which has models of its own, got 2" in fails(
        "reproduce", "variance", "estimator", "--scale", "2"
    )
    assert f"CLAIM must be one of {', '.join(NAMES)}" in fails("reproduce", "nothing")
    worlds = ", ".join(WORLDS)
    assert f"worlds must be among {worlds}, got moon" in fails("reproduce", "variance", "--worlds", "moon")
    file = tmp_path / "file"
    file.write_text("text")
    assert f"out must be a folder that can be written, got {file}" in fails(
        "reproduce", "variance", "--quick", "--out", str(file)
    )
