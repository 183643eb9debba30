"""Experiments that diverge or fail, commands that are killed, and two commands in one folder."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.files.lock import only_process
from drrho_clip.reproduce.claims import CLAIMS
from drrho_clip.reproduce.engine import reproduce
from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.grid import best_place
from drrho_clip.reproduce.measuring.training import Measured
from drrho_clip.reproduce.origin import commit_of
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.pool import measure
from drrho_clip.reproduce.results import Metrics, Results
from drrho_clip.reproduce.tasks import run
from drrho_clip.reproduce.worlds import WORLDS, World
from helpers.claims import row_with

QUICK = replace(WORLDS["scenes-30"].quick(), references={})


def claim_of(*settings: dict[str, float]) -> Callable[[Plan], None]:
    """Return the experiments of a claim: clip with each of these settings."""

    def experiments(plan: Plan) -> None:
        for values in settings:
            target = {**QUICK.target, "learning_rate": 1e-3, **values}
            merged = {"data": dict(QUICK.data), "target": target, "reference": None}
            label = " ".join(map(str, values.items()))
            plan.add(Experiment("variance", "training", QUICK.name, "clip", None, 0, merged, True, label))

    return experiments


def measured(tmp_path: Path, *settings: dict[str, float], worlds: tuple[World, ...] = (QUICK,)) -> None:
    """Measure a claim that needs clip with each of these settings."""
    claim = replace(CLAIMS["variance"], experiments=claim_of(*settings))
    reproduce([claim], tmp_path / "out", tmp_path / "runs", seeds=(0, 1), jobs=0, worlds=worlds, quick=True, quiet=True)


def lines(tmp_path: Path) -> list[str]:
    return (tmp_path / "out" / "variance.jsonl").read_text(encoding="utf-8").splitlines()


def test_a_training_that_diverges_has_a_row_and_the_command_goes_on(tmp_path: Path) -> None:
    measured(tmp_path, {"learning_rate": 1e18}, {"learning_rate": 1e-3})
    diverged, good = lines(tmp_path)
    assert '"diverged": 1.0' in diverged
    assert '"retrieval_r1": 0.0' in diverged
    assert '"validation_r1": 0.0' in diverged
    assert "diverged" not in good


@pytest.mark.parametrize(
    ("metrics", "kept"),
    [
        ({"loss": float("nan"), "accuracy": 0.1}, None),
        ({"curve": [1.0, float("inf")]}, None),
        ({"validation": [float("nan"), float("-inf")]}, None),
        # The other trials of a grid still allow a choice.
        ({"validation": [float("nan"), 0.2, 0.5, float("inf")]}, {"validation": [None, 0.2, 0.5, None]}),
        ({"loss": -1.0, "curve": [1.0, 2.0]}, {"loss": -1.0, "curve": [1.0, 2.0]}),
    ],
)
def test_figures_that_are_not_finite_are_those_of_a_diverged_experiment(
    metrics: Metrics, kept: Metrics | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drrho_clip.reproduce.tasks.TASKS", {"generic": lambda *_: Measured(metrics, 1.0)})
    settings = {"trials": [1, 2, 3, 4]}
    row = run(Experiment("generic", "generic", "digits-few", "erm", None, 0, settings, False), tmp_path)
    assert row.diverged == (kept is None)
    assert kept is None or row.metrics == kept
    # The row can be written and read.
    Results(tmp_path, quick=False).append(row)
    assert Results(tmp_path, quick=False).of("generic") == [row]


def test_a_trial_that_diverged_is_chosen_only_if_all_trials_diverged() -> None:
    choice = Experiment("generic", "generic", "digits-few", "erm", None, 100, {"trials": [1, 2, 3]}, False)
    nan = float("nan")
    for figures, place in (([nan, -3.0, -2.0], 2), ([0.1, nan, 0.0], 0), ([None, -3.0, nan], 1)):
        assert best_place(row_with(choice, {"validation": figures})) == place  # type: ignore[dict-item]
    assert best_place(row_with(choice, {"diverged": 1.0})) == 0


def test_an_experiment_that_fails_is_named_after_all_others_have_run(tmp_path: Path) -> None:
    wrong = {"width": 0}
    with pytest.raises(BadInput) as caught:
        measured(tmp_path, wrong, {"width": -1}, {"width": 2})
    assert str(caught.value) == (
        "every experiment must succeed, got an error in variance: clip, ('width', 0), on scenes-30, seed 0: width must "
        "be an integer of at least 1, got 0 (2 experiments failed)"
    )
    assert len(lines(tmp_path)) == 1


def test_the_traceback_of_a_mistake_of_our_code_goes_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr("drrho_clip.reproduce.measuring.training.train", fail)
    with pytest.raises(BadInput, match=r"seed 0: ZeroDivisionError: a mistake, see .*traceback\.txt$"):
        measured(tmp_path, {"width": 2})
    assert "ZeroDivisionError: a mistake" in (tmp_path / "runs" / "traceback.txt").read_text(encoding="utf-8")


def test_a_failure_can_be_sent_to_the_parent_process_whatever_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        # This exception cannot be built again from the message alone.
        raise MissingExtra("reading images", "Pillow")

    monkeypatch.setattr("drrho_clip.reproduce.measuring.training.train", fail)
    plan = Plan({}, [QUICK], seeds=(0, 1), quick=True)
    claim_of({"width": 2})(plan)
    failures = measure(plan.missing(), tmp_path, jobs=0, keep=lambda row: None, quiet=True)
    assert pickle.loads(pickle.dumps(failures)) == failures
    assert [failure.message for failure in failures] == ["reading images needs Pillow: pip install 'drrho-core[train]'"]


@pytest.mark.parametrize("option", ["out", "runs"])
def test_a_folder_serves_one_command_at_a_time(option: str, tmp_path: Path) -> None:
    folder = tmp_path / option
    folder.mkdir()
    with (
        only_process(folder),
        pytest.raises(BadInput, match=rf"^{option} must be a folder that no other process writes"),
    ):
        measured(tmp_path, {"width": 2})
    assert not (tmp_path / "out" / "variance.jsonl").exists()


def test_the_workers_of_a_killed_command_end(tmp_path: Path) -> None:
    words = ["reproduce", "variance", "--quick", "--jobs", "2"]
    folders = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "drrho_clip", *words, *folders]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # After a line about an experiment the workers are there.
        for line in process.stderr:
            if re.match(r"experiments: [1-9]", line):
                break
        process.kill()
        # The workers hold the other end of this pipe as long as they live, so reading ends when they have ended.
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.stderr.close()
            pytest.fail("the workers still live")


def test_without_a_terminal_each_experiment_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = replace(CLAIMS["variance"], experiments=claim_of({"learning_rate": 1e18}, {"width": 2}))
    reproduce([claim], tmp_path / "out", tmp_path / "runs", seeds=(0, 1), jobs=0, worlds=[QUICK], quick=True)
    assert capsys.readouterr().err.splitlines() == [
        "experiments: 0/2",
        "experiments: 1/2 variance: clip, ('learning_rate', 1e+18), on scenes-30, seed 0: diverged",
        "experiments: 2/2 variance: clip, ('width', 2), on scenes-30, seed 0",
    ]


def test_only_changed_code_marks_the_commit(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    results, code = tmp_path / "docs" / "claims" / "variance.jsonl", tmp_path / "package" / "code.py"
    for file in (results, code):
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    results.write_text("1\n2\n")
    assert commit_of(code.parent) == head
    code.write_text("2\n")
    assert commit_of(code.parent) == f"{head}+"
